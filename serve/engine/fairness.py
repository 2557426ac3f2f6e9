"""Who goes first: by priority, in turns between tenants, by arrival; and nobody is overtaken for ever. No JAX."""

import bisect
import heapq
from collections.abc import Iterator
from collections.abc import Sequence as Many

from serve.engine.sequence import Sequence

PATIENCE = 8
"""Calls in which others with adapters may overtake a sequence whose adapter finds no room on the device."""

LOOK_PAST = 64
"""Sequences whose adapters find no room, behind which a call looks for those without adapters only."""


class Waiting:
    """Sequences in the order in which they are served: by priority, then in turns between tenants.

    Of one tenant: by priority, then by arrival, those of one rank as they came. Of several: who was served least goes
    first, counted in sequences. A tenant that had nothing to wait for gets no credit for that.
    """

    def __init__(self) -> None:
        self._queues: dict[str | None, list[tuple[tuple[int, int], int, Sequence]]] = {}
        self._served: dict[str | None, int] = {}
        self._now = 0
        self._pushed = 0

    def __len__(self) -> int:
        return sum(map(len, self._queues.values()))

    def __iter__(self) -> Iterator[Sequence]:
        if len(self._queues) == 1:
            (queue,) = self._queues.values()
            yield from (sequence for _, _, sequence in queue)
            return
        heads = []
        for number, (tenant, queue) in enumerate(self._queues.items()):
            (priority, order), ticket, _ = queue[0]
            heads.append((priority, self._served[tenant], order, ticket, number, 0, queue))
        heapq.heapify(heads)
        while heads:
            _, served, _, _, number, at, queue = heads[0]
            yield queue[at][2]
            if at + 1 < len(queue):
                (priority, order), ticket, _ = queue[at + 1]
                heapq.heapreplace(heads, (priority, served + 1, order, ticket, number, at + 1, queue))
            else:
                heapq.heappop(heads)

    def add(self, sequence: Sequence) -> None:
        """Put a sequence into the queue."""
        self._pushed += 1
        sequence.ticket = self._pushed
        tenant = sequence.tenant
        if tenant not in self._queues:
            self._queues[tenant] = []
            self._served = {one: n for one, n in self._served.items() if n > self._now or one in self._queues}
            self._served[tenant] = self._served_of(tenant)
        bisect.insort(self._queues[tenant], (sequence.rank, self._pushed, sequence))

    def remove(self, sequence: Sequence) -> None:
        """Take a sequence out."""
        queue = self._queues[sequence.tenant]
        del queue[bisect.bisect_left(queue, (sequence.rank, sequence.ticket))]
        if not queue:
            del self._queues[sequence.tenant]

    def serve(self, sequence: Sequence) -> None:
        """Count that a sequence was let in, from the queue or beside the first sample of its prompt."""
        served = self._served_of(sequence.tenant)
        self._now, self._served[sequence.tenant] = max(self._now, served), served + 1

    def others_before(self, sequence: Sequence) -> int:
        """Return how many other tenants wait whose turn is before a sequence that is not in the queue."""
        turn = sequence.priority, self._served_of(sequence.tenant)
        others = (tenant for tenant in self._queues if tenant != sequence.tenant)
        return sum((self._queues[tenant][0][0][0], self._served[tenant]) < turn for tenant in others)

    def _served_of(self, tenant: str | None) -> int:
        return max(self._served.get(tenant, 0), self._now)


class Refusals:
    """The sequences that one plan passed over because their adapters find no room on the device."""

    def __init__(self) -> None:
        self._refused: list[Sequence] = []
        self._admitted_before = 0

    def passes_over(self, sequence: Sequence) -> bool:
        """Whether a sequence with an adapter is not even looked at: too many before it found no room."""
        return sequence.adapter is not None and len(self._refused) == LOOK_PAST

    def reserves(self, holders: int) -> bool:
        """Whether room is kept for the first one refused: it was overtaken often enough, and others hold the room."""
        return bool(self._refused) and self._refused[0].overtaken >= PATIENCE and holders > 0

    def add(self, sequence: Sequence, admitted: Many[Sequence]) -> None:
        """Note that a sequence's adapter found no room, after others were admitted."""
        if not self._refused:
            self._admitted_before = len(admitted)
        self._refused.append(sequence)

    def settle(self, admitted: Many[Sequence]) -> None:
        """Count that the first one refused was overtaken, if those admitted came after it and have adapters."""
        for sequence in admitted:
            sequence.overtaken = 0
        first = self._refused[0] if self._refused else None
        if first and any(s.adapter is not None for s in admitted[self._admitted_before :]):
            first.overtaken += 1
