"""Where arrays lie on several devices: one table from logical axes to axes of the mesh, asked by all.

Weights name their axes in ``models/params.py``, KV pages in ``models/cache.py``. A training mesh has one axis,
``fsdp``: every device has a part of each weight and of each batch (Zhao et al., arXiv 2304.11277), and the compiler
gathers a layer's weights where they are used.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from preft_jax.errors import ConfigError
from preft_jax.models.linear import logical_axes

TABLE: Mapping[str, tuple[str, ...]] = {
    "batch": ("fsdp",),
    "vocab": ("tensor", "fsdp"),
    "heads": ("tensor", "fsdp"),
    "kv_heads": ("tensor", "fsdp"),
    "qkv": ("tensor", "fsdp"),
    "mlp": ("tensor", "fsdp"),
    "hidden": (),
    "head": (),
    "pages": (),
    "tokens": (),
}
"""From a logical axis to the axes of a mesh that may cut it, the first that there is; none: every device has all of it.

A mesh axis cuts one axis of an array, and only where the parts are equal.
"""


def spec(mesh: Mesh, shape: tuple[int, ...], axes: tuple[str, ...]) -> PartitionSpec:
    """Return how a mesh cuts an array of a shape and logical axes."""
    left = dict(mesh.shape)
    found: list[str | None] = []
    for size, logical in zip(shape, axes, strict=True):
        axis = next((name for name in TABLE[logical] if name in left and size % left[name] == 0), None)
        if axis is not None:
            del left[axis]
        found.append(axis)
    return PartitionSpec(*found)


@dataclasses.dataclass(frozen=True)
class Placement:
    """A mesh and how arrays lie on it; ``mesh`` None is one device."""

    mesh: Mesh | None

    @classmethod
    def single(cls) -> "Placement":
        """Return the default device alone."""
        return cls(None)

    @classmethod
    def parse(cls, text: str) -> "Placement":
        """Return what ``--mesh`` says: ``fsdp=2``, or ``fsdp`` for all devices.

        Raises:
            ConfigError: for anything else, or more devices than there are.
        """
        name, _, count = text.partition("=")
        devices = jax.devices()
        if name != "fsdp" or (count and not count.isdecimal()):
            raise ConfigError(f"--mesh is {text!r}; give fsdp, or fsdp=N for N devices")
        size = int(count) if count else len(devices)
        if not 1 <= size <= len(devices):
            raise ConfigError(f"--mesh asks for {size} devices; there are {len(devices)}")
        if size == 1:
            return cls.single()
        auto = (jax.sharding.AxisType.Auto,)
        return cls(jax.make_mesh((size,), ("fsdp",), devices=devices[:size], axis_types=auto))

    @property
    def num_shards(self) -> int:
        """Parts that a batch is cut into."""
        return 1 if self.mesh is None else self.mesh.size

    @property
    def replicated(self) -> NamedSharding | None:
        """How arrays lie of which every device has all; None on one device."""
        return None if self.mesh is None else NamedSharding(self.mesh, PartitionSpec())

    def put(self, tree: Any, axes: Any) -> Any:
        """Spread arrays by their logical axes: ``axes`` has a tuple of names in place of each array."""
        if self.mesh is None:
            return tree
        return jax.tree.map(self._put, tree, axes)

    def put_params(self, params: Any) -> Any:
        """Spread weights in any layout, each by the axes of its name."""
        return self.put(params, logical_axes(params))

    def put_replicated(self, tree: Any) -> Any:
        """Let every device have all of it."""
        sharding = self.replicated
        return tree if sharding is None else jax.device_put(tree, sharding)

    def put_rows(self, batch: Any) -> Any:
        """Spread a batch's rows."""
        if self.mesh is None:
            return batch
        return jax.device_put(batch, NamedSharding(self.mesh, PartitionSpec(*TABLE["batch"])))

    def _put(self, leaf: Any, axes: tuple[str, ...]) -> jax.Array:
        assert self.mesh is not None
        return jax.device_put(leaf, NamedSharding(self.mesh, spec(self.mesh, leaf.shape, axes)))
