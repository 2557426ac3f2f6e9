"""Many small arrays as one, so that they go to a device in one transfer.

    packed = pack({"tokens": tokens, "mask": mask})  # On the host: one flat int32 array.
    jax.jit(lambda packed: packed.unpack()["mask"])(packed)  # In a program: the arrays, cut out of it.

A GPU's queue has an entry for each transfer, and another for the program's wait for it.
"""

import dataclasses
import functools
import math
from typing import Any, NamedTuple

import jax
import numpy as np

from kernels.types import Array
from preft_jax.errors import ShapeError

DTYPES = ("int32", "uint32", "float32", "bool")
"""Of arrays that can be packed: those of 32 bits keep their bits, bool becomes 0 and 1."""


class Layout(NamedTuple):
    """What a flat array holds, hashable: the tree, and the shape and dtype of each of its arrays in order."""

    tree: Any
    shapes: tuple[tuple[int, ...], ...]
    dtypes: tuple[str, ...]


@functools.lru_cache(maxsize=256)
def _kept(layout: Layout) -> tuple[Layout, tuple[int, ...]]:
    """Return one object for all equal layouts, which compare quickly, and the number of elements of each array."""
    for shape, dtype in zip(layout.shapes, layout.dtypes, strict=True):
        if dtype not in DTYPES:
            raise ShapeError(f"an array of shape {list(shape)} has dtype {dtype}; allowed: {', '.join(DTYPES)}")
    return layout, tuple(map(math.prod, layout.shapes))


@functools.partial(jax.tree_util.register_dataclass, data_fields=["flat"], meta_fields=["layout"])
@dataclasses.dataclass(frozen=True)
class Packed:
    """A tree of arrays as one array.

    A pytree with one leaf. The layout is part of its structure: a compiled program takes no other.

    Attributes:
        flat: int32, one-dimensional.
        layout: static.
    """

    flat: Array
    layout: Layout

    def unpack(self) -> Any:
        """Return the tree, each array cut out of ``flat``; for use inside a program."""
        _, sizes = _kept(self.layout)
        arrays, at = [], 0
        for shape, dtype, size in zip(self.layout.shapes, self.layout.dtypes, sizes, strict=True):
            own = jax.lax.slice(self.flat, (at,), (at + size,)).reshape(shape)
            arrays.append(own != 0 if dtype == "bool" else jax.lax.bitcast_convert_type(own, np.dtype(dtype)))
            at += size
        return jax.tree.unflatten(self.layout.tree, arrays)


def pack(tree: Any) -> Packed:
    """Copy the NumPy arrays of a tree into one.

    Raises:
        ShapeError: if one has a dtype that is not among ``DTYPES``.
    """
    leaves, treedef = jax.tree.flatten(tree)
    arrays = [np.asarray(leaf) for leaf in leaves]
    layout = Layout(treedef, tuple(x.shape for x in arrays), tuple(x.dtype.name for x in arrays))
    layout, sizes = _kept(layout)
    flat = np.empty(sum(sizes), np.int32)
    at = 0
    for array, size in zip(arrays, sizes, strict=True):
        flat[at : at + size] = (array if array.dtype == np.bool_ else array.view(np.int32)).reshape(-1)
        at += size
    return Packed(flat, layout)
