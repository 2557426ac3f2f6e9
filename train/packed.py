"""Edits of some layers in few arrays: a program takes each of its arguments at a price of its own."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

Floats = tuple[jax.Array, ...]
"""What is differentiated of the edits of some layers: all but the columns of masks."""

Vectors = tuple[jax.Array, ...]
"""The same end to end, one vector for each dtype."""


def floats_of(layers: Sequence[Any]) -> Floats:
    """Return what is differentiated of the edits of some layers."""
    return tuple(leaf for leaf in jax.tree.leaves(tuple(layers)) if jnp.issubdtype(leaf.dtype, jnp.floating))


@dataclasses.dataclass(frozen=True)
class _Recipe:
    """How edits are made of vectors and of what is not in them: structure, shapes and dtypes of all leaves."""

    tree: Any
    leaves: tuple[tuple[tuple[int, ...], Any], ...]

    @property
    def floats(self) -> list[tuple[tuple[int, ...], Any]]:
        """Shapes and dtypes of what is in the vectors."""
        return [(shape, dtype) for shape, dtype in self.leaves if jnp.issubdtype(dtype, jnp.floating)]

    @property
    def dtypes(self) -> list[Any]:
        """Of the vectors, in their order."""
        return list(dict.fromkeys(dtype for _, dtype in self.floats))


@jax.tree_util.register_pytree_node_class
class Packed:
    """Edits of some layers: one vector for each dtype, and what is not differentiated as it is.

        packed = Packed.of(layers)
        floats = packed.floats(packed.vectors)
        layers = packed.edits(floats)

    Attributes:
        vectors: what is differentiated.
    """

    def __init__(self, vectors: Vectors, rest: tuple[Any, ...], recipe: _Recipe):
        self.vectors, self._rest, self._recipe = vectors, rest, recipe

    @classmethod
    def of(cls, layers: Sequence[Any]) -> "Packed":
        """Return the edits of layers packed."""
        leaves, tree = jax.tree.flatten(tuple(layers))
        recipe = _Recipe(tree, tuple((leaf.shape, jnp.dtype(leaf.dtype)) for leaf in leaves))
        rest = tuple(leaf for leaf in leaves if not jnp.issubdtype(leaf.dtype, jnp.floating))
        return cls(cls._vectors(floats_of(layers), recipe), rest, recipe)

    @staticmethod
    def _vectors(floats: Floats, recipe: _Recipe) -> Vectors:
        own = [[x for x, (_, of) in zip(floats, recipe.floats, strict=True) if of == dtype] for dtype in recipe.dtypes]
        return tuple(jnp.concatenate([x.reshape(-1) for x in some]) for some in own)

    def pack(self, floats: Floats) -> Vectors:
        """Return values for all floats, gradients for instance, as vectors; each in a dtype of its own."""
        return self._vectors(floats, self._recipe)

    def floats(self, vectors: Vectors) -> Floats:
        """Return vectors cut to floats."""
        at, found = dict.fromkeys(self._recipe.dtypes, 0), []
        for shape, dtype in self._recipe.floats:
            start, size = at[dtype], int(np.prod(shape))
            vector = vectors[self._recipe.dtypes.index(dtype)]
            found.append(vector[start : start + size].reshape(shape))
            at[dtype] += size
        return tuple(found)

    def edits(self, floats: Floats) -> tuple[Any, ...]:
        """Return the edits of each layer with these floats."""
        inside, rest = iter(floats), iter(self._rest)
        return self._recipe.tree.unflatten(
            [next(inside) if jnp.issubdtype(dtype, jnp.floating) else next(rest) for _, dtype in self._recipe.leaves]
        )

    def tree_flatten(self) -> tuple[tuple[Any, ...], _Recipe]:
        """Return the vectors and the rest, and the recipe."""
        return (self.vectors, self._rest), self._recipe

    @classmethod
    def tree_unflatten(cls, recipe: _Recipe, children: Any) -> "Packed":
        """Return it again."""
        vectors, rest = children
        return cls(vectors, rest, recipe)
