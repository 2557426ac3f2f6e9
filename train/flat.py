"""A tree of arrays in few: a program takes each array among its arguments and results at a price of its own."""

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

Floats = tuple[Any, ...]
"""The leaves of a tree that are differentiated: all but integers, such as columns of masks."""

Vectors = tuple[Any, ...]
"""The same end to end, one vector for each dtype."""


def floats_of(tree: Any) -> Floats:
    """Return what is differentiated of a tree."""
    return tuple(leaf for leaf in jax.tree.leaves(tree) if _is_float(leaf.dtype))


def _is_float(dtype: Any) -> bool:
    return jnp.issubdtype(dtype, jnp.floating)


class _Recipe:
    """How a tree is made of vectors and of what is not in them. Two of the same arguments are one object.

    Attributes:
        tree: its structure.
        leaves: shape and dtype of each leaf, without axes that lead all of them.
        dtypes: of the vectors, in their order.
        places: of each float, its vector, where it begins there and where it ends.
        order: of each vector, which floats it holds, by number.
        num_last: of each vector, the numbers of the floats that stand last.
    """

    def __init__(self, tree: Any, leaves: tuple[tuple[tuple[int, ...], Any], ...], last: tuple[bool, ...]):
        self.tree, self.leaves = tree, leaves
        floats = [(shape, dtype, end) for (shape, dtype), end in zip(leaves, last, strict=True) if _is_float(dtype)]
        self.shapes = [shape for shape, _, _ in floats]
        self.dtypes = list(dict.fromkeys(dtype for _, dtype, _ in floats))
        self.places = [(0, 0, 0)] * len(floats)
        self.order: list[list[int]] = []
        self.num_last: list[int] = []
        for n, own in enumerate(self.dtypes):
            order = sorted((i for i, (_, dtype, _) in enumerate(floats) if dtype == own), key=lambda i: floats[i][2])
            sizes = [int(np.prod(self.shapes[i])) for i in order]
            for i, (start, end) in zip(order, itertools.pairwise(itertools.accumulate(sizes, initial=0)), strict=True):
                self.places[i] = n, start, end
            self.order.append(order)
            self.num_last.append(sum(size for i, size in zip(order, sizes, strict=True) if floats[i][2]))


_recipe = functools.cache(_Recipe)


@jax.tree_util.register_pytree_node_class
class Flat:
    """A tree's flat form: its floats in one vector for each dtype, in which those that ``last`` chose stand last.

        flat = Flat.of(tree)
        floats = flat.floats(flat.vectors)
        tree = flat.unflatten(floats)

    Attributes:
        vectors: of the floats; axes that lead all leaves lead them.
    """

    def __init__(self, vectors: Vectors, rest: tuple[Any, ...], recipe: _Recipe):
        self.vectors, self._rest, self._recipe = vectors, rest, recipe

    @classmethod
    def of(cls, tree: Any, axes: int = 0, last: Callable[[tuple[Any, ...]], bool] = lambda path: False) -> "Flat":
        """Return the flat form of a tree whose leaves have so many leading axes in common.

        Leaves of NumPy are joined by NumPy, and of shapes there are shapes. ``last`` is asked for each leaf's path.
        """
        paths, leaves = zip(*jax.tree_util.tree_leaves_with_path(tree), strict=True)
        kinds = tuple((tuple(leaf.shape[axes:]), jnp.dtype(leaf.dtype)) for leaf in leaves)
        recipe = _recipe(jax.tree.structure(tree), kinds, tuple(map(last, paths)))
        rest = tuple(leaf for leaf in leaves if not _is_float(leaf.dtype))
        return cls(cls._vectors(floats_of(tree), recipe, axes), rest, recipe)

    @staticmethod
    def _vectors(floats: Floats, recipe: _Recipe, axes: int) -> Vectors:
        return tuple(_end_to_end([floats[i] for i in order], axes) for order in recipe.order)

    def join(self, floats: Floats, axes: int = 0) -> Vectors:
        """Return values for all floats, gradients for instance, as vectors."""
        return self._vectors(floats, self._recipe, axes)

    def floats(self, vectors: Vectors) -> Floats:
        """Return vectors cut to floats."""
        return tuple(
            vectors[n][..., start:end].reshape(*vectors[n].shape[:-1], *shape)
            for (n, start, end), shape in zip(self._recipe.places, self._recipe.shapes, strict=True)
        )

    def unflatten(self, floats: Floats) -> Any:
        """Return the tree with these floats."""
        inside, rest = iter(floats), iter(self._rest)
        leaves = [next(inside) if _is_float(dtype) else next(rest) for _, dtype in self._recipe.leaves]
        return self._recipe.tree.unflatten(leaves)

    @property
    def tree(self) -> Any:
        """The tree again."""
        return self.unflatten(self.floats(self.vectors))

    def scaled_last(self, factor: Any) -> "Flat":
        """Return it with what stands last times a factor."""
        vectors = [
            jnp.where(jnp.arange(x.shape[-1]) < x.shape[-1] - count, x, x * factor) if count else x
            for x, count in zip(self.vectors, self._recipe.num_last, strict=True)
        ]
        return Flat(tuple(vectors), self._rest, self._recipe)

    def tree_flatten(self) -> tuple[tuple[Any, ...], _Recipe]:
        """Return the vectors and the rest, and the recipe."""
        return (self.vectors, self._rest), self._recipe

    @classmethod
    def tree_unflatten(cls, recipe: _Recipe, children: Any) -> "Flat":
        """Return it again."""
        vectors, rest = children
        return cls(vectors, rest, recipe)


def flat_params(params: Any, axes: int = 0) -> Flat:
    """Return an adapter's parameters, or what is of their shapes, flat: one vector, in which LoRA's B stands last."""
    return Flat.of(params, axes, lambda path: path[-1] == jax.tree_util.DictKey("lora_b"))


def trees_of(params: Sequence[Any]) -> tuple[Any, ...]:
    """Return groups' parameters as trees: each array is a part of a vector, so they are taken apart once."""
    return tuple(own.tree if isinstance(own, Flat) else own for own in params)


def flat_like(params: Sequence[Any], trees: Sequence[Any]) -> tuple[Any, ...]:
    """Return gradients of groups' trees flat, where ``params`` are."""
    return tuple(
        flat_params(tree, axes=1) if isinstance(own, Flat) else tree for own, tree in zip(params, trees, strict=True)
    )


def _end_to_end(arrays: Sequence[Any], axes: int) -> Any:
    """Join arrays that have so many leading axes in common, flattened behind those."""
    lead, sizes = arrays[0].shape[:axes], [int(np.prod(x.shape[axes:])) for x in arrays]
    if isinstance(arrays[0], jax.ShapeDtypeStruct):
        return jax.ShapeDtypeStruct((*lead, sum(sizes)), arrays[0].dtype)
    join = np.concatenate if all(isinstance(x, np.ndarray) for x in arrays) else jnp.concatenate
    return join([x.reshape(*lead, size) for x, size in zip(arrays, sizes, strict=True)], axis=axes)
