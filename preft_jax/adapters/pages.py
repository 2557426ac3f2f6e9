"""Cuts folded adapters to rank pages of rank 16: on the host for the bank, and inside a training step."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from kernels.xla.fp8 import FP8, LARGEST_FP8
from preft_jax.adapters.adapter import Adapter
from preft_jax.adapters.config import AdapterConfig
from preft_jax.adapters.digest import digest_of_fold
from preft_jax.adapters.fold import LowRankEdit, fold_on_host
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

    ``groups`` names the mask column that switches each page. In FP8 (e4m3), ``scales`` are what each rank of A and of B
    is to be multiplied with, float32 ``[L, n, 16]`` each.
    """

    a: np.ndarray
    c: np.ndarray
    b: np.ndarray
    groups: tuple[int, ...]
    scales: tuple[np.ndarray, np.ndarray] | None = None

    def in_fp8(self) -> "PackedSite":
        """Return pages that have no scales in FP8: the largest magnitude of a rank becomes 448, the largest of e4m3.

        A rank of zeros stays one. One that holds NaN, infinity or what is beyond float16, in which a bank may be, holds
        NaN.
        """
        (a, a_scale), (b, b_scale) = _rounded(self.a, -2), _rounded(self.b, -1)
        return self._replace(a=a, b=b, scales=(a_scale, b_scale))

    def scaled(self) -> "PackedSite":
        """Return the pages that those in FP8 stand for, in float32; others as they are."""
        if self.scales is None:
            return self
        a_scale, b_scale = self.scales
        a = self.a.astype(np.float32) * a_scale[..., None, :]
        b = self.b.astype(np.float32) * b_scale[..., None]
        return self._replace(a=a, b=b, scales=None)


def _rounded(x: np.ndarray, axis: int) -> tuple[np.ndarray, np.ndarray]:
    """Return float32 numbers in FP8, with one scale along an axis."""
    scale = np.abs(x).max(axis, keepdims=True) / np.float32(LARGEST_FP8)
    scale = np.clip(scale, np.finfo(np.float32).tiny, np.finfo(np.float16).max / np.float32(LARGEST_FP8))
    return (x / scale).astype(FP8), scale.squeeze(axis)


def cut_edit(edit: LowRankEdit, num_pages: int, groups: int) -> tuple[Any, Any, Any]:
    """Cut a folded edit to rank pages; works for NumPy arrays and, differentiably, for JAX arrays.

    Page ``n`` belongs to position group ``n // (num_pages // groups)``. Ranks that do not fill a group's pages are
    padded with zeros.

    Args:
        edit: leaves ``[..., D, R]``, ``[..., R]`` and ``[..., R, F]`` with any leading axes (the slots of training);
            each group's ranks follow one another, as ``fold_site`` gives them.
        num_pages: of all groups together.
        groups: position groups.

    Returns:
        ``a [..., n, D, 16]``, ``c [..., n, 16]`` and ``b [..., n, 16, F]``, arrays of the kind and dtype given.
    """
    xp = edit.a_DR.__array_namespace__()
    *lead, d, rank = edit.a_DR.shape
    f = edit.b_RF.shape[-1]
    own, room = rank // groups, num_pages // groups * RANK_PAGE
    a = edit.a_DR.reshape(*lead, d, groups, own)
    c = edit.c_R.reshape(*lead, groups, own)
    b = edit.b_RF.reshape(*lead, groups, own, f)
    if own < room:
        outer, end = [(0, 0)] * len(lead), (0, room - own)
        a = xp.pad(a, [*outer, (0, 0), (0, 0), end])
        c = xp.pad(c, [*outer, (0, 0), end])
        b = xp.pad(b, [*outer, (0, 0), end, (0, 0)])
    a = xp.moveaxis(a.reshape(*lead, d, num_pages, RANK_PAGE), -2, -3)
    return a, c.reshape(*lead, num_pages, RANK_PAGE), b.reshape(*lead, num_pages, RANK_PAGE, f)


def pack_adapter(adapter: Adapter, config: ModelConfig, dtype: Any = np.float32) -> dict[str, PackedSite]:
    """Fold an adapter and cut it to rank pages on the host.

    A page belongs to one position group; ranks that do not fill a page are padded with zeros, and a site whose rank
    differs between layers takes the largest.

    Args:
        adapter: that fits the model.
        config: of the model.
        dtype: of A and B: the bank's, or float8_e4m3fn, with scales.

    Raises:
        AdapterError: if it holds what is not finite in ``dtype``: a tile's tokens are multiplied with all of the tile's
            pages, so the requests beside it would be spoilt too.
    """
    return _pack(adapter.config, fold_on_host(adapter.config, adapter.params), config, dtype)


def fold_and_cut(adapter: Adapter, config: ModelConfig, dtype: Any = np.float32) -> tuple[str, dict[str, PackedSite]]:
    """Fold an adapter once for both its digest and its rank pages: ``(adapter.digest, pack_adapter(...))``.

    Raises:
        AdapterError: as ``pack_adapter``.
    """
    layers = fold_on_host(adapter.config, adapter.params)
    packed = _pack(adapter.config, layers, config, dtype)
    return digest_of_fold(adapter.config, layers), packed


def _pack(
    adapter: AdapterConfig, layers: Sequence[dict[str, LowRankEdit]], config: ModelConfig, dtype: Any
) -> dict[str, PackedSite]:
    counts, dtype = adapter_page_counts(adapter, config), np.dtype(dtype)
    own = np.dtype(np.float32) if dtype == FP8 else dtype
    with np.errstate(over="ignore", invalid="ignore"):
        packed = {
            site: _pack_site(layers, site, config.site_shape(site), counts[site], adapter.groups, own)
            for site in adapter.targets
        }
        if dtype == FP8:
            packed = {site: edit.in_fp8() for site, edit in packed.items()}
    for site, edit in packed.items():
        if not all(np.isfinite(array).all() for array in (edit.a, edit.c, edit.b)):
            raise AdapterError(
                f"the adapter has values at {site!r} that are NaN or infinite in {dtype.name}; train it "
                "again, or check how it was saved"
            )
    return packed


def _pack_site(
    layers: Sequence[dict[str, LowRankEdit]],
    site: str,
    widths: tuple[int, int],
    num_pages: int,
    groups: int,
    dtype: Any,
) -> PackedSite:
    """Cut one site of a folded adapter to rank pages in all layers; zeros in those that it does not edit."""
    d, f = widths
    a = np.zeros((len(layers), num_pages, d, RANK_PAGE), dtype)
    c = np.zeros((len(layers), num_pages, RANK_PAGE), np.float32)
    b = np.zeros((len(layers), num_pages, RANK_PAGE, f), dtype)
    for i, edits in enumerate(layers):
        if site in edits:
            a[i], c[i], b[i] = cut_edit(edits[site], num_pages, groups)
    return PackedSite(a, c, b, tuple(n // (num_pages // groups) for n in range(num_pages)))
