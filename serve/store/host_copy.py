"""The host copy of an adapter: its rank pages as the device takes them."""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import SingleDeviceSharding

from preft_jax.adapters.pages import PackedSite
from preft_jax.device.mesh import SINGLE, Placement
from preft_jax.shapes import LINEAR_SITES
from serve.store.slabs import slab

ALL_LINEARS = "linears"
"""Key of slabs that span all linears."""


class Columns(NamedTuple):
    """The mask column of each rank page that an adapter takes at a site."""

    groups: tuple[int, ...]


class Known(NamedTuple):
    """An adapter on the host.

    ``sites`` says how many rank pages it takes where. ``slabs`` holds them, for each site (``device.slab``); if it has
    equally many at all linears, in slabs that span these, as ``ALL_LINEARS``: a copy costs the host by the array.
    """

    sites: dict[str, Columns]
    slabs: dict[str, list[Any]]

    @property
    def num_bytes(self) -> int:
        """Bytes of its rank pages."""
        return sum(array.nbytes for slabs in self.slabs.values() for array in slabs)


def pack(edits: Mapping[str, PackedSite]) -> Known:
    """Return rank pages as the device takes them, in NumPy arrays."""
    sites = {site: Columns(edit.groups) for site, edit in edits.items()}
    if set(sites) == set(LINEAR_SITES) and len({columns.groups for columns in sites.values()}) == 1:
        count = len(sites[LINEAR_SITES[0]].groups)
        whole = [np.concatenate([slab(edits[site], n) for site in LINEAR_SITES], axis=1) for n in range(count)]
        return Known(sites, {ALL_LINEARS: whole})
    return Known(sites, {site: [slab(edits[site], n) for n in range(len(sites[site].groups))] for site in sites})


SLAB_AXES = ("layers", "slab")
"""The logical axes of a slab."""


def slab_sharding(placement: Placement, slabs: Any, memory: str | None) -> Any:
    """Return how slabs lie in a kind of memory, in place of each or of all; over devices they are cut equally."""
    if placement.mesh is None:
        return None if memory is None else SingleDeviceSharding(jax.devices()[0], memory_kind=memory)
    return jax.tree.map(lambda slab: placement.sharding(slab.shape, SLAB_AXES, memory), slabs)


def pin(known: Known, placement: Placement | None = None) -> Known:
    """Return rank pages in memory that a model's GPUs can read; other backends take them as they are."""
    if jax.default_backend() != "gpu":
        return known
    return known._replace(
        slabs=jax.device_put(known.slabs, slab_sharding(placement or SINGLE, known.slabs, "pinned_host"))
    )


def pin_for(placement: Placement) -> Callable[[Known], Known]:
    """Return ``pin`` for a model's devices."""
    return functools.partial(pin, placement=placement)
