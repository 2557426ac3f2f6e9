"""Where arrays lie on several devices: one table from logical axes to axes of the mesh, asked by all.

Weights name their axes in ``models/params.py``, KV pages in ``models/cache.py``, rank pages in ``adapters/bank.py``. A
mesh has one axis:

- ``fsdp``, for training: every device has a part of each weight and of each batch (Zhao et al., arXiv 2304.11277), and
  the compiler gathers a layer's weights where they are used.
- ``tensor``, for serving: every device has some heads and channels of each layer (``models/shard.py``), their weights,
  KV and parts of adapters, and computes with these alone.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from preft_jax.errors import ConfigError
from preft_jax.models.linear import logical_axes

TENSOR = "tensor"
"""The axis of a mesh that cuts a model."""

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
    "layers": (),
    "rank": (),
    "slab": ("tensor",),
}
"""From a logical axis to the axes of a mesh that may cut it, the first that there is; none: every device has all of it.

A mesh axis cuts one axis of an array, and only where the parts are equal.
"""


_AXES = {
    "tp": (TENSOR, "which cuts the model for serving"),
    "fsdp": ("fsdp", "which cuts weights and batches for training"),
    "dp": ("data", "copies of the model: start one server for each"),
}
"""From an axis of ``--mesh`` to that of the mesh, and what it is for."""


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
    def parse(cls, text: str | None, *, cuts: str = "fsdp") -> "Placement":
        """Return what ``--mesh`` says: ``fsdp=2`` or ``tp=2``, or the name alone for all devices; None: one device.

        Args:
            text: sizes of axes, with commas; those of an axis that a program does not have may be 1.
            cuts: the axis that the program has: ``fsdp`` (training) or ``tp`` (serving).

        Raises:
            ConfigError: for anything else, or more devices than there are.
        """
        if text is None:
            return cls.single()
        devices, size, names = jax.devices(), 1, list[str]()
        for part in text.split(","):
            name, equals, count = part.strip().partition("=")
            names.append(name)
            if name in names[:-1]:
                raise ConfigError(f"--mesh is {text!r}, which has {name} twice; give it once")
            if name not in _AXES or (equals and not count.isdecimal()):
                raise ConfigError(f"--mesh is {text!r}; give {cuts}, or {cuts}=N for N devices")
            asked = int(count) if equals else len(devices)
            if name == cuts:
                size = asked
            elif asked != 1:
                raise ConfigError(
                    f"--mesh is {text!r}, and this program does not run over {name}, {_AXES[name][1]}; give {cuts}=N"
                )
        if not 1 <= size <= len(devices):
            raise ConfigError(f"--mesh asks for {size} devices; there are {len(devices)}")
        if size == 1:
            return cls.single()
        auto = (jax.sharding.AxisType.Auto,)
        return cls(jax.make_mesh((size,), (_AXES[cuts][0],), devices=devices[:size], axis_types=auto))

    @property
    def num_devices(self) -> int:
        """Devices of the mesh."""
        return 1 if self.mesh is None else self.mesh.size

    @property
    def num_shards(self) -> int:
        """Parts that a batch is cut into."""
        return 1 if self.cuts_model else self.num_devices

    @property
    def cuts_model(self) -> bool:
        """Whether each device computes with its part of the model, rather than with its part of a batch."""
        return self.mesh is not None and TENSOR in self.mesh.axis_names

    @property
    def tensor(self) -> int:
        """Parts that a model is cut into."""
        return self.num_devices if self.cuts_model else 1

    @property
    def replicated(self) -> NamedSharding | None:
        """How arrays lie of which every device has all; None on one device."""
        return None if self.mesh is None else NamedSharding(self.mesh, PartitionSpec())

    def sharding(
        self, shape: tuple[int, ...], axes: tuple[str, ...], memory: str | None = None
    ) -> NamedSharding | None:
        """Return how an array of a shape and logical axes lies, in a kind of memory; None on one device."""
        if self.mesh is None:
            return None
        return NamedSharding(self.mesh, spec(self.mesh, shape, axes), memory_kind=memory)

    def put(self, tree: Any, axes: Any) -> Any:
        """Spread arrays by their logical axes: ``axes`` has a tuple of names in place of each array."""
        if self.mesh is None:
            return tree
        return jax.tree.map(self._put, tree, axes)

    def place(self, array: np.ndarray, axes: tuple[str, ...]) -> jax.Array:
        """Send an array of the host to the default device, or to each device its part."""
        return jnp.asarray(array) if self.mesh is None else self._put(array, axes)

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
        return jax.device_put(leaf, self.sharding(leaf.shape, axes))


SINGLE = Placement.single()
"""The default device alone."""
