"""The adapter bank: folded adapters as rank pages on the device.

An edit of rank 48 is the sum of three of rank 16, so the device holds pools of fixed-size rank pages, one pool for
each layer and site, and an adapter is a list of page ids for each site (the same ids in every layer). Adapters of any
rank, kind and target set reach a jitted program as page ids: nothing recompiles. Page 0 of every pool is null. The
pools of a site are one array for all layers, so that an adapter is written by one program with few arrays.
"""

import functools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from kernels.types import Array, PagePool, Site, TilePages
from preft_jax.adapter import Adapter, AdapterConfig, LowRankEdit, fold_params
from preft_jax.config import ModelConfig
from preft_jax.errors import AdapterError, ConfigError
from preft_jax.shapes import RANK_PAGE, SITES


class Pools(NamedTuple):
    """Rank pages of one site in all layers: ``a_LPDR [L, P, D, 16]``, ``c_LPR`` (float32), ``b_LPRF [L, P, 16, F]``."""

    a_LPDR: Array
    c_LPR: Array
    b_LPRF: Array


class Bank(NamedTuple):
    """Rank pages on the device, by site."""

    sites: dict[str, Pools]

    def at(self, layer: int, site: str, page: Array) -> tuple[PagePool, Array]:
        """Return a layer's view of a site and of page ids: the pages of all layers in a row, without a copy."""
        pools = self.sites[site]
        per_layer = pools.a_LPDR.shape[1]
        pool = PagePool(*(array.reshape(-1, *array.shape[2:]) for array in pools))
        return pool, jnp.where(page == 0, 0, page + layer * per_layer)

    def site(self, layer: int, site: str, tiles: TilePages) -> Site:
        """Return where a batch's page lists act at one site of a layer."""
        pool, page_NE = self.at(layer, site, tiles.page_NE)
        return Site(pool, tiles._replace(page_NE=page_NE))


class SitePages(NamedTuple):
    """An adapter's pages at one site, and for each page the column of the edit mask that switches it."""

    pages: tuple[int, ...]
    groups: tuple[int, ...]


AdapterPages = dict[str, SitePages]
"""Where an adapter lies in the bank: its pages by site; sites that it does not edit are absent."""


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
        a, c, b, _ = packed[site]
        for n, page in enumerate(place.pages):
            sites[site] = write(sites[site], np.int32(page), (a[:, n], c[:, n], b[:, n]))
    return Bank(sites)


class HasGroups(Protocol):
    """What the allocator needs to know of an adapter at one site: a ``PackedSite``, for one."""

    @property
    def groups(self) -> tuple[int, ...]:
        """The mask column of each rank page."""
        ...


class BankAllocator:
    """Host-side book of which rank pages are free, a list for each site. Knows nothing of the device."""

    def __init__(self, num_pages: int, sites: Sequence[str] = SITES):
        self.num_pages = num_pages
        self._free = {site: list(range(num_pages - 1, 0, -1)) for site in sites}

    def free_pages(self, site: str) -> int:
        """Return how many pages of a site are free."""
        return len(self._free[site])

    def allocate(self, packed: Mapping[str, HasGroups]) -> AdapterPages:
        """Take the pages that an adapter needs, one for each of a site's ``groups``.

        Raises:
            AdapterError: if the bank lacks one of its sites or enough free pages; nothing is taken then.
        """
        for site, edit in packed.items():
            if site not in self._free:
                raise AdapterError(
                    f"the adapter edits {site!r}, which this bank does not hold; it holds {', '.join(self._free)}"
                )
            need, free = len(edit.groups), len(self._free[site])
            if need > free:
                raise AdapterError(
                    f"the adapter needs {need} rank pages at {site!r} and {free} of {self.num_pages - 1} are free; "
                    "give the bank more pages or serve fewer adapters at once"
                )
        return {
            site: SitePages(tuple(self._free[site].pop() for _ in edit.groups), edit.groups)
            for site, edit in packed.items()
        }

    def release(self, where: AdapterPages) -> None:
        """Give an adapter's pages back."""
        for site, place in where.items():
            self._free[site].extend(place.pages)
