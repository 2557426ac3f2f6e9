"""The digest of an adapter: SHA-256 over what it computes."""

import hashlib
from typing import Any

import jax
import numpy as np

from preft_jax.adapters.config import AdapterConfig
from preft_jax.adapters.fold import FOLD_VERSION, fold_params


def _digest(config: AdapterConfig, params: Any) -> str:
    sha = hashlib.sha256()

    def part(data: bytes) -> None:
        sha.update(len(data).to_bytes(8, "little"))
        sha.update(data)

    for text in (f"fold{FOLD_VERSION}", config.kind, config.positions, config.assistant_turns):
        part(text.encode())
    # On the CPU, so that one adapter has one digest whatever accelerator serves it.
    with jax.default_device(jax.devices("cpu")[0]):
        folded = fold_params(config, jax.tree.map(np.asarray, params))
    for i, sites in enumerate(folded["layers"]):
        for site in sorted(sites):
            part(f"{i}.{site}".encode())
            for leaf in sites[site]:
                part(str(leaf.shape).encode())
                part(np.asarray(leaf).tobytes())
    return sha.hexdigest()
