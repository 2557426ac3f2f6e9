"""Rank pages on their way from the host to the bank: how slabs travel, and what one call writes.

On several devices a slab travels cut in equal parts, each over its own device's link, whatever stands in it. The
program that writes gathers it, which devices do fast, and each keeps its part of every factor (``own_slabs``). So the
host has one copy of an adapter, laid out as for one device, and no byte crosses its links twice.
"""

from collections.abc import Iterator, Mapping
from collections.abc import Sequence as Many
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from kernels.xla.pages import slab_width
from preft_jax.adapters.bank import Bank
from preft_jax.config import ModelConfig
from preft_jax.device.mesh import TENSOR
from preft_jax.shapes import LINEAR_SITES, RANK_PAGE
from serve.engine import programs as device
from serve.engine.residency import Load
from serve.engine.spread import Spread
from serve.store.host_copy import ALL_LINEARS, slab_sharding


class _Write(NamedTuple):
    """A rank page of each site of an adapter, or of all linears, and where they go."""

    slabs: dict[str, Any]
    page: dict[str, int]


class RankPages:
    """Copies rank pages to the device, and makes the arguments of the programs that write them.

    Args:
        model: sizes of the model.
        spread: its devices.
        sites: those of the bank.
        dtype: of slabs: the bank's, or FP8.
        writes: rank pages that one call writes at each site.
    """

    def __init__(self, model: ModelConfig, spread: Spread, sites: tuple[str, ...], dtype: Any, writes: int):
        self._model = model
        self._spread = spread
        self._sites = sites
        self._dtype = dtype
        self.writes = writes
        self._empty: dict[str, jax.Array] = {}

    @property
    def programs(self) -> list[str]:
        """Names of the programs that write."""
        whole = ["write-whole-pages"] if set(LINEAR_SITES) <= set(self._sites) else []
        return [*whole, "write-pages"]

    def trace(self, name: str, bank: Bank) -> Any:
        """Trace a program that writes."""
        slabs, page = self.nothing(name)
        whole = name == "write-whole-pages"

        def write_own(bank: Bank, slabs: Any, page_SK: jax.Array) -> Bank:
            some = {ALL_LINEARS: slabs} if whole else slabs
            return device.write_slabs(bank, own_slabs(self._model, self._spread.config, some), page_SK)

        write = device.write_whole_slabs if whole else device.write_slabs
        if self._spread.num_devices > 1:
            write = write_own
        return self._spread.trace(write, (bank, slabs, page), out=bank, donate=(0,))

    def copied(self, loads: Many[Load]) -> list[Load]:
        """Begin to copy adapters' rank pages to the device; returns the loads with the copies."""
        slabs = [load.slabs for load in loads]
        copied = jax.device_put(slabs, slab_sharding(self._spread.placement, slabs, "device"))
        return [load._replace(slabs=own) for load, own in zip(loads, copied, strict=True)]

    def calls(self, loads: Many[Load]) -> Iterator[tuple[str, Any, np.ndarray]]:
        """Yield the calls that write the copied rank pages of adapters: a program's name, slabs and page ids."""
        writes: dict[str, list[_Write]] = {"write-whole-pages": [], "write-pages": []}
        for load in loads:
            for n in range(load.num_pages):
                slabs = {site: own[n] for site, own in load.slabs.items() if n < len(own)}
                page = {site: place.pages[n] for site, place in load.place.items() if n < len(place.pages)}
                writes["write-whole-pages" if ALL_LINEARS in slabs else "write-pages"].append(_Write(slabs, page))
        for name, some in writes.items():
            for at in range(0, len(some), self.writes):
                yield name, *self._arguments(name, some[at : at + self.writes])

    def nothing(self, name: str) -> tuple[Any, np.ndarray]:
        """Return arguments of a call that writes nothing but zeros to the null page."""
        return self._arguments(name, ())

    def _arguments(self, name: str, writes: Many[_Write]) -> tuple[Any, np.ndarray]:
        if not self._empty:
            zeros = {s: np.zeros((self._model.num_hidden_layers, w), self._dtype) for s, w in self._widths().items()}
            self._empty = jax.device_put(zeros, slab_sharding(self._spread.placement, zeros, None))
        page_SK = np.zeros((len(self._sites), self.writes), np.int32)
        slabs = {site: [slab] * self.writes for site, slab in self._empty.items()}
        for n, write in enumerate(writes):
            for site, slab in write.slabs.items():
                slabs[site][n] = slab
            for site, number in write.page.items():
                page_SK[self._sites.index(site), n] = number
        linears = slabs.pop(ALL_LINEARS, None)
        return (linears if name == "write-whole-pages" else slabs), page_SK

    def _widths(self) -> dict[str, int]:
        """Return the width of the slabs of each site, and of all linears if the bank holds them."""
        widths = {s: slab_width(*self._model.site_shape(s), RANK_PAGE, self._dtype) for s in self._sites}
        if set(LINEAR_SITES) <= set(widths):
            widths[ALL_LINEARS] = sum(widths[site] for site in LINEAR_SITES)
        return widths


def own_slabs(model: ModelConfig, own: ModelConfig, slabs: Mapping[str, Many[jax.Array]]) -> dict[str, list[jax.Array]]:
    """Return a device's slabs of each site, inside ``jax.shard_map``: its parts of A and B, and all of c and scales.

    Args:
        model: the whole model.
        own: what the device has of it.
        slabs: by site, or of ``ALL_LINEARS``; equal parts of them, or all.
    """
    found: dict[str, list[jax.Array]] = {}
    for name, some in slabs.items():
        sites, at = (LINEAR_SITES if name == ALL_LINEARS else (name,)), 0
        widths = [slab_width(*model.site_shape(site), RANK_PAGE, some[0].dtype) for site in sites]
        whole = [_gathered(slab, sum(widths)) for slab in some]
        for site, width in zip(sites, widths, strict=True):
            found[site] = [_own(model, own, site, slab[:, at : at + width]) for slab in whole]
            at += width
    return found


def _gathered(slab_LW: jax.Array, width: int) -> jax.Array:
    return slab_LW if slab_LW.shape[1] == width else jax.lax.all_gather(slab_LW, TENSOR, axis=1, tiled=True)


def _own(model: ModelConfig, own: ModelConfig, site: str, slab_LW: jax.Array) -> jax.Array:
    """Return a device's part of a whole slab of one site."""
    layers, (d, f), (own_d, own_f) = slab_LW.shape[0], model.site_shape(site), own.site_shape(site)
    a, b, rest = jnp.split(slab_LW, (RANK_PAGE * d, RANK_PAGE * (d + f)), axis=1)
    device = jax.lax.axis_index(TENSOR)
    if own_d < d:
        a = jax.lax.dynamic_slice_in_dim(a, device * own_d * RANK_PAGE, own_d * RANK_PAGE, 1)
    if own_f < f:
        b = jax.lax.dynamic_slice_in_dim(b.reshape(layers, RANK_PAGE, f), device * own_f, own_f, 2)
    return jnp.concatenate([a, b.reshape(layers, -1), rest], axis=1)
