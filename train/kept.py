"""What a forward unit keeps of its differentiation, for a backward unit that is another program."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax


@dataclasses.dataclass(frozen=True, eq=False)
class _Recipe:
    """How a pullback is made of what a forward unit kept and of what its backward unit has anyway.

    ``places`` says of each leaf of ``tree`` which of the latter it is; None: it was kept.
    """

    tree: Any
    places: tuple[int | None, ...]


@jax.tree_util.register_pytree_node_class
class Kept:
    """What a forward unit keeps for its backward unit."""

    def __init__(self, leaves: Sequence[jax.Array], recipe: _Recipe):
        self._leaves, self._recipe = leaves, recipe

    @classmethod
    def of(cls, pull: Callable[..., Any], had: Any) -> "Kept":
        """Return what a pullback holds besides what a backward unit has anyway."""
        leaves, tree = jax.tree.flatten(pull)
        known = {id(leaf): place for place, leaf in enumerate(jax.tree.leaves(had))}
        places = tuple(known.get(id(leaf)) for leaf in leaves)
        kept = [leaf for leaf, place in zip(leaves, places, strict=True) if place is None]
        return cls(kept, _Recipe(tree, places))

    def pullback(self, had: Any) -> Callable[..., Any]:
        """Return the pullback again, where ``had`` has the structure it had in the forward unit."""
        kept, known = iter(self._leaves), jax.tree.leaves(had)
        leaves = [next(kept) if place is None else known[place] for place in self._recipe.places]
        return self._recipe.tree.unflatten(leaves)

    def tree_flatten(self) -> tuple[tuple[Any, ...], _Recipe]:
        """Return the arrays, and the recipe, which says with which program they were made."""
        return tuple(self._leaves), self._recipe

    @classmethod
    def tree_unflatten(cls, recipe: _Recipe, leaves: Sequence[Any]) -> "Kept":
        """Return it again."""
        return cls(leaves, recipe)
