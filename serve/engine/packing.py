"""How many tokens a prefill call takes, and where chunks go in it."""

from collections.abc import Sequence

WELL_FILLED = 0.75
"""Part of a program's tokens that must be real for it to be taken rather than a smaller one, filled."""


READS_WEIGHTS = 512
"""Tokens of a prefill call below which an accelerator takes as long as it reads the weights: fewer save nothing."""


def round_up(count: int, tile: int) -> int:
    """Return the tokens of the whole tiles that hold so many."""
    return -(-count // tile) * tile


def worth_filling(sizes: Sequence[int], least: int) -> list[int]:
    """Return those of the programs' tokens, ascending, that are worth filling: ``least`` or more, and the largest."""
    return [size for size in sizes[:-1] if size >= least] + list(sizes[-1:])


def call_size(tokens: int, sizes: Sequence[int]) -> int:
    """Return how many of the tokens that could go with a call it takes.

    A call costs what its program costs, padding included: if the smallest program that takes all would be filled
    badly, the largest one that they fill is taken, and the rest waits for the next call.

    Args:
        tokens: of all chunks that could go, gaps between them included.
        sizes: tokens of the programs, ascending.
    """
    enough = next((size for size in sizes if size >= tokens), sizes[-1])
    filled = [size for size in sizes if size <= tokens]
    return enough if tokens >= WELL_FILLED * enough or not filled else filled[-1]


class Packing:
    """Where chunks go in a prefill batch: one after the other, but no tile lists more rank pages than it may."""

    def __init__(self, budget: int, tile: int, max_entries: int):
        self._budget = budget
        self._tile = tile
        self._max_entries = max_entries
        self._end = 0
        self._entries = 0

    def place(self, wanted: int, entries: int) -> tuple[int, int]:
        """Return where the next chunk begins and how many of the wanted tokens fit there; it is then taken."""
        at = self._end
        if at % self._tile == 0 or self._entries + entries > self._max_entries:
            at, held = -(-at // self._tile) * self._tile, 0
        else:
            held = self._entries
        count = min(wanted, self._budget - at)
        if count > 0:
            self._end = at + count
            same_tile = at // self._tile == (self._end - 1) // self._tile
            self._entries = entries + (held if same_tile else 0)
        return at, count
