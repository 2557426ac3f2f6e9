"""Who goes first: by priority, then by arrival; and nobody is overtaken for ever. Plain Python, no JAX."""

import bisect
from collections.abc import Iterator
from collections.abc import Sequence as Many

from serve.engine.sequence import Sequence

PATIENCE = 8
"""Calls in which others with adapters may overtake a sequence whose adapter finds no room on the device."""

LOOK_PAST = 64
"""Sequences whose adapters find no room, behind which a call looks for those without adapters only."""


class Waiting:
    """Sequences in the order in which they are served; those of one rank as they came."""

    def __init__(self) -> None:
        self._items: list[tuple[tuple[int, int], int, Sequence]] = []
        self._pushed = 0

    def __len__(self) -> int:
        return len(self._items)

    def __iter__(self) -> Iterator[Sequence]:
        return (sequence for _, _, sequence in self._items)

    def add(self, sequence: Sequence) -> None:
        """Put a sequence into the queue."""
        self._pushed += 1
        sequence.ticket = self._pushed
        bisect.insort(self._items, (sequence.rank, self._pushed, sequence))

    def remove(self, sequence: Sequence) -> None:
        """Take a sequence out."""
        del self._items[bisect.bisect_left(self._items, (sequence.rank, sequence.ticket))]


class Refusals:
    """The sequences that one plan passed over because their adapters find no room on the device."""

    def __init__(self) -> None:
        self._refused: list[Sequence] = []

    def passes_over(self, sequence: Sequence) -> bool:
        """Whether a sequence with an adapter is not even looked at: too many before it found no room."""
        return sequence.adapter is not None and len(self._refused) == LOOK_PAST

    def reserves(self, holders: int) -> bool:
        """Whether room is kept for the first one refused: it was overtaken often enough, and others hold the room."""
        return bool(self._refused) and self._refused[0].overtaken >= PATIENCE and holders > 0

    def add(self, sequence: Sequence) -> None:
        """Note that a sequence's adapter found no room."""
        self._refused.append(sequence)

    def settle(self, admitted: Many[Sequence]) -> None:
        """Count that the first one refused was overtaken, if those admitted came after it and have adapters."""
        for sequence in admitted:
            sequence.overtaken = 0
        first = self._refused[0] if self._refused else None
        if first and any(s.adapter is not None and s.rank > first.rank for s in admitted):
            first.overtaken += 1
