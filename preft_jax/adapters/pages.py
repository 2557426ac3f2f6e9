"""Cuts a folded adapter to rank pages of rank 16, on the host."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from preft_jax.adapters.adapter import Adapter
from preft_jax.adapters.config import AdapterConfig
from preft_jax.adapters.fold import LowRankEdit, fold_params
from preft_jax.config import ModelConfig
from preft_jax.errors import AdapterError
from preft_jax.shapes import RANK_PAGE


def num_rank_pages(rank: int) -> int:
    """Return how many rank pages hold ``rank`` ranks."""
    return -(-rank // RANK_PAGE)


def adapter_page_counts(config: AdapterConfig, model: ModelConfig) -> dict[str, int]:
    """Return how many rank pages an adapter takes at each site that it edits."""
    layers = [layer for layer in range(model.num_hidden_layers) if config.edits_layer(layer)]
    if not config.rank_pattern:  # Every request asks.
        layers = layers[:1]
    return {
        site: num_rank_pages(max((config.rank_at(layer, site) for layer in layers), default=0)) * config.groups
        for site in config.targets
    }


class PackedSite(NamedTuple):
    """One site of a folded adapter cut to pages: ``a [L, n, D, 16]``, ``c [L, n, 16]`` (float32), ``b [L, n, 16, F]``.

    ``groups`` names the mask column that switches each page.
    """

    a: np.ndarray
    c: np.ndarray
    b: np.ndarray
    groups: tuple[int, ...]


def pack_adapter(adapter: Adapter, config: ModelConfig, dtype: Any = np.float32) -> dict[str, PackedSite]:
    """Fold an adapter and cut it to rank pages on the host.

    A page belongs to one position group; ranks that do not fill a page are padded with zeros, and a site whose rank
    differs between layers takes the largest.

    Raises:
        AdapterError: if it holds what is not finite in ``dtype``, the bank's: a tile's tokens are multiplied with all
            of the tile's pages, so the requests beside it would be spoilt too.
    """
    with jax.default_device(jax.devices("cpu")[0]):
        folded = fold_params(adapter.config, jax.tree.map(np.asarray, adapter.params))
    layers = jax.tree.map(np.asarray, folded["layers"])
    counts = adapter_page_counts(adapter.config, config)
    with np.errstate(over="ignore"):
        packed = {
            site: _cut_site(layers, site, config.site_shape(site), counts[site], adapter.config.groups, dtype)
            for site in adapter.config.targets
        }
    for site, edit in packed.items():
        if not all(np.isfinite(array).all() for array in (edit.a, edit.c, edit.b)):
            raise AdapterError(
                f"the adapter has values at {site!r} that are NaN or infinite in {np.dtype(dtype).name}; train it "
                "again, or check how it was saved"
            )
    return packed


def _cut_site(
    layers: Sequence[dict[str, LowRankEdit]],
    site: str,
    widths: tuple[int, int],
    pages: int,
    groups: int,
    dtype: Any,
) -> PackedSite:
    """Cut one site of a folded adapter to ``pages`` rank pages in all layers."""
    d, f = widths
    ranks = pages // groups * RANK_PAGE
    a = np.zeros((len(layers), groups, d, ranks), dtype)
    c = np.zeros((len(layers), groups, ranks), np.float32)
    b = np.zeros((len(layers), groups, ranks, f), dtype)
    for i, edits in enumerate(layers):
        for group in range(groups) if site in edits else ():
            edit, own = edits[site], edits[site].group_R == group
            count = int(own.sum())
            a[i, group, :, :count] = edit.a_DR[:, own]
            c[i, group, :count] = edit.c_R[own]
            b[i, group, :count] = edit.b_RF[own]
    a = a.reshape(len(layers), groups, d, pages // groups, RANK_PAGE).transpose(0, 1, 3, 2, 4)
    return PackedSite(
        a.reshape(len(layers), pages, d, RANK_PAGE),
        c.reshape(len(layers), pages, RANK_PAGE),
        b.reshape(len(layers), pages, RANK_PAGE, f),
        tuple(group for group in range(groups) for _ in range(pages // groups)),
    )
