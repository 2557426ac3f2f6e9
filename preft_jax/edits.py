"""How a forward pass applies low-rank edits: one small class for each way that edits meet a batch.

All have ``apply(layer, sites, x, ys)``: ``ys`` are the un-edited outputs of ``sites``, which all read ``x``; the
edited outputs come back. At ``block``, x and y are the same array: every edit reads it before any is added.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp

from kernels import api
from kernels.types import TilePages
from preft_jax.adapter import LowRankEdit
from preft_jax.bank import Bank


class Edits(Protocol):
    """What a layer of the model knows of adapters."""

    def apply(self, layer: int, sites: Sequence[str], x: jax.Array, ys: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        """Return ``ys`` with the edits of ``sites`` added."""
        ...


class NoEdits(NamedTuple):
    """The plain base model."""

    def apply(self, layer: int, sites: Sequence[str], x: jax.Array, ys: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        """Return ``ys``."""
        return ys


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


class RowEdits(NamedTuple):
    """One token a row, each with its own adapter: decoding with all-token adapters."""

    bank: Bank
    pages: Mapping[str, jax.Array]

    def apply(self, layer: int, sites: Sequence[str], x: jax.Array, ys: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        """Edit ``ys [B, F]``."""
        return tuple(
            api.decode_edit(x, y, *self.bank.at(layer, site, self.pages[site])) if site in self.bank.sites else y
            for site, y in zip(sites, ys, strict=True)
        )


class FoldedEdits(NamedTuple):
    """One adapter on every sequence of a training batch, applied directly from its fold; differentiable."""

    folded: Any
    mask_BSG: jax.Array

    def apply(self, layer: int, sites: Sequence[str], x: jax.Array, ys: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        """Edit ``ys [B, S, F]``."""
        edits: Mapping[str, LowRankEdit] = self.folded["layers"][layer]
        return tuple(self._edit(edits[site], x, y) if site in edits else y for site, y in zip(sites, ys, strict=True))

    def _edit(self, edit: LowRankEdit, x: jax.Array, y: jax.Array) -> jax.Array:
        s = jnp.einsum("bsd,dr->bsr", x, edit.a_DR.astype(x.dtype), preferred_element_type=jnp.float32) + edit.c_R
        s = jnp.where(self.mask_BSG[..., edit.group_R], s, 0.0)
        delta = jnp.einsum(
            "bsr,rf->bsf", s.astype(y.dtype), edit.b_RF.astype(y.dtype), preferred_element_type=jnp.float32
        )
        return (y.astype(jnp.float32) + delta).astype(y.dtype)
