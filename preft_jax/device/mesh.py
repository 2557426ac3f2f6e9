"""Where arrays lie on several devices: one table from the axes' names to the mesh.

A training mesh has one axis, ``fsdp``: every device has a part of each weight and of each batch (Zhao et al., arXiv
2304.11277), and the compiler gathers a layer's weights where they are used.
"""

import dataclasses
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from preft_jax.errors import ConfigError

AXES = {"batch": "fsdp", "model": "fsdp", "other": None}
"""From a logical axis to an axis of the mesh; None: every device has all of it."""


def spec(*logical: str) -> PartitionSpec:
    """Return the partition of an array by its logical axes."""
    return PartitionSpec(*(AXES[name] for name in logical))


@dataclasses.dataclass(frozen=True)
class Placement:
    """A mesh and how training uses it; ``mesh`` None is one device."""

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

    def put_params(self, params: Any) -> Any:
        """Spread weights: each by the last of its axes that divides evenly, norms and biases whole."""
        if self.mesh is None:
            return params

        def one(leaf: jax.Array) -> jax.Array:
            even = [axis for axis, size in enumerate(leaf.shape) if size % self.num_shards == 0]
            logical = ["other"] * leaf.ndim
            if leaf.ndim > 1 and even:
                logical[even[-1]] = "model"
            return self._put(leaf, spec(*logical))

        return jax.tree.map(one, params)

    def put_replicated(self, tree: Any) -> Any:
        """Let every device have all of it."""
        return tree if self.mesh is None else jax.tree.map(lambda leaf: self._put(leaf, spec()), tree)

    def put_rows(self, batch: Any) -> Any:
        """Spread a batch's rows."""
        return batch if self.mesh is None else jax.tree.map(lambda leaf: self._put(leaf, spec("batch")), batch)

    def _put(self, leaf: Any, partition: PartitionSpec) -> jax.Array:
        assert self.mesh is not None
        return jax.device_put(leaf, NamedSharding(self.mesh, partition))
