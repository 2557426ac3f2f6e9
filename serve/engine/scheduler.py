"""Decides what the device does next, and owns every sequence's place: KV pages, slot, adapter. Plain Python, no JAX.

Prompts are prefilled in chunks within a token budget. While a prompt waits, each prefill call is followed by one decode
step, so that running sequences go on; else decoding takes several steps a call. A sequence that finds no room for its
next KV page preempts the one that would be served last, which is computed again later.

A step may be planned while the one before it is under way: ``serve/engine/lookahead.py``. A plan counts what calls
under way compute (``Sequence.started``) and may draw (``Sequence.drawing``), and is whole when it is returned: starting
it changes nothing here.
"""

import collections
import dataclasses
import functools
import itertools
from collections.abc import Collection, Iterable
from collections.abc import Sequence as Many

from serve.engine.expected import Expected
from serve.engine.fairness import Refusals, Waiting
from serve.engine.packing import Packing, call_size, round_up
from serve.engine.pages import PageManager
from serve.engine.plan import Chunk, Fork, Import, Row, Step
from serve.engine.sequence import Sequence, Status
from serve.engine.slots import AdapterSlots


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
        mixed_sizes: Many[int] = (),
    ):
        self.pages = pages
        self._adapters = adapters
        self.expected = Expected(pages)
        self._max_num_seqs = max_num_seqs
        self._prefill_tokens = prefill_tokens
        # Tokens of the programs that are worth filling, ascending: a call costs what its program does.
        self._prefill_sizes = prefill_sizes or (prefill_tokens,)
        # Those of the programs in which rows decode beside chunks, rows counted; none: they have calls of their own.
        self._mixed_sizes = mixed_sizes
        self._prefill_seqs = prefill_seqs
        self._chunk_tokens = chunk_tokens
        self._tile = tile
        self._tile_entries = tile_entries
        # A prompt that comes waits for the calls that were started: two have as many steps together as one alone.
        self._quiet_steps = max(1, decode_steps // 2) if goes_ahead else decode_steps
        self._waiting = Waiting()
        # Ordered sets.
        self._prefilling: dict[Sequence, None] = {}
        self._running: dict[Sequence, None] = {}
        self._slots = list(range(max_num_seqs - 1, -1, -1))
        # Sequences that keep an adapter on the device.
        self._holders = 0
        self._decode_is_next = False
        # Whether a sequence may have a cohort: a device call failed.
        self._suspects = False
        # Whether those that wait found no room, of pages or in the bank, when they were last looked at.
        self._refused = False
        # KV that the next step with chunks writes first.
        self._imports: list[Import] = []
        # Whether the last plan of chunks left prompts to a later call, beside which their adapters are copied.
        self.has_deferred = False
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

    @property
    def waiting(self) -> Iterable[Sequence]:
        """Sequences in the queue, in the order in which they are served."""
        return self._waiting

    @property
    def prefilling(self) -> Collection[Sequence]:
        """Sequences of whose prompts tokens are left that no step under way computes."""
        return self._prefilling.keys()

    @property
    def running(self) -> Collection[Sequence]:
        """Sequences that decode, and those whose prompts end with a step under way."""
        return self._running.keys()

    def add(self, sequence: Sequence) -> None:
        """Put a sequence into the queue."""
        sequence.status = Status.WAITING
        self._waiting.add(sequence)

    def schedule(self, *, single: bool = False) -> Step | None:
        """Return the next step while nothing is under way, or None if there is nothing to do.

        ``single``: a decode call takes one step though nobody waits.
        """
        if self.mixes and (step := self.plan_mixed()):
            return step
        decode_first = self._decode_is_next and bool(self._running)
        self._decode_is_next = False
        decode = functools.partial(self._plan_decode, 1 if single else self._quiet_steps)
        plans = (decode, self.plan_prefill) if decode_first else (self.plan_prefill, decode)
        # Decoding may preempt all that it would run: a prompt can then go on.
        step = plans[0]() or plans[1]() or plans[0]()
        self.take_turns(step)
        return step

    def take_turns(self, step: Step | None) -> None:
        """Note what was planned last: prefill and decode take turns."""
        self._decode_is_next = step is not None and bool(step.chunks)

    def computed(self, step: Step) -> None:
        """Note that a step is over: the KV of its chunks is in the cache, and what it may have drawn is drawn."""
        for row in step.rows:
            row.sequence.drawing -= row.draws
        for fork in step.forks:
            fork.sequence.drawing -= 1
        for chunk in step.chunks:
            sequence = chunk.sequence
            sequence.drawing -= chunk.samples
            if sequence.status in (Status.PREFILLING, Status.RUNNING):
                sequence.computed = chunk.end
                self._register(sequence)
                if chunk.samples:
                    self.expected.remove(sequence)
                if chunk.samples and not sequence.all_token:
                    self._release_adapter(sequence)

    def append(self, sequence: Sequence, tokens: list[int]) -> None:
        """Add drawn tokens to a running sequence; the KV of all but the newest is in the cache."""
        sequence.tokens += tokens
        sequence.computed = len(sequence.tokens) - 1
        self._register(sequence)

    def _end_prompts(self, chunks: Iterable[Chunk]) -> list[Fork]:
        """Let sequences whose prompts end with these chunks run from now on, and the other samples of their prompts.

        Samples without room are put into the queue on their own.
        """
        forks: list[Fork] = []
        for sequence in (chunk.sequence for chunk in chunks if chunk.samples):
            del self._prefilling[sequence]
            self._run(sequence)
            followers, sequence.followers = sequence.followers, []
            for follower in followers:
                if follower.status is Status.FORKING:
                    forks += self._fork(sequence, follower)
        return forks

    def _run(self, sequence: Sequence) -> None:
        self._running[sequence] = None
        sequence.status = Status.RUNNING
        sequence.drawing = 1

    def _fork(self, leader: Sequence, sequence: Sequence) -> list[Fork]:
        """Let a sample share the pages of its prompt, if there is room for it."""
        size = self.pages.page_size
        partial = len(sequence.tokens) % size > 0
        running = self.num_running + self._waiting.others_before(sequence)
        room = running < self._max_num_seqs and self.pages.num_available >= partial
        if room and sequence.all_token:
            room = sequence.adapter is None or self._take_adapter(sequence)
        if not room:
            self.add(sequence)
            return []
        shared = leader.pages[: len(sequence.tokens) // size]
        self.pages.acquire(shared)
        own = self.pages.allocate(int(partial))
        sequence.pages = [*shared, *own]
        sequence.slot = self._slots.pop()
        sequence.computed = sequence.started = len(sequence.tokens)
        sequence.registered = len(shared)
        self._waiting.serve(sequence)
        self._run(sequence)
        return [Fork(leader, sequence, (leader.pages[len(shared)], own[0]) if partial else None)]

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
        self.expected.clear()
        self._suspects = True
        lost = [*self._prefilling, *self._running]
        self._prefilling, self._running, self._holders, self._imports = {}, {}, 0, []
        for sequence in lost:
            sequence.pages, sequence.registered, sequence.holds_adapter = [], 0, False
            sequence.computed = sequence.started = sequence.drawing = 0
            self._give_slot_back(sequence)
            self.add(sequence)

    def next_adapters(self, calls: int = 1) -> list[str]:
        """Return the adapters of the sequences that would be prefilled next, as many as so many calls take."""
        upcoming = itertools.islice(self._waiting, calls * self._prefill_seqs)
        return list(dict.fromkeys(s.adapter for s in upcoming if s.adapter is not None))

    # Prefill

    @property
    def mixes(self) -> bool:
        """Whether sequences that decode take part in steps with chunks now.

        Not while a sequence whose call failed runs apart from others, nor where rows leave chunks no room.
        """
        if self._suspects:
            everybody = itertools.chain(self._prefilling, self._running, self._waiting)
            self._suspects = any(sequence.cohort is not None for sequence in everybody)
        beside = round_up(len(self._running), self._tile)
        return bool(self._mixed_sizes) and not self._suspects and beside < self._mixed_sizes[-1]

    def stop_mixing(self) -> None:
        """Give prompts and decode steps calls of their own from now on."""
        self._mixed_sizes = ()

    def plan_mixed(self, *, defers: bool = False) -> Step | None:
        """Return a step of chunks in which all take part who decode; None if nobody does, or no prompt finds room.

        ``defers``: see ``plan_prefill``.
        """
        rows = [sequence for sequence in self._running if sequence.undrawn > 0]
        waits = self._prefilling or (self._waiting and self.num_running < self._max_num_seqs)
        if not rows or not waits or sum(self._missing_pages(rows, 1).values()) > self.pages.num_available:
            return None
        beside = round_up(len(rows), self._tile)
        sizes = [size - beside for size in self._mixed_sizes if size > beside]
        step = self.plan_prefill(sizes, rows[0], defers=defers)
        decoding = self.plan_rows(rows, 1) if step is not None else None
        return step if step is None or decoding is None else dataclasses.replace(step, rows=decoding.rows)

    def plan_prefill(
        self, sizes: Many[int] = (), beside: Sequence | None = None, *, defers: bool = False
    ) -> Step | None:
        """Return a step of chunks, or None if no prompt waits that finds room.

        Args:
            sizes: tokens of the programs that may run it, ascending; by default those that only prefill.
            beside: a sequence that decodes in the same step.
            defers: whether a prompt is left to the next step, once, if its adapter is not even on its way.
        """
        chunks: list[Chunk] = []
        packing = Packing(sizes[-1] if sizes else self._prefill_tokens, self._tile, self._tile_entries)

        def together(sequence: Sequence) -> bool:
            mate = chunks[0].sequence if chunks else beside
            return mate is None or mate.cohort == sequence.cohort

        room = all(self._take_chunk(s, chunks, packing) for s in self._prefilling if together(s))
        admitted: list[Sequence] = []
        refusals = Refusals()
        looked = False
        deferred: list[Sequence] = []
        for sequence in self._waiting if room else ():
            if self.expected.holds_up(sequence):
                continue
            if defers and self._is_to_come(sequence):
                sequence.deferred = True
                deferred.append(sequence)
                continue
            looked = True
            if not together(sequence) or refusals.passes_over(sequence):
                continue
            wants = sequence.adapter is not None
            if wants and (refusals.reserves(self._holders) or not self._take_adapter(sequence)):
                refusals.add(sequence, admitted)
                continue
            if not self._admit(sequence, deferred):
                self._release_adapter(sequence)
                break
            admitted.append(sequence)
            if not self._take_chunk(sequence, chunks, packing):
                break
        for sequence in admitted:
            self._waiting.remove(sequence)
            self._waiting.serve(sequence)
        refusals.settle(admitted)
        self.has_deferred = bool(deferred)
        self._refused = looked and not chunks and not deferred
        chunks = self._trimmed(chunks, sizes or self._prefill_sizes) if chunks else []
        imports, self._imports = self._imports, []
        return Step(chunks, forks=self._end_prompts(chunks), imports=imports) if chunks else None

    def chunk_of(self, sequence: Sequence) -> int:
        """Return the prompt tokens of a sequence that a step would take, if there is room."""
        return min(len(sequence.tokens) - max(sequence.started, sequence.given, sequence.prefix), self._chunk_tokens)

    def fills(self, tokens: int, count: int) -> bool:
        """Whether so many tokens of so many sequences fill a prefill step."""
        return tokens >= self._prefill_tokens or count == self._prefill_seqs

    def has_room_for(self, new: Many[Sequence]) -> bool:
        """Whether sequences of the queue find pages, rows and places for their adapters, all of them."""
        pages = sum(-(-len(sequence.tokens) // self.pages.page_size) for sequence in new)
        running = self.num_running + len(new)
        spare = min(running, self.pages.num_pages // 16)
        if running > self._max_num_seqs or pages + spare > self.pages.num_available:
            return False
        adapters = [sequence.adapter for sequence in new if sequence.adapter is not None]
        taken = list(itertools.takewhile(self._adapters.acquire, adapters))
        for digest in taken:
            self._adapters.release(digest)
        return len(taken) == len(adapters)

    def _trimmed(self, chunks: list[Chunk], sizes: Many[int]) -> list[Chunk]:
        """Return what the call takes of chunks: no program that they would leave half empty; the rest goes first later.

        Scores have the largest program alone.
        """
        if any(chunk.sequence.score for chunk in chunks):
            return chunks
        size, kept = call_size(Step(chunks).num_tokens, sizes), []
        for chunk in chunks:
            end = min(chunk.end, chunk.start + max(0, size - chunk.at))
            chunk.sequence.started = end
            if end > chunk.start:
                kept.append(dataclasses.replace(chunk, end=end, samples=end == len(chunk.sequence.tokens)))
        return kept

    def _take_chunk(self, sequence: Sequence, chunks: list[Chunk], packing: Packing) -> bool:
        """Add a sequence's next chunk; False if the batch is full."""
        wanted = self.chunk_of(sequence)
        at, count = packing.place(wanted, sequence.entries)
        if count > 0:
            end = sequence.started + count
            chunks.append(Chunk(sequence, sequence.started, end, at, end == len(sequence.tokens)))
            sequence.started = end
        return count == wanted and len(chunks) < self._prefill_seqs

    def _is_to_come(self, sequence: Sequence) -> bool:
        """Whether a prompt that may find room has an adapter that is not even on its way, and was not deferred yet."""
        if sequence.adapter is None or sequence.deferred or self.num_running >= self._max_num_seqs:
            return False
        return not self._adapters.is_near(sequence.adapter)

    def _admit(self, sequence: Sequence, before: Many[Sequence] = ()) -> bool:
        """Allot KV pages for all of a sequence's tokens, cached ones where there are any.

        Room is left for those that are admitted later though they come ``before`` it.
        """
        if self.num_running + len(before) >= self._max_num_seqs:
            return False
        # At least the last token is computed: its logits are needed, and its edit.
        found = [] if sequence.score else self.pages.match(sequence.page_keys(len(sequence.tokens) - 1))
        self.pages.acquire(found)
        missing = -(-len(sequence.tokens) // self.pages.page_size) - len(found)
        spare = min(self.num_running, self.pages.num_pages // 16)
        spare += sum(-(-len(other.tokens) // self.pages.page_size) for other in before)
        if missing + spare > self.pages.num_available:
            self.pages.release(found)
            return False
        sequence.pages = [*found, *self.pages.allocate(missing)]
        sequence.computed = len(found) * self.pages.page_size
        sequence.started = max(sequence.computed, sequence.prefix)
        sequence.registered = len(found)
        sequence.slot = self._slots.pop()
        self.prefix_hit_tokens += sequence.computed
        self._import(sequence)
        self.expected.add(sequence)
        sequence.status = Status.PREFILLING
        self._prefilling[sequence] = None
        return True

    def _import(self, sequence: Sequence) -> None:
        """Let the next step write the KV of a prompt that another engine computed, as far as it is not cached."""
        if sequence.computed < sequence.given:
            self._imports.append(Import(sequence, sequence.computed))
            sequence.computed = sequence.started = sequence.given
            self._register(sequence)

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

    def _plan_decode(self, most: int) -> Step | None:
        while self._running:
            cohort = next((s.cohort for s in self._running if s.cohort is not None), None)
            rows = [s for s in self._running if s.cohort == cohort]
            for repeats in dict.fromkeys((min(most, self.repeats_for(s.undrawn for s in rows)), 1)):
                step = self.plan_rows(rows, repeats)
                if step is not None:
                    return step
            self._preempt(self._last())
        return None

    def _last(self) -> Sequence:
        """Return the sequence that gives up its room: of the lowest priority, the tenant with most, the newest."""
        holders = [*self._prefilling, *self._running]
        held = collections.Counter(sequence.tenant for sequence in holders)
        return max(holders, key=lambda s: (s.priority, held[s.tenant], s.order))

    def repeats_for(self, undrawn: Iterable[int]) -> int:
        """Return the repeats of a step whose rows may draw so many tokens; who waits is let in when one ends."""
        if self._prefilling or self.may_admit():
            return 1
        return min(self._quiet_steps, *undrawn) if self._waiting else self._quiet_steps

    def plan_rows(self, sequences: Iterable[Sequence], repeats: int) -> Step | None:
        """Return a step of the rows that may draw more, with KV pages allotted for it; None if there is no room."""
        going = [sequence for sequence in sequences if sequence.undrawn > 0]
        if not going:
            return None
        repeats = min(repeats, max(sequence.undrawn for sequence in going))
        missing = self._missing_pages(going, repeats)
        if sum(missing.values()) > self.pages.num_available:
            return None
        for sequence, count in missing.items():
            sequence.pages += self.pages.allocate(count)
        rows = [Row(sequence, min(repeats, sequence.undrawn)) for sequence in going]
        for row in rows:
            row.sequence.drawing += row.draws
        return Step(rows=rows, repeats=repeats)

    def _missing_pages(self, rows: Iterable[Sequence], repeats: int) -> dict[Sequence, int]:
        """Return how many KV pages each row lacks for so many decode steps."""
        missing = {}
        for sequence in rows:
            tokens = len(sequence.tokens) - 1 + sequence.drawing + min(repeats, sequence.undrawn)
            missing[sequence] = max(0, -(-tokens // self.pages.page_size) - len(sequence.pages))
        return missing

    def may_admit(self) -> bool:
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
        self.expected.remove(sequence)
        sequence.pages, sequence.computed, sequence.started, sequence.registered = [], 0, 0, 0
        self._give_slot_back(sequence)
        self._release_adapter(sequence)

    def _give_slot_back(self, sequence: Sequence) -> None:
        if sequence.slot >= 0:
            self._slots.append(sequence.slot)
            sequence.slot = -1
