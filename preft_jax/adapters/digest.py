"""The digest of an adapter: SHA-256 over what it computes."""

import hashlib
from collections.abc import Mapping, Sequence

import numpy as np

from preft_jax.adapters.config import AdapterConfig
from preft_jax.adapters.fold import FOLD_VERSION, LowRankEdit


def digest_of_fold(config: AdapterConfig, layers: Sequence[Mapping[str, LowRankEdit]]) -> str:
    """Return SHA-256 (hex) of an adapter's fold: folded tensors, kind, positions, turn rule and marker.

    Args:
        config: of the adapter.
        layers: what ``fold_on_host`` gives.
    """
    sha = hashlib.sha256()

    def part(data: bytes | np.ndarray) -> None:
        sha.update((data.nbytes if isinstance(data, np.ndarray) else len(data)).to_bytes(8, "little"))
        sha.update(data)

    for text in (f"fold{FOLD_VERSION}", config.kind, config.positions, config.assistant_turns):
        part(text.encode())
    if config.alora_invocation_tokens is not None:
        part(b"marker")
        part(np.asarray(config.alora_invocation_tokens, "<i4"))
    for i, sites in enumerate(layers):
        for site in sorted(sites):
            part(f"{i}.{site}".encode())
            for leaf in sites[site]:
                part(str(leaf.shape).encode())
                part(np.ascontiguousarray(leaf))
    return sha.hexdigest()
