"""How an engine's arrays lie on the devices of its model, and how its programs run over them.

On one device both are what JAX does by itself. Over several, a program runs inside ``jax.shard_map``: every device runs
it on its own parts, so kernels see arrays as on one device.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import NamedSharding, PartitionSpec

from preft_jax.config import ModelConfig
from preft_jax.device.mesh import Placement
from preft_jax.models.shard import shard_config

WHOLE = PartitionSpec()
"""How a result lies of which every device has all."""


class Spread:
    """The devices of a model.

    Args:
        placement: of the model.
        config: the model's.

    Attributes:
        config: what each device has of the model; on one device, the model's.

    Raises:
        ConfigError: the model cannot be cut so.
    """

    def __init__(self, placement: Placement, config: ModelConfig):
        self.placement = placement
        self.config = shard_config(config, placement.tensor)

    @property
    def num_devices(self) -> int:
        """Devices that the model is cut over."""
        return self.placement.tensor

    def put(self, tree: Any) -> Any:
        """Let every device have all of some arrays of the host."""
        return jax.device_put(tree, self.placement.replicated)

    def make(self, make: Callable[[ModelConfig], Any], axes: Any = None) -> Callable[[], Any]:
        """Return a function that makes arrays on the devices, each its own part: ``make`` takes a device's config.

        ``axes`` has the logical axes in place of each array; None: every device makes all of them.
        """
        mesh = self.placement.mesh
        if mesh is None:
            return lambda: make(self.config)
        # Parts are equal, or ``shard_config`` would have refused.
        shapes = jax.eval_shape(lambda: make(self.config))
        out = jax.tree.map(lambda leaf, own: self._spec(leaf, own), shapes, axes) if axes is not None else WHOLE
        mapped = jax.shard_map(lambda: make(self.config), mesh=mesh, in_specs=(), out_specs=out, check_vma=False)
        return jax.jit(mapped, out_shardings=_shardings(self.placement, out))

    def _spec(self, part: Any, axes: tuple[str, ...]) -> PartitionSpec:
        """Return how an array is cut of which this is a part."""
        shape = tuple(size * self.num_devices for size in part.shape)
        sharding = self.placement.sharding(shape, axes)
        return WHOLE if sharding is None else sharding.spec

    def trace(
        self, function: Callable[..., Any], args: tuple[Any, ...], *, out: Any, donate: tuple[int, ...] = ()
    ) -> Any:
        """Trace a program.

        Args:
            function: of ``args``; over several devices, of a device's parts.
            args: arrays as they lie, or of the host.
            out: in place of each result an array that lies as it does, or ``WHOLE``.
            donate: numbers of arguments whose memory may be used for results.
        """
        mesh = self.placement.mesh
        if mesh is None:
            return jax.jit(function, donate_argnums=donate).trace(*args)
        ins, outs = tuple(map(_specs, args)), _specs(out)
        mapped = jax.shard_map(function, mesh=mesh, in_specs=ins, out_specs=outs, check_vma=False)
        lies = {name: _shardings(self.placement, specs) for name, specs in (("in", ins), ("out", outs))}
        jitted = jax.jit(mapped, donate_argnums=donate, in_shardings=lies["in"], out_shardings=lies["out"])
        return jitted.trace(*args)


def _specs(tree: Any) -> Any:
    """Return how arrays lie; those of the host are for every device."""

    def one(leaf: Any) -> PartitionSpec:
        if isinstance(leaf, PartitionSpec):
            return leaf
        sharding = getattr(leaf, "sharding", None)
        return sharding.spec if isinstance(sharding, NamedSharding) else WHOLE

    return jax.tree.map(one, tree)


def _shardings(placement: Placement, specs: Any) -> Any:
    assert placement.mesh is not None
    mesh = placement.mesh
    return jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs)


def bytes_of(tree: Any) -> int:
    """Return the bytes that arrays take of each device."""
    leaves = jax.tree.leaves(tree)
    return sum(leaf.dtype.itemsize * math.prod(leaf.sharding.shard_shape(leaf.shape)) for leaf in leaves)
