"""A scheduler and a fake device that keeps, for each place in the KV cache, what its content depends on: a wrong page
or slot shows.
"""

import collections
import dataclasses

import numpy as np

from serve.engine import lookahead
from serve.engine.pages import PageManager
from serve.engine.plan import Step
from serve.engine.prefix import PageKeys, adapter_salt, cache_salt
from serve.engine.recovery import Recovery
from serve.engine.scheduler import Scheduler
from serve.engine.sequence import Sequence, Status

PAGE = 4
SIZES = {
    "max_num_seqs": 4, "prefill_tokens": 32, "prefill_seqs": 3, "chunk_tokens": 12, "tile": 8, "tile_entries": 3,
    "decode_steps": 4,
}  # fmt: skip
ENTRIES = {"a": 1, "b": 2, "c": 3, "everywhere": 1}
"""Rank pages on a tile's list of each adapter; the last one is an all-token adapter."""


class Bank:
    """Room for ``room`` adapters on the device; those in ``broken`` never come."""

    def __init__(self, room=2):
        self.room = room
        self.broken = set()
        self.held = collections.Counter()

    def acquire(self, digest):
        if digest in self.broken or (not self.held[digest] and len(+self.held) >= self.room):
            return False
        self.held[digest] += 1
        return True

    def is_near(self, digest):
        return True

    def release(self, digest):
        assert self.held[digest] > 0, f"{digest} is released more often than acquired"
        self.held[digest] -= 1


@dataclasses.dataclass
class Place:
    """What the device has in a slot: the tokens that were drawn up to now, and how many are still to be drawn."""

    tokens: list[int]
    remaining: int


@dataclasses.dataclass
class Call:
    """A call that the fake device has done; the host does not know yet what it drew."""

    step: Step
    drawn: dict[Sequence, list[int]] = dataclasses.field(default_factory=dict)


