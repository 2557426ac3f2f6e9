"""Whose turn it is among jobs that wait."""

import itertools
from collections import Counter
from collections.abc import Iterable

from serve.jobs import JobRecord


class Turns:
    """Chooses among waiting jobs: the highest priority, then the owner with the fewest running jobs.

    Of owners with as many, it is the one whose last turn is longest ago; of an owner's jobs, the oldest one.
    """

    def __init__(self) -> None:
        self._count = itertools.count(1)
        self._last: dict[str | None, int] = {}

    def choose(self, waiting: Iterable[JobRecord], running: Iterable[JobRecord] = ()) -> JobRecord | None:
        """Return the job whose turn it is, or None if none waits."""
        held = Counter(record.owner for record in running)
        return min(
            waiting,
            default=None,
            key=lambda record: (
                -record.spec.priority, held[record.owner], self._last.get(record.owner, 0), record.id,
            ),
        )  # fmt: skip

    def took(self, record: JobRecord) -> None:
        """Note that a job had its owner's turn."""
        self._last[record.owner] = next(self._count)
