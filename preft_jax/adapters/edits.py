"""How a forward pass applies low-rank edits: one small class for each way that edits meet a batch.

All have ``apply(layer, sites, x, ys)``: ``ys`` are the un-edited outputs of ``sites``, which all read ``x``; the
edited outputs come back. At ``block``, x and y are the same array: every edit reads it before any is added.
``prefix(layer, dtype)`` gives attention what it is to see in front of each row.
"""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp

from kernels import api, dispatch
from kernels.types import PagePool, Site, TilePages
from kernels.xla.lowrank import few_pages
from preft_jax.adapters.bank import Bank
from preft_jax.adapters.fold import LowRankEdit
from preft_jax.shapes import NUM_GROUPS, PREFIX, SITES, check_axes


class PrefixKV(NamedTuple):
    """Learned keys and values in front of each row of a batch, ``k`` and ``v [B, M, K * C]``.

    A query sees those of ``mask_BSM`` beside the keys that it sees in any case; M is padded. Keys are as attention sees
    them, rotated to the positions 0, 1, ..., and the row's own tokens have the positions behind them.
    """

    k_BMF: jax.Array
    v_BMF: jax.Array
    mask_BSM: jax.Array


class Edits(Protocol):
    """What a layer of the model knows of adapters."""

    def apply(self, layer: int, sites: Sequence[str], x: jax.Array, ys: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        """Return ``ys`` with the edits of ``sites`` added."""
        ...

    def prefix(self, layer: int, dtype: Any) -> PrefixKV | None:
        """Return learned keys and values; None where there are none, or the KV cache holds them."""
        ...


class NoEdits(NamedTuple):
    """The plain base model."""

    def apply(self, layer: int, sites: Sequence[str], x: jax.Array, ys: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        """Return ``ys``."""
        return ys

    def prefix(self, layer: int, dtype: Any) -> PrefixKV | None:
        """Return None: what there is is in the KV cache."""
        return None


class PackedEdits(NamedTuple):
    """Many adapters in one packed prefill batch: rank pages of a bank, page lists for each tile, an edit mask."""

    bank: Bank
    tiles: Mapping[str, TilePages]
    mask_TG: jax.Array

    def apply(self, layer: int, sites: Sequence[str], x: jax.Array, ys: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        """Edit ``ys [T, F]``; sites that the bank does not hold stay as they are."""
        held = {site: self.bank.site(layer, site, self.tiles[site]) for site in sites if site in self.bank.sites}
        if not held:
            return ys
        pools, tiles = zip(*held.values(), strict=True)
        shrunk = api.shrink(x, pools, tiles, self.mask_TG)
        out = dict(zip(sites, ys, strict=True))
        for (site, at), s_TER in zip(held.items(), shrunk, strict=True):
            out[site] = api.expand(s_TER, out[site], *at)
        return tuple(out[site] for site in sites)

    def prefix(self, layer: int, dtype: Any) -> PrefixKV | None:
        """Return None: what there is is in the KV cache."""
        return None


class RowEdits(NamedTuple):
    """One token a row, each with its own adapter: decoding with all-token adapters."""

    bank: Bank
    pages: Mapping[str, jax.Array]

    def apply(self, layer: int, sites: Sequence[str], x: jax.Array, ys: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        """Edit ``ys [B, F]``."""
        return tuple(self.apply_beside((y.shape[1],), layer, (site,), x, y) for site, y in zip(sites, ys, strict=True))

    def apply_beside(
        self, widths: Sequence[int], layer: int, sites: Sequence[str], x: jax.Array, y_BW: jax.Array
    ) -> jax.Array:
        """Edit the outputs of linears that lie side by side in ``y_BW``, in the order of ``sites``, ``widths`` each."""
        starts = itertools.accumulate(widths, initial=0)
        held = [(site, column) for site, column in zip(sites, starts, strict=False) if site in self.bank.sites]
        pools, pages = [], []
        for site, _ in held:
            pool, page_BE = self._at(layer, site)
            pools.append(pool)
            pages.append(page_BE)
        return api.decode_edit(x, y_BW, pools, pages, columns=[column for _, column in held])

    def prefix(self, layer: int, dtype: Any) -> PrefixKV | None:
        """Return None: what there is is in the KV cache."""
        return None

    def _at(self, layer: int, site: str) -> tuple[PagePool, jax.Array]:
        page_BE = self.pages[site]
        if dispatch.chosen("decode_edit") == "xla" and few_pages(self.bank.num_pages, page_BE.size):
            return self.bank.own(layer, site), page_BE
        return self.bank.at(layer, site, page_BE)


class Dropout(NamedTuple):
    """LoRA's dropout: of each row of a batch, with its own key and rate, on what an edit reads.

    ``key_B`` and ``rate_B`` (float32); the edits of one row draw the same whatever rows lie beside it and however far
    it is padded. Of a part of the layers and of each row: the number of the first layer, where the part begins in a
    row, and how long the whole row is (None: the part is the row).
    """

    key_B: jax.Array
    rate_B: jax.Array
    first_layer: jax.Array | int = 0
    start: jax.Array | int = 0
    length: int | None = None

    def drop(self, layer: int, site: str, x_BSD: jax.Array) -> jax.Array:
        """Return ``x`` with some channels of some tokens zero, and the others scaled up (inverted dropout)."""
        number = (self.first_layer + layer) * len(SITES) + SITES.index(site)

        def one(key: jax.Array, rate: jax.Array, x_SD: jax.Array) -> jax.Array:
            size = x_SD.shape[0]
            drawn = jax.random.uniform(jax.random.fold_in(key, number), (self.length or size, x_SD.shape[1]))
            keep = (drawn if self.length is None else jax.lax.dynamic_slice_in_dim(drawn, self.start, size)) >= rate
            return jnp.where(keep, x_SD.astype(jnp.float32) / (1 - rate), 0.0).astype(x_SD.dtype)

        return jax.vmap(one)(self.key_B, self.rate_B, x_BSD)


def check_edit(name: str, edit: LowRankEdit, d: int, f: int) -> None:
    """Check that a folded edit reads ``d`` channels and writes ``f``.

    Raises:
        ShapeError: it does not.
    """
    rank = edit.c_R.shape[0] if getattr(edit.c_R, "ndim", 0) == 1 else None
    check_axes(f"{name}.a_DR", edit.a_DR, "float", D=d, R=rank)
    check_axes(f"{name}.c_R", edit.c_R, "float", R=rank)
    check_axes(f"{name}.b_RF", edit.b_RF, "float", R=rank, F=f)
    check_axes(f"{name}.group_R", edit.group_R, "int", R=rank)


class FoldedEdits(NamedTuple):
    """One adapter on every sequence of a training batch, applied directly from its fold; differentiable."""

    folded: Any
    mask_BSG: jax.Array
    dropout: Dropout | None = None

    def apply(self, layer: int, sites: Sequence[str], x: jax.Array, ys: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        """Edit ``ys [B, S, F]``.

        Raises:
            ShapeError: if the mask or an edit does not fit.
        """
        edits: Mapping[str, LowRankEdit] = self.folded["layers"][layer]
        check_axes("edit_mask_BSG", self.mask_BSG, "bool", B=x.shape[0], S=x.shape[1], G=NUM_GROUPS)

        def one(site: str, y: jax.Array) -> jax.Array:
            if site not in edits:
                return y
            check_edit(f"layers.{layer}.{site}", edits[site], x.shape[-1], y.shape[-1])
            return self._edit(edits[site], x if self.dropout is None else self.dropout.drop(layer, site, x), y)

        return tuple(one(site, y) for site, y in zip(sites, ys, strict=True))

    def prefix(self, layer: int, dtype: Any) -> PrefixKV | None:
        """Return the adapter's keys and values, the same for each row."""
        edit = self.folded["layers"][layer].get(PREFIX)
        if edit is None:
            return None
        k_BMF, v_BMF = (
            jnp.broadcast_to(x.astype(dtype), (self.mask_BSG.shape[0], *x.shape)) for x in (edit.a_DR.T, edit.b_RF)
        )
        return PrefixKV(k_BMF, v_BMF, jnp.asarray(self.mask_BSG)[:, :, :1] & (edit.c_R > 0))

    def _edit(self, edit: LowRankEdit, x: jax.Array, y: jax.Array) -> jax.Array:
        s = jnp.einsum("bsd,dr->bsr", x, edit.a_DR.astype(x.dtype), preferred_element_type=jnp.float32) + edit.c_R
        s = jnp.where(jnp.asarray(self.mask_BSG)[..., edit.group_R], s, 0.0)
        # Asked for in the dtype of y, the product is added to it by the matrix multiplication itself where there is one
        # that can; in float32 it would be written and read again.
        return y + jnp.einsum("bsr,rf->bsf", s.astype(y.dtype), edit.b_RF.astype(y.dtype))


class RowsEdits(NamedTuple):
    """Many adapters in one training batch, each row of tokens with one of them; differentiable in the pages.

    ``pools`` has for each layer the rank pages of each site that is edited, ``tiles`` the page lists of runs of each
    row's tokens: as in prefill, the kernels know rank pages only.
    """

    pools: Sequence[Mapping[str, PagePool]]
    tiles: Mapping[str, TilePages]
    mask_BSG: jax.Array
    dropout: Dropout | None = None

    def apply(self, layer: int, sites: Sequence[str], x: jax.Array, ys: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        """Edit ``ys [B, S, F]``.

        Raises:
            ShapeError: if the mask does not fit.
        """
        held = [site for site in sites if site in self.pools[layer]]
        if not held:
            return ys
        check_axes("edit_mask_BSG", self.mask_BSG, "bool", B=x.shape[0], S=x.shape[1], G=NUM_GROUPS)
        mask_TG = jnp.asarray(self.mask_BSG).reshape(-1, NUM_GROUPS)
        at = {site: Site(self.pools[layer][site], self.tiles[site]) for site in held}

        def shrink(x: jax.Array, some: Sequence[str]) -> tuple[jax.Array, ...]:
            pools, tiles = zip(*(at[site] for site in some), strict=True)
            return api.shrink(x.reshape(-1, x.shape[2]), pools, tiles, mask_TG)

        if self.dropout is None:
            shrunk = shrink(x, held)
        else:
            shrunk = [shrink(self.dropout.drop(layer, site, x), [site])[0] for site in held]
        out = dict(zip(sites, ys, strict=True))
        for site, s_TER in zip(held, shrunk, strict=True):
            y = out[site]
            out[site] = api.expand(s_TER, y.reshape(-1, y.shape[2]), *at[site]).reshape(y.shape)
        return tuple(out[site] for site in sites)

    def prefix(self, layer: int, dtype: Any) -> PrefixKV | None:
        """Return each row's keys and values, of the pages on the list of its first tile."""
        pool = self.pools[layer].get(PREFIX)
        if pool is None:
            return None
        rows = self.mask_BSG.shape[0]
        page_NE = self.tiles[PREFIX].page_NE
        page_BE = page_NE.reshape(rows, -1, page_NE.shape[1])[:, 0]
        k_BMF, v_BMF = (
            x.reshape(rows, -1, x.shape[-1]).astype(dtype) for x in (pool[0][page_BE].swapaxes(2, 3), pool[2][page_BE])
        )
        there_BM = pool[1][page_BE].reshape(rows, -1) > 0
        return PrefixKV(k_BMF, v_BMF, jnp.asarray(self.mask_BSG)[:, :, :1] & there_BM[:, None])
