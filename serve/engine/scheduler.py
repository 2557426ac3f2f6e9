"""Decides what the device does next: one call of prefill chunks, or one call of decode steps. Plain Python, no JAX.

Prompts are prefilled in chunks within a token budget. While a prompt waits, each prefill call is followed by one decode
step, so that running sequences go on; else decoding takes several steps a call. A sequence that finds no room for its
next KV page preempts the one that would be served last, which is computed again later.

A call may be planned while the one before it is under way (``ahead``), as far as that does not depend on what it draws,
and while prompts fill whole prefill calls a further one behind both (``full_prefill``).
"""

import bisect
import dataclasses
import itertools
from collections.abc import Iterable, Iterator
from collections.abc import Sequence as Many
from typing import Protocol

from serve.engine.packing import Packing, call_size
from serve.engine.pages import PageManager
from serve.engine.sequence import Sequence, Status


class AdapterSlots(Protocol):
    """What the scheduler knows of adapters: whether one can be on the device for the next prefill."""

    def acquire(self, digest: str) -> bool:
        """Keep an adapter on the device until it is released; False if that cannot be now."""
        ...

    def release(self, digest: str) -> None:
        """Give up one ``acquire``."""
        ...


@dataclasses.dataclass(frozen=True, slots=True)
class Chunk:
    """Tokens ``start`` to ``end`` of a sequence, at position ``at`` of a prefill batch."""

    sequence: Sequence
    start: int
    end: int
    at: int

    @property
    def last(self) -> bool:
        """Whether it ends the prompt (with what was generated before a preemption): a token is then drawn."""
        return self.end == len(self.sequence.tokens)


@dataclasses.dataclass(frozen=True, slots=True)
class Prefill:
    """A prefill call."""

    chunks: list[Chunk]

    @property
    def sequences(self) -> list[Sequence]:
        """Whose chunks they are."""
        return [chunk.sequence for chunk in self.chunks]

    @property
    def num_tokens(self) -> int:
        """Tokens of the batch, gaps between chunks included."""
        last = self.chunks[-1]
        return last.at + last.end - last.start


@dataclasses.dataclass(frozen=True, slots=True)
class Decode:
    """A decode call of ``steps`` steps.

    ``drawing``: of a call that was planned ahead, tokens that the call before it, of the same sequences, may draw for
    each that goes on.
    """

    sequences: list[Sequence]
    steps: int
    drawing: dict[Sequence, int] | None = None

    def most(self, sequence: Sequence) -> int:
        """Return how many tokens it may draw for a sequence, once the call before it is over."""
        return min(self.steps, sequence.remaining)


class _Waiting:
    """Sequences in the order in which they are served; those of one rank as they came."""

    def __init__(self) -> None:
        self._items: list[tuple[tuple[int, int], int, Sequence]] = []
        self._pushed = 0

    def __len__(self) -> int:
        return len(self._items)

    def __iter__(self) -> Iterator[Sequence]:
        return (sequence for _, _, sequence in self._items)

    def add(self, sequence: Sequence) -> None:
        self._pushed += 1
        sequence.ticket = self._pushed
        bisect.insort(self._items, (sequence.rank, self._pushed, sequence))

    def remove(self, sequence: Sequence) -> None:
        del self._items[bisect.bisect_left(self._items, (sequence.rank, sequence.ticket))]


PATIENCE = 8
"""Calls in which others with adapters may overtake a sequence whose adapter finds no room on the device."""

_LOOK_PAST = 64
"""Sequences whose adapters find no room, behind which a call looks for those without adapters only."""