class World:
    """A scheduler and a fake device; what ``Engine`` does with a step, without outputs.

    The device does a call as soon as it is started, so that calls are done in the order in which they were started; the
    host learns of it when the call is committed.
    """

    def __init__(self, num_pages=40, room=2, bank=None, **sizes):
        self.sizes = {**SIZES, **sizes}
        self.bank = bank or Bank(room)
        self.pages = PageManager(num_pages, PAGE)
        self.scheduler = Scheduler(self.pages, self.bank, **self.sizes)
        self.recovery = Recovery()
        self.kv = {}
        self.slots = {}
        self.calls = collections.deque()
        self.live = []
        # Who waited when the scheduler was last looked at.
        self.queue = []
        self.order = 0

    def add(
        self,
        length=8,
        *,
        adapter=None,
        max_tokens=4,
        n=1,
        priority=0,
        seed=None,
        score=False,
        tokens=None,
        stop_ids=(),
        tenant=None,
        edits_from=0,
    ):
        seed = 1000 + self.order if seed is None else seed
        tokens = np.random.default_rng(seed).integers(0, 9, length).tolist() if tokens is None else tokens
        length = len(tokens)
        mask = np.zeros((length + max_tokens, 2), bool)
        mask[edits_from : length if adapter else 0, 0] = True
        mask[:, 0] |= adapter == "everywhere"
        salt = cache_salt(base="base", kv_dtype="float32")
        edits = None if adapter is None else adapter_salt(digest=adapter, fold_version=1, adapter_dtype="float32")
        group = [
            Sequence(
                request_id=self.order, index=i, tenant=tenant, order=self.order, priority=priority, tokens=list(tokens),
                prompt_len=length, mask=mask, max_tokens=max_tokens, stop_ids=frozenset(stop_ids), adapter=adapter,
                entries=ENTRIES.get(adapter, 0), all_token=adapter == "everywhere", keys=PageKeys(salt, PAGE, edits),
                score=score and not i, status=Status.FORKING if i else Status.NEW,
            )
            for i in range(n)
        ]  # fmt: skip
        group[0].followers = group[1:]
        self.order += 1
        self.live += group
        self.scheduler.add(group[0])
        return group[0] if n == 1 else group

    # The device.

    def content(self, s, position, tokens=None):
        return s.adapter if s.mask[: position + 1].any() else None, tuple(
            (s.tokens if tokens is None else tokens)[: position + 1]
        )

    def at(self, s, position):
        return s.pages[position // PAGE], position % PAGE

    def check_kv(self, s, end, tokens=None):
        for position in range(end):
            found, expected = self.kv.get(self.at(s, position)), self.content(s, position, tokens)
            assert found == expected, f"{s} at {position}"

    def write(self, s, position, tokens):
        self.kv[self.at(s, position)] = self.content(s, position, tokens)

    def start(self, step):
        """Begin a call, behind those under way; returns what it draws a token for."""
        assert step.chunks or step.rows
        assert len({s.cohort for s in step.sequences}) == 1, "sequences of a failed call run apart from others"
        assert len({*step.sequences}) == len(step.chunks) + len(step.rows), "a sequence is in it twice"
        parts = {*step.sequences, *step.sampled}
        assert len({s.slot for s in parts}) == len(parts), "a slot is two sequences'"
        if step.chunks:
            self.check_chunks(step)
            self.check_order(step)
        if step.rows:
            self.check_rows(step)
        call = Call(step)
        for chunk in step.chunks:
            self.prefill(chunk, {fork.sequence for fork in step.forks})
        for row in step.rows:
            self.check_row(row)
        for row in step.rows:
            self.decode(call, row)
        for fork in step.forks:
            self.fork(fork)
        ends = [chunk.sequence for chunk in step.chunks if chunk.samples]
        for s in (*ends, *(fork.sequence for fork in step.forks)):
            self.begin(s)
            self.draw(call, s)
        for _ in range(1, step.repeats):
            for row in step.rows:
                self.decode(call, row)
        assert {*call.drawn} <= {*step.sampled}
        self.calls.append(call)
        return [s for s in step.sampled if s in call.drawn]

    def prefill(self, chunk, forks):
        s = chunk.sequence
        assert s.adapter is None or self.bank.held[s.adapter] > 0
        assert chunk.start == max([s.computed, *self.chunk_ends(s)]), "a chunk is skipped, or computed again"
        self.check_kv(s, chunk.start)
        self.check_own(s, chunk.start, chunk.end, forks)
        for position in range(chunk.start, chunk.end):
            self.write(s, position, s.tokens)

    def fork(self, fork):
        if fork.copy is not None:
            source, target = fork.copy
            for offset in range(PAGE):
                self.kv[target, offset] = self.kv.get((source, offset))
        assert fork.sequence.tokens == fork.leader.tokens
        self.check_kv(fork.sequence, len(fork.sequence.tokens))

    def check_row(self, row):
        """What the scheduler says of a row is what the device finds in its slot."""
        s, place = row.sequence, self.read(row.sequence)
        drawn, before = len(place.tokens) - len(s.tokens), s.drawing - row.draws
        assert place.tokens[: len(s.tokens)] == s.tokens, "its slot is another's"
        assert place.remaining in (0, s.remaining - drawn)
        assert drawn == before if place.remaining else drawn <= before, "it goes on behind all that is drawn for it"
        if place.remaining:
            end = len(place.tokens) - 1 + row.draws
            assert not s.all_token or self.bank.held[s.adapter] > 0
            assert len(s.pages) * PAGE >= end, "it has no page to write to"
            self.check_kv(s, len(place.tokens) - 1, place.tokens)
            self.check_own(s, len(place.tokens) - 1, end)

    def check_own(self, s, start, end, forks=()):
        """A sequence writes to pages that it has alone, but for those that fork from it then."""
        holds = collections.Counter(page for other in self.live if other not in forks for page in other.pages)
        written = {self.at(s, position)[0] for position in range(start, end)}
        assert all(holds[page] == 1 for page in written), "a page is shared"

    def decode(self, call, row):
        """Do a row's next repeat, if it is not done."""
        s, place = row.sequence, self.read(row.sequence)
        if place.remaining:
            self.write(s, len(place.tokens) - 1, place.tokens)
            self.draw(call, s)
            assert len(call.drawn[s]) <= row.draws

    def begin(self, s):
        """Write a sequence that begins, or begins again, to its slot, as the host knows it."""
        self.slots[s.slot] = Place([*s.tokens], s.remaining)

    def read(self, s):
        """Return what the device has in a sequence's slot."""
        return self.slots[s.slot]

    def draw(self, call, s):
        """Draw the next token behind what is in a sequence's slot; its end tokens end it."""
        place = self.read(s)
        new = (7 * len(place.tokens) + s.index) % 9
        place.tokens.append(new)
        place.remaining = 0 if new in s.stop_ids else place.remaining - 1
        call.drawn.setdefault(s, []).append(new)

    # What a step may be.

    def check_chunks(self, step):
        sizes, end, entries = self.sizes, 0, collections.Counter()
        assert len(step.chunks) <= sizes["prefill_seqs"]
        assert step.repeats == 1
        for chunk in step.chunks:
            s = chunk.sequence
            assert s.status is (Status.RUNNING if chunk.samples else Status.PREFILLING)
            assert s.drawing == chunk.samples == (chunk.end == len(s.tokens))
            assert chunk.start < chunk.end == s.started
            assert chunk.end - chunk.start <= sizes["chunk_tokens"]
            assert end <= chunk.at
            tiles = range(chunk.at // sizes["tile"], -(-(chunk.at + chunk.end - chunk.start) // sizes["tile"]))
            if chunk.at > end:
                assert chunk.at % sizes["tile"] == 0, "a gap ends at a tile"
                assert entries[tiles[0] - 1] + s.entries > sizes["tile_entries"], "a gap without a need"
            entries.update(dict.fromkeys(tiles, s.entries))
            end = chunk.at + chunk.end - chunk.start
        assert step.num_tokens == end
        assert max(entries.values()) <= sizes["tile_entries"]
        ends = {chunk.sequence for chunk in step.chunks if chunk.samples}
        for fork in step.forks:
            assert fork.leader in ends
            assert (fork.sequence.status, fork.sequence.drawing) == (Status.RUNNING, 1)
        if step.rows:
            rows = -(-len(step.rows) // sizes["tile"]) * sizes["tile"]
            assert end + rows <= sizes["mixed_sizes"][-1], "rows take tiles of their own"
        else:
            assert end <= sizes["prefill_tokens"]

    def check_order(self, step):
        """A tenant's prompts are let in in their order; only one whose adapter finds no room is passed over."""
        new = [chunk.sequence for chunk in step.chunks if chunk.sequence in self.queue]
        left = {*self.scheduler.waiting}
        passed = [s for s in self.queue if s in left and s.adapter is None and s.cohort == step.sequences[0].cohort]
        passed = [s for s in passed if not self.scheduler.expected.holds_up(s)]
        for tenant in {s.tenant for s in new}:
            ranks = [s.rank for s in new if s.tenant == tenant]
            assert ranks == sorted(ranks)
            assert all(rank <= s.rank for rank in ranks for s in passed if s.tenant == tenant), "somebody is overtaken"

    def check_rows(self, step):
        assert 1 <= step.repeats <= self.sizes["decode_steps"]
        assert max(row.draws for row in step.rows) == step.repeats
        for row in step.rows:
            s = row.sequence
            assert s.status is Status.RUNNING
            assert row.draws >= 1
            assert s.undrawn >= 0, "it may draw more than is left"
            assert row.draws == step.repeats or s.undrawn == 0, "it stops where its tokens end"

    def chunk_ends(self, s):
        """Return where the chunks of a sequence end in the calls under way."""
        return [chunk.end for call in self.calls for chunk in call.step.chunks if chunk.sequence is s]

    # Results.

    def commit(self):
        """Take the results of the oldest call."""
        call = self.calls.popleft()
        self.recovery.trust(call.step, self.live)
        self.scheduler.computed(call.step)
        for s, new in call.drawn.items():
            if s.status is Status.FINISHED:
                continue
            self.scheduler.append(s, new)
            if s.remaining <= 0 or new[-1] in s.stop_ids:
                self.finish(s)
        missed = [s for s in call.step.sampled if s.status is not Status.FINISHED and s not in call.drawn]
        assert not missed, "they were in the call and drew nothing"

    def finish(self, s):
        self.scheduler.finish(s)
        assert (s.slot, s.pages) == (-1, [])
        self.live.remove(s)

    def lose(self):
        """Lose what is on the device."""
        self.bank.held.clear()
        self.kv.clear()
        self.slots.clear()
        self.calls.clear()
        self.scheduler.reset()

    def fail(self, steps):
        """Let calls fail, the last of them: what is on the device is lost, and their sequences run apart."""
        self.lose()
        given_up = self.recovery.isolate(steps) if steps else None
        if given_up is not None:
            self.finish(given_up)

    def step(self):
        """Plan a call and take its results."""
        step = self.scheduler.schedule()
        if step is not None:
            self.start(step)
            self.check()
            self.commit()
        self.check()
        return step

    @property
    def may_go_ahead(self):
        """Whether a call may be started behind the one under way."""
        return self.sizes.get("goes_ahead", False) and len(self.calls) == 1 and not self.recovery.apart

    @property
    def may_fill(self):
        """Whether full prefill may be started behind what is under way."""
        goes_ahead = self.sizes.get("goes_ahead", False) and not self.recovery.apart
        return goes_ahead and [call.step.kind for call in self.calls] in (["prefill"], ["prefill", "decode"])

    def plan_ahead(self):
        """Plan a call to go behind the one under way, if there is one to start; returns it."""
        return self.unpreempted(lambda: lookahead.ahead(self.scheduler, self.calls[0].step))

    def unpreempted(self, plan):
        """Return a plan for which nobody may be preempted: calls under way compute for all."""
        preemptions = self.scheduler.preemptions
        step = plan()
        assert self.scheduler.preemptions == preemptions
        return step

    def ahead(self):
        """Start a call behind the one under way, if there is one to start; returns its step."""
        return self.start_if_any(self.plan_ahead())

    def fill(self):
        """Start full prefill behind what is under way, if prompts fill it; returns its step."""
        return self.start_if_any(self.unpreempted(lambda: lookahead.full_prefill(self.scheduler)))

    def start_if_any(self, step):
        if step is not None:
            self.start(step)
        self.check()
        return step

    def collect(self):
        """Take the results of the oldest call and, if none is under way then, start the next; returns its step."""
        if self.calls:
            self.commit()
            self.check()
        return self.start_if_any(None if self.calls else self.scheduler.schedule())

    def turn(self):
        """Do what a step of the engine does; returns the steps that were started."""
        steps = [self.ahead() if self.may_go_ahead else None]
        steps.append(self.fill() if self.may_fill else None)
        return [step for step in (*steps, self.collect()) if step is not None]

    def run(self, most=2000):
        """Go on until everybody is done; returns the steps."""
        steps = []
        for _ in range(most):
            some = self.turn() if self.sizes.get("goes_ahead", False) else [self.step()]
            steps += [step for step in some if step is not None]
            if not any(some) and not self.live:
                break
        assert not self.live, [s.status for s in self.live]
        assert self.pages.num_used == len(self.scheduler.expected) == 0
        assert not +self.bank.held
        return steps

    def check(self):
        """Pages, slots and adapters are held by live sequences that need them, and what is under way is counted."""
        active = [s for s in self.live if s.status in (Status.PREFILLING, Status.RUNNING)]
        assert self.pages.num_used == len({page for s in self.live for page in s.pages})
        assert +self.bank.held == collections.Counter(s.adapter for s in self.live if s.holds_adapter)
        for s in self.live:
            assert bool(s.pages) == (s in active), s
            if s not in active or (s.status is Status.RUNNING and not self.chunk_ends(s) and not s.all_token):
                assert not s.holds_adapter, s
        assert len({s.slot for s in active}) == len(active) == self.scheduler.num_running
        assert all(0 <= s.slot < self.sizes["max_num_seqs"] for s in active)
        assert all(s.slot == -1 for s in self.live if s not in active)
        self.queue = [*self.scheduler.waiting]
        drawing = collections.Counter()
        for step in (call.step for call in self.calls):
            drawing.update({row.sequence: row.draws for row in step.rows})
            drawing.update(chunk.sequence for chunk in step.chunks if chunk.samples)
            drawing.update(fork.sequence for fork in step.forks)
        for s in self.live:
            assert s.drawing == drawing[s]
            assert s.undrawn >= 0
            if s.status is Status.PREFILLING:
                assert s.started == max([s.computed, *self.chunk_ends(s)])


def shape(step):
    """Return a step as plain data, None as None."""
    if step is None:
        return None
    rows = [row.sequence.order for row in step.rows]
    if step.kind == "decode":
        return "decode", step.repeats, rows
    chunks = [(c.sequence.order, c.start, c.end) for c in step.chunks]
    return ("mixed", chunks, rows) if rows else ("prefill", chunks)


def decoding(*lengths, prompt=4, steps=0, make=World, **world):
    """Return a world in which sequences of so many tokens to generate have their first, and them.

    ``steps``: calls of decode steps after that, so that prefill goes first again.
    """
    world = make(goes_ahead=True, **world)
    group = [world.add(prompt, max_tokens=length) for length in lengths]
    while any(s.generated == 0 for s in group):
        world.step()
    assert [s.generated for s in group] == [1] * len(group)
    for _ in range(steps):
        world.step()
    return world, group


def launch(world):
    """Start what is to be done while no call is under way; returns its step."""
    step = world.scheduler.schedule()
    world.start(step)
    return step
