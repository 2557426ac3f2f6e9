"""The adapter bank: folded adapters as rank pages on the device.

An edit of rank 48 is the sum of three of rank 16, so the device holds pools of fixed-size rank pages, one pool for
each layer and site, and an adapter is a list of page ids for each site (the same ids in every layer). Adapters of any
rank, kind and target set reach a jitted program as page ids: nothing recompiles. Page 0 of every pool is null. The
pools of a site are one array for all layers, so that an adapter is written by one program with few arrays.
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from kernels.types import Array, PagePool, Site, TilePages
from preft_jax.adapters.allocator import AdapterPages
from preft_jax.adapters.pages import PackedSite
from preft_jax.config import ModelConfig
from preft_jax.errors import ConfigError
from preft_jax.models.params import AXES
from preft_jax.shapes import PREFIX, RANK_PAGE, SITES


class Pools(NamedTuple):
    """Rank pages of one site in all layers: ``a_LPDR [L, P, D, 16]``, ``c_LPR`` (float32), ``b_LPRF [L, P, 16, F]``."""

    a_LPDR: Array
    c_LPR: Array
    b_LPRF: Array


_AXES = {**AXES, "block": ("hidden", "hidden"), PREFIX: ("kv_heads", "kv_heads")}
"""The logical axes of what a site reads and writes: a linear's are those of its weight."""


def bank_axes(sites: Sequence[str]) -> "Bank":
    """Return the logical axes of a bank's arrays: A is cut with what a site reads, B with what it writes."""

    def axes(site: str) -> Pools:
        reads, writes = _AXES[site]
        lead = ("layers", "pages")
        return Pools((*lead, reads, "rank"), (*lead, "rank"), (*lead, "rank", writes))

    return Bank({site: axes(site) for site in sites})


class Bank(NamedTuple):
    """Rank pages on the device, by site."""

    sites: dict[str, Pools]

    @property
    def num_pages(self) -> int:
        """Rank pages of a layer and site, the null page included."""
        return next((pools.a_LPDR.shape[1] for pools in self.sites.values()), 1)

    def at(self, layer: int, site: str, page: Array) -> tuple[PagePool, Array]:
        """Return a layer's view of a site and of page ids: the pages of all layers in a row, without a copy."""
        pools = self.sites[site]
        per_layer = pools.a_LPDR.shape[1]
        pool = PagePool(*(array.reshape(-1, *array.shape[2:]) for array in pools))
        return pool, jnp.where(page == 0, 0, page + _unknown(layer * per_layer))

    def own(self, layer: int, site: str) -> PagePool:
        """Return a layer's own pages of a site, with page ids as they are: a copy, where they are read as an array."""
        at = _unknown(layer)
        return PagePool(*(jax.lax.dynamic_index_in_dim(array, at, keepdims=False) for array in self.sites[site]))

    def site(self, layer: int, site: str, tiles: TilePages) -> Site:
        """Return where a batch's page lists act at one site of a layer."""
        pool, page_NE = self.at(layer, site, tiles.page_NE)
        return Site(pool, tiles._replace(page_NE=page_NE))


def init_bank(config: ModelConfig, num_pages: int, dtype: Any, sites: Sequence[str] = SITES) -> Bank:
    """Return an empty bank of ``num_pages`` rank pages a layer and site, the null page included.

    The set of sites is fixed for the life of the bank, so that adapters with other targets never recompile a program.
    """
    if num_pages < 1:
        raise ConfigError(f"the adapter bank needs at least its null page; got {num_pages} pages")

    def pools(site: str) -> Pools:
        d, f = config.site_shape(site)
        pages = config.num_hidden_layers, num_pages
        return Pools(
            jnp.zeros((*pages, d, RANK_PAGE), dtype),
            jnp.zeros((*pages, RANK_PAGE), jnp.float32),
            jnp.zeros((*pages, RANK_PAGE, f), dtype),
        )

    return Bank({site: pools(site) for site in sites})


def _unknown(number: int) -> Array:
    """Return a number that XLA on a CPU does not know: kernels that differ in it alone are compiled once, not for each
    layer.
    """
    return jax.lax.optimization_barrier(np.int32(number)) if jax.default_backend() == "cpu" else np.int32(number)


def _write_page(pools: Pools, page: jax.Array, edit: tuple[jax.Array, jax.Array, jax.Array]) -> Pools:
    return Pools(*(pool.at[:, page].set(new.astype(pool.dtype)) for pool, new in zip(pools, edit, strict=True)))


@functools.cache
def _page_writer() -> Any:
    return jax.jit(_write_page, donate_argnums=0)


def write_adapter(bank: Bank, packed: dict[str, PackedSite], where: AdapterPages) -> Bank:
    """Return the bank with an adapter's pages written in place; the bank given is donated."""
    write = _page_writer()
    sites = dict(bank.sites)
    for site, place in where.items():
        a, c, b, *_ = packed[site].scaled()
        for n, page in enumerate(place.pages):
            sites[site] = write(sites[site], np.int32(page), (a[:, n], c[:, n], b[:, n]))
    return Bank(sites)