class Scheduler:
    """Owns the queues and every sequence's KV pages and claim on its adapter."""

    def __init__(
        self,
        pages: PageManager,
        adapters: AdapterSlots,
        *,
        max_num_seqs: int,
        prefill_tokens: int,
        prefill_seqs: int,
        chunk_tokens: int,
        tile: int,
        tile_entries: int,
        decode_steps: int,
        goes_ahead: bool = False,
        prefill_sizes: Many[int] = (),
    ):
        self.pages = pages
        self._adapters = adapters
        self._max_num_seqs = max_num_seqs
        self._prefill_tokens = prefill_tokens
        # Tokens of the programs that are worth filling, ascending: a call costs what its program does.
        self._prefill_sizes = prefill_sizes or (prefill_tokens,)
        self._prefill_seqs = prefill_seqs
        self._chunk_tokens = chunk_tokens
        self._tile = tile
        self._tile_entries = tile_entries
        # A prompt that comes waits for the calls that were started: two have as many steps together as one alone.
        self._quiet_steps = max(1, decode_steps // 2) if goes_ahead else decode_steps
        self._waiting = _Waiting()
        # Ordered sets.
        self._prefilling: dict[Sequence, None] = {}
        self._running: dict[Sequence, None] = {}
        # Sequences that keep an adapter on the device.
        self._holders = 0
        self._decode_is_next = False
        # Whether those that wait found no room, of pages or in the bank, when they were last looked at.
        self._refused = False
        self.preemptions = 0
        self.prefix_hit_tokens = 0

    @property
    def num_waiting(self) -> int:
        """Sequences without KV pages."""
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        """Sequences with KV pages."""
        return len(self._prefilling) + len(self._running)

    def add(self, sequence: Sequence) -> None:
        """Put a sequence into the queue."""
        sequence.status = Status.WAITING
        self._waiting.add(sequence)

    def schedule(self) -> Prefill | Decode | None:
        """Return the next call, with KV pages allotted for it, or None if there is nothing to do."""
        decode_first = self._decode_is_next and bool(self._running)
        self._decode_is_next = False
        plans = (self._plan_decode, self._plan_prefill) if decode_first else (self._plan_prefill, self._plan_decode)
        # Decoding may preempt all that it would run: a prompt can then go on.
        plan = plans[0]() or plans[1]() or plans[0]()
        self._decode_is_next = isinstance(plan, Prefill)
        return plan

    def ahead(self, under_way: Prefill | Decode) -> Prefill | Decode | None:
        """Return a call to start behind the one under way, before anybody knows what that draws; None: wait for it.

        Behind prefill that is one step for those who decode already, if more is to be prefilled after it; behind decode
        it is prefill or, if no prompt waits, more steps of the same rows: ``Decode.drawing`` tells how many tokens each
        may draw before. Nobody is preempted for it.
        """
        plan: Prefill | Decode | None = None
        if isinstance(under_way, Prefill):
            ends = {chunk.sequence for chunk in under_way.chunks if chunk.last}
            more = any(sequence not in ends for sequence in self._prefilling) or self._may_admit()
            # Samples that fork from a prompt run already; the token that they begin with is being drawn.
            rows = [sequence for sequence in self._running if sequence.computed < len(sequence.tokens)]
            if more and rows:
                plan = self._decode(rows, 1)
        else:
            plan = self._plan_prefill() or self._further(under_way)
        if plan is not None:
            self._decode_is_next = isinstance(plan, Prefill)
        return plan

    def full_prefill(self) -> Prefill | None:
        """Return a prefill call to go behind prefill that is under way, and a step after it, if it is a full one.

        Nothing that is under way changes what would be in it: prompts that wait fill it, pages and adapters have room
        beside what is under way. A call that is not full is planned as late as possible, for prompts that may come.
        """
        plan = self._plan_prefill() if self._is_filled() else None
        if plan is not None:
            self._decode_is_next = True
        return plan

    def _is_filled(self) -> bool:
        """Whether the prompts of the queue fill a prefill call, and there is room for all of them.

        Their adapters, which are needed next in any case, are given places in the bank on the way.
        """
        tokens, count, new, pages = 0, 0, 0, 0
        adapters: list[str] = []
        for sequence in itertools.chain(self._prefilling, self._waiting):
            wanted = min(len(sequence.tokens) - sequence.started, self._chunk_tokens)
            if wanted <= 0:
                continue
            tokens, count = tokens + wanted, count + 1
            if sequence.status is Status.WAITING:
                new += 1
                pages += -(-len(sequence.tokens) // self.pages.page_size)
                adapters += [] if sequence.adapter is None else [sequence.adapter]
            if tokens >= self._prefill_tokens or count == self._prefill_seqs:
                break
        else:
            return False
        running = self.num_running + new
        spare = min(running, self.pages.num_pages // 16)
        if running > self._max_num_seqs or pages + spare > self.pages.num_available:
            return False
        taken = list(itertools.takewhile(self._adapters.acquire, adapters))
        for digest in taken:
            self._adapters.release(digest)
        return len(taken) == len(adapters)

    def _further(self, under_way: Decode) -> Decode | None:
        """Return more steps of the same rows, if they are all that is to be done, and half of them go on at least.

        While somebody waits for room, all of them: one that ends makes room.
        """
        rows = under_way.sequences
        alive = [sequence for sequence in rows if sequence.status is Status.RUNNING]
        if self._prefilling or self._may_admit() or len(alive) < len(self._running):
            return None
        drawing = {s: under_way.most(s) for s in alive if s.remaining > under_way.most(s)}
        if not drawing or (len(drawing) < len(rows) if self._waiting else 2 * len(drawing) < len(rows)):
            return None
        return self._decode(rows, self._steps(s.remaining - drawn for s, drawn in drawing.items()), drawing)

    def computed(self, chunk: Chunk) -> None:
        """Note that a chunk's KV is in the cache; a sequence that ends with it decodes from now on."""
        sequence = chunk.sequence
        if sequence.status is not Status.PREFILLING:
            return
        sequence.computed = chunk.end
        self._register(sequence)
        if chunk.last:
            del self._prefilling[sequence]
            self._running[sequence] = None
            sequence.status = Status.RUNNING
            if not sequence.all_token:
                self._release_adapter(sequence)

    def append(self, sequence: Sequence, tokens: list[int]) -> None:
        """Add drawn tokens to a running sequence; the KV of all but the newest is in the cache."""
        sequence.tokens += tokens
        sequence.computed = len(sequence.tokens) - 1
        self._register(sequence)

    def fork(self, leader: Sequence) -> list[tuple[Sequence, tuple[int, int] | None]]:
        """Let the other samples of a prompt that is being prefilled to its end share its pages, as many as have room.

        Returns:
            The forked sequences, each with the page that must be copied for it, ``(from, to)``, or None. The others
            are put into the queue on their own.
        """
        forked = []
        size = self.pages.page_size
        for sequence in leader.followers:
            if sequence.status is not Status.FORKING:
                continue
            partial = len(sequence.tokens) % size > 0
            room = self.num_running < self._max_num_seqs and self.pages.num_available >= partial
            if room and sequence.all_token:
                room = sequence.adapter is None or self._take_adapter(sequence)
            if not room:
                self.add(sequence)
                continue
            shared = leader.pages[: len(sequence.tokens) // size]
            self.pages.acquire(shared)
            own = self.pages.allocate(int(partial))
            sequence.pages = [*shared, *own]
            sequence.computed = len(sequence.tokens)
            sequence.registered = len(shared)
            sequence.status = Status.RUNNING
            self._running[sequence] = None
            forked.append((sequence, (leader.pages[len(shared)], own[0]) if partial else None))
        leader.followers = []
        return forked

    def finish(self, sequence: Sequence, *, keep: bool = True) -> None:
        """Take a sequence out, wherever it is, and free what it holds; its KV may serve later requests if ``keep``."""
        if not keep:
            self.pages.unregister(sequence.pages)
        if sequence.status is Status.WAITING:
            self._waiting.remove(sequence)
        self._prefilling.pop(sequence, None)
        self._running.pop(sequence, None)
        sequence.status = Status.FINISHED
        self._free(sequence)
        followers, sequence.followers = sequence.followers, []
        for follower in followers:
            if follower.status is Status.FORKING:
                self.add(follower)

    def reset(self) -> None:
        """Note that the KV cache and the adapters on the device are lost: everything is computed again."""
        self.pages.forget()
        lost = [*self._prefilling, *self._running]
        self._prefilling, self._running, self._holders = {}, {}, 0
        for sequence in lost:
            sequence.pages, sequence.registered, sequence.holds_adapter = [], 0, False
            sequence.computed = sequence.started = 0
            self.add(sequence)

    def next_adapters(self, calls: int = 1) -> list[str]:
        """Return the adapters of the sequences that would be prefilled next, as many as so many calls take."""
        upcoming = itertools.islice(self._waiting, calls * self._prefill_seqs)
        return list(dict.fromkeys(s.adapter for s in upcoming if s.adapter is not None))

    # Prefill

    def _plan_prefill(self) -> Prefill | None:
        chunks: list[Chunk] = []
        packing = Packing(self._prefill_tokens, self._tile, self._tile_entries)
        room = all(self._take_chunk(sequence, chunks, packing) for sequence in self._prefilling)
        admitted: list[Sequence] = []
        refused: list[Sequence] = []
        looked = False
        for sequence in self._waiting if room else ():
            looked = True
            if chunks and chunks[0].sequence.cohort != sequence.cohort:
                continue
            if sequence.adapter is not None and len(refused) == _LOOK_PAST:
                continue
            if sequence.adapter is not None and (self._is_reserved(refused) or not self._take_adapter(sequence)):
                refused.append(sequence)
                continue
            if not self._admit(sequence):
                self._release_adapter(sequence)
                break
            admitted.append(sequence)
            if not self._take_chunk(sequence, chunks, packing):
                break
        for sequence in admitted:
            self._waiting.remove(sequence)
            sequence.overtaken = 0
        if refused and any(s.adapter is not None and s.rank > refused[0].rank for s in admitted):
            refused[0].overtaken += 1
        self._refused = looked and not chunks
        return Prefill(self._trimmed(chunks)) if chunks else None

    def _trimmed(self, chunks: list[Chunk]) -> list[Chunk]:
        """Return what the call takes of chunks: no program that they would leave half empty; the rest goes first later.

        Scores have the largest program alone.
        """
        if any(chunk.sequence.score for chunk in chunks):
            return chunks
        size, kept = call_size(Prefill(chunks).num_tokens, self._prefill_sizes), []
        for chunk in chunks:
            end = min(chunk.end, chunk.start + max(0, size - chunk.at))
            chunk.sequence.started = end
            if end > chunk.start:
                kept.append(dataclasses.replace(chunk, end=end))
        return kept

    def _is_reserved(self, refused: Many[Sequence]) -> bool:
        """Whether what others give back is kept for the first one that was refused: it was overtaken often enough.

        Once nobody keeps an adapter on the device, there is nothing to wait for.
        """
        return bool(refused) and refused[0].overtaken >= PATIENCE and self._holders > 0

    def _take_chunk(self, sequence: Sequence, chunks: list[Chunk], packing: Packing) -> bool:
        """Add a sequence's next chunk, if it may be computed with the others; False if the batch is full."""
        if chunks and chunks[0].sequence.cohort != sequence.cohort:
            return True
        wanted = min(len(sequence.tokens) - sequence.started, self._chunk_tokens)
        if not wanted:
            return True  # A call under way ends its prompt.
        at, count = packing.place(wanted, sequence.entries)
        if count > 0:
            chunks.append(Chunk(sequence, sequence.started, sequence.started + count, at))
            sequence.started += count
        return count == wanted and len(chunks) < self._prefill_seqs

    def _admit(self, sequence: Sequence) -> bool:
        """Allot KV pages for all of a sequence's tokens, cached ones where there are any."""
        if self.num_running >= self._max_num_seqs:
            return False
        # At least the last token is computed: its logits are needed, and its edit.
        found = [] if sequence.score else self.pages.match(sequence.page_keys(len(sequence.tokens) - 1))
        self.pages.acquire(found)
        missing = -(-len(sequence.tokens) // self.pages.page_size) - len(found)
        spare = min(self.num_running, self.pages.num_pages // 16)
        if missing + spare > self.pages.num_available:
            self.pages.release(found)
            return False
        sequence.pages = [*found, *self.pages.allocate(missing)]
        sequence.computed = sequence.started = len(found) * self.pages.page_size
        sequence.registered = len(found)
        self.prefix_hit_tokens += sequence.computed
        sequence.status = Status.PREFILLING
        self._prefilling[sequence] = None
        return True

    def _take_adapter(self, sequence: Sequence) -> bool:
        if not sequence.holds_adapter and sequence.adapter is not None:
            sequence.holds_adapter = self._adapters.acquire(sequence.adapter)
            self._holders += sequence.holds_adapter
        return sequence.holds_adapter

    def _release_adapter(self, sequence: Sequence) -> None:
        if sequence.holds_adapter and sequence.adapter is not None:
            sequence.holds_adapter = False
            self._holders -= 1
            self._adapters.release(sequence.adapter)

    # Decode

    def _plan_decode(self) -> Decode | None:
        while self._running:
            cohort = next((s.cohort for s in self._running if s.cohort is not None), None)
            rows = [s for s in self._running if s.cohort == cohort]
            for steps in dict.fromkeys((self._steps(s.remaining for s in rows), 1)):
                plan = self._decode(rows, steps)
                if plan is not None:
                    return plan
            self._preempt(max([*self._prefilling, *self._running], key=lambda s: s.rank))
        return None

    def _steps(self, remaining: Iterable[int]) -> int:
        """Return the steps of a call whose rows may draw so many tokens; somebody who waits is let in when one ends."""
        if self._prefilling or self._may_admit():
            return 1
        return min(self._quiet_steps, *remaining) if self._waiting else self._quiet_steps

    def _decode(self, rows: list[Sequence], steps: int, drawing: dict[Sequence, int] | None = None) -> Decode | None:
        """Return up to so many steps, with KV pages allotted for them; None if there is no room.

        ``drawing``: see ``Decode``; only its sequences take part.
        """
        before = dict.fromkeys(rows, 0) if drawing is None else drawing
        steps = min(steps, max(sequence.remaining - drawn for sequence, drawn in before.items()))
        missing = {}
        for sequence, drawn in before.items():
            tokens = len(sequence.tokens) - 1 + min(drawn + steps, sequence.remaining)
            missing[sequence] = max(0, -(-tokens // self.pages.page_size) - len(sequence.pages))
        if sum(missing.values()) > self.pages.num_available:
            return None
        for sequence, count in missing.items():
            if count:
                sequence.pages += self.pages.allocate(count)
        return Decode(rows, steps, drawing)

    def _may_admit(self) -> bool:
        """Whether a prompt waits that may find room at the next call."""
        return bool(self._waiting) and not self._refused and self.num_running < self._max_num_seqs

    def _preempt(self, sequence: Sequence) -> None:
        self._prefilling.pop(sequence, None)
        self._running.pop(sequence, None)
        self._free(sequence)
        self.preemptions += 1
        self.add(sequence)

    # KV pages

    def _register(self, sequence: Sequence) -> None:
        """Let others find the pages that became full."""
        if sequence.computed // self.pages.page_size > sequence.registered:
            for at, key in enumerate(sequence.page_keys(sequence.computed)):
                if at >= sequence.registered:
                    self.pages.register(sequence.pages[at], key)
            sequence.registered = sequence.computed // self.pages.page_size

    def _free(self, sequence: Sequence) -> None:
        self.pages.release(sequence.pages)
        sequence.pages, sequence.computed, sequence.started, sequence.registered = [], 0, 0, 0
        self._release_adapter(sequence)
