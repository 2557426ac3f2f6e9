"""A scheduler and a fake device that keeps, for each KV slot, what its content depends on: a wrong page shows."""

import collections
import dataclasses

import numpy as np

from serve.engine.pages import PageManager
from serve.engine.prefix import PageKeys, cache_salt
from serve.engine.scheduler import Decode, Prefill, Scheduler
from serve.engine.sequence import Sequence, Status

PAGE = 4
SIZES = {
    "max_num_seqs": 4, "prefill_tokens": 32, "prefill_seqs": 3, "chunk_tokens": 12, "tile": 8, "tile_entries": 3,
    "decode_steps": 4,
}  # fmt: skip
ENTRIES = {"a": 1, "b": 2, "c": 3, "everywhere": 1}
"""Rank pages on a tile's list of each adapter; the last one is an all-token adapter."""


class Slots:
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

    def release(self, digest):
        assert self.held[digest] > 0, f"{digest} is released more often than acquired"
        self.held[digest] -= 1


@dataclasses.dataclass
class Call:
    """A call that the fake device has done; the host does not know yet what it drew.

    ``tokens`` and ``remaining``: where it left its rows, as the device sees them.
    """

    plan: Prefill | Decode
    drawn: dict[Sequence, list[int]] = dataclasses.field(default_factory=dict)
    tokens: dict[Sequence, list[int]] = dataclasses.field(default_factory=dict)
    remaining: dict[Sequence, int] = dataclasses.field(default_factory=dict)


class World:
    """A scheduler and a fake device; what ``Engine`` does with a plan, without outputs.

    The device does a call as soon as it is started, so that calls are done in the order in which they were started; the
    host learns of it when the call is committed.
    """

    def __init__(self, num_pages=40, room=2, **sizes):
        self.sizes = {**SIZES, **sizes}
        self.slots = Slots(room)
        self.pages = PageManager(num_pages, PAGE)
        self.scheduler = Scheduler(self.pages, self.slots, **self.sizes)
        self.kv = {}
        self.calls = collections.deque()
        self.live = []
        self.order = 0
        self.cohorts = 0

    def add(
        self, length=8, *, adapter=None, max_tokens=4, n=1, priority=0, seed=None, score=False, tokens=None, stop_ids=()
    ):
        seed = 1000 + self.order if seed is None else seed
        tokens = np.random.default_rng(seed).integers(0, 9, length).tolist() if tokens is None else tokens
        length = len(tokens)
        mask = np.zeros((length + max_tokens, 2), bool)
        mask[: length if adapter else 0, 0] = True
        mask[:, 0] |= adapter == "everywhere"
        salt = cache_salt(base="base", kv_dtype="float32", adapter=adapter, fold_version=1)
        group = [
            Sequence(
                request_id=self.order, index=i, order=self.order, priority=priority, tokens=list(tokens),
                prompt_len=length, mask=mask, max_tokens=max_tokens, stop_ids=frozenset(stop_ids), adapter=adapter,
                entries=ENTRIES.get(adapter, 0), all_token=adapter == "everywhere", keys=PageKeys(salt, PAGE),
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
        return s.adapter, tuple((s.tokens if tokens is None else tokens)[: position + 1])

    def slot(self, s, position):
        return s.pages[position // PAGE], position % PAGE

    def check_kv(self, s, end, tokens=None):
        for position in range(end):
            found, expected = self.kv.get(self.slot(s, position)), self.content(s, position, tokens)
            assert found == expected, f"{s} at {position}"

    def start(self, plan):
        """Begin a call, behind those under way; returns what it draws a token for."""
        before = self.calls[-1] if self.calls else None
        call = Call(plan)
        self.calls.append(call)
        if isinstance(plan, Decode):
            self.decode(plan, call, before)
        else:
            self.prefill(plan, call)
        return list(call.drawn)

    def prefill(self, plan, call):
        self.check_prefill(plan)
        for chunk in plan.chunks:
            s = chunk.sequence
            assert s.adapter is None or self.slots.held[s.adapter] > 0
            assert not any(s in other.plan.sequences for other in self.calls if isinstance(other.plan, Decode))
            assert chunk.start == max([s.computed, *self.under_way(s, call)]), "a chunk is skipped, or computed again"
            self.check_kv(s, chunk.start)
            for position in range(chunk.start, chunk.end):
                self.write(s, position, s.tokens)
            if chunk.last:
                forked = self.scheduler.fork(s)
                for follower, pair in forked:
                    if pair is not None:
                        for offset in range(PAGE):
                            self.kv[pair[1], offset] = self.kv.get((pair[0], offset))
                    self.check_kv(follower, len(follower.tokens))
                for drawing in (s, *(follower for follower, _ in forked)):
                    self.take_row(call, drawing)
                    self.draw(call, drawing)

    def under_way(self, s, call):
        """Return where the chunks of a sequence end in the calls before one."""
        plans = [other.plan for other in self.calls if other is not call and isinstance(other.plan, Prefill)]
        return [chunk.end for plan in plans for chunk in plan.chunks if chunk.sequence is s]

    def decode(self, plan, call, before):
        assert len({s.cohort for s in plan.sequences}) == 1
        assert 1 <= plan.steps <= self.sizes["decode_steps"]
        if plan.drawing is not None:
            self.check_further(plan, before)
        for s in plan.sequences:
            if plan.drawing is None:
                assert s.status is Status.RUNNING
                self.take_row(call, s)
                assert not any(s in other.drawn for other in self.calls), "its newest token is not known"
            else:
                call.tokens[s] = [*before.tokens[s]]
                call.remaining[s] = before.remaining[s] if s.status is Status.RUNNING else 0
        writers = collections.Counter()
        for s in [s for s in plan.sequences if call.remaining[s]]:
            tokens = call.tokens[s]
            assert not s.all_token or self.slots.held[s.adapter] > 0
            end = len(tokens) - 1 + min(plan.steps, call.remaining[s])
            assert len(s.pages) * PAGE >= end, "it has no page to write to"
            self.check_kv(s, len(tokens) - 1, tokens)
            writers.update({self.slot(s, position)[0] for position in range(len(tokens) - 1, end)})
        assert all(self.pages._references[page] == count == 1 for page, count in writers.items()), "a page is shared"
        for _ in range(plan.steps):
            for s in [s for s in plan.sequences if call.remaining[s]]:
                self.write(s, len(call.tokens[s]) - 1, call.tokens[s])
                self.draw(call, s)

    def check_further(self, plan, before):
        """What a call that goes on with the rows of another says of them is what the device finds."""
        assert isinstance(before.plan, Decode)
        assert plan.sequences == before.plan.sequences
        assert {*plan.drawing} <= {*plan.sequences}
        for s in plan.sequences:
            drawn = len(before.tokens[s]) - len(s.tokens)
            if s.status is Status.RUNNING and before.remaining[s]:
                assert plan.drawing[s] == drawn, "it goes on behind all that is being drawn for it"
            elif s in plan.drawing:
                assert s.status is Status.RUNNING
                assert plan.drawing[s] >= drawn, "it stops earlier at most"

    def take_row(self, call, s):
        """Give a row to the device as the host knows it."""
        call.tokens[s], call.remaining[s] = [*s.tokens], s.remaining

    def write(self, s, position, tokens):
        self.kv[self.slot(s, position)] = self.content(s, position, tokens)

    def draw(self, call, s):
        """Draw a row's next token; its end tokens end it."""
        tokens = call.tokens[s]
        new = (7 * len(tokens) + s.index) % 9
        tokens.append(new)
        call.drawn.setdefault(s, []).append(new)
        call.remaining[s] = 0 if new in s.stop_ids else call.remaining[s] - 1

    def check_prefill(self, plan):
        sizes, end, entries = self.sizes, 0, collections.Counter()
        assert 1 <= len(plan.chunks) <= sizes["prefill_seqs"]
        assert plan.num_tokens <= sizes["prefill_tokens"]
        assert len({s.cohort for s in plan.sequences}) == 1
        assert len(set(plan.sequences)) == len(plan.chunks)
        for chunk in plan.chunks:
            s = chunk.sequence
            assert s.status is Status.PREFILLING
            assert chunk.start < chunk.end == s.started <= len(s.tokens)
            assert chunk.end - chunk.start <= sizes["chunk_tokens"]
            assert end <= chunk.at
            tiles = range(chunk.at // sizes["tile"], -(-(chunk.at + chunk.end - chunk.start) // sizes["tile"]))
            if chunk.at > end:
                assert chunk.at % sizes["tile"] == 0, "a gap ends at a tile"
                assert entries[tiles[0] - 1] + s.entries > sizes["tile_entries"], "a gap without a need"
            entries.update(dict.fromkeys(tiles, s.entries))
            end = chunk.at + chunk.end - chunk.start
        assert max(entries.values()) <= sizes["tile_entries"]

    # Results.

    def commit(self):
        """Take the results of the oldest call."""
        call = self.calls.popleft()
        plan = call.plan
        if isinstance(plan, Prefill):
            for chunk in plan.chunks:
                self.scheduler.computed(chunk)
        for s in plan.sequences:
            if s.cohort is not None and s.cohort[0] == type(plan).__name__:
                s.cohort = None
        for s, new in call.drawn.items():
            if s.status is Status.FINISHED:
                continue
            self.scheduler.append(s, new)
            if s.remaining <= 0 or new[-1] in s.stop_ids:
                self.finish(s)
        missed = [s for s in call.tokens if s.status is not Status.FINISHED and s not in call.drawn]
        assert not missed, "they were in the call and drew nothing"

    def finish(self, s):
        self.scheduler.finish(s)
        self.live.remove(s)

    def fail(self, plans):
        """Lose what is on the device, and run the sequences of these plans apart from others."""
        self.slots.held.clear()
        self.kv.clear()
        self.calls.clear()
        self.scheduler.reset()
        members = dict.fromkeys(s for plan in plans for s in plan.sequences if s.status is not Status.FINISHED)
        for at, s in enumerate(members):
            s.cohort = (type(plans[-1]).__name__, self.cohorts + (at < len(members) // 2))
        self.cohorts += 2

    def step(self):
        """Plan a call and take its results."""
        plan = self.scheduler.schedule()
        if plan is not None:
            self.start(plan)
            self.commit()
        self.check()
        return plan

    @property
    def may_go_ahead(self):
        """Whether a call may be started behind the one under way."""
        goes_ahead = self.sizes.get("goes_ahead", False) and len(self.calls) == 1
        return goes_ahead and all(s.cohort is None for s in self.live)

    @property
    def may_fill(self):
        """Whether full prefill may be started behind what is under way."""
        goes_ahead = self.sizes.get("goes_ahead", False) and all(s.cohort is None for s in self.live)
        return goes_ahead and [type(call.plan) for call in self.calls] in ([Prefill], [Prefill, Decode])

    def fill(self):
        """Start full prefill behind what is under way, if prompts fill it; returns its plan."""
        plan = self.scheduler.full_prefill()
        if plan is not None:
            self.start(plan)
        self.check()
        return plan

    def ahead(self):
        """Start a call behind the one under way, if there is one to start; returns its plan."""
        plan = self.scheduler.ahead(self.calls[0].plan)
        if plan is not None:
            self.start(plan)
        self.check()
        return plan

    def collect(self):
        """Take the results of the oldest call and, if none is under way then, start the next; returns its plan."""
        if self.calls:
            self.commit()
            self.check()
        plan = None if self.calls else self.scheduler.schedule()
        if plan is not None:
            self.start(plan)
        self.check()
        return plan

    def turn(self):
        """Do what a step of the engine does; returns the plans of the calls that were started."""
        plans = [self.ahead() if self.may_go_ahead else None]
        plans.append(self.fill() if self.may_fill else None)
        return [plan for plan in (*plans, self.collect()) if plan is not None]

    def run(self, most=2000):
        """Go on until everybody is done; returns the plans."""
        plans = []
        for _ in range(most):
            some = self.turn() if self.sizes.get("goes_ahead", False) else [self.step()]
            plans += [plan for plan in some if plan is not None]
            if not any(some) and not self.live:
                break
        assert not self.live, [s.status for s in self.live]
        assert self.pages.num_used == 0
        assert not +self.slots.held
        return plans

    def check(self):
        """Every reference belongs to a live sequence, and every hold of an adapter to one that needs it."""
        expected = collections.Counter(page for s in self.live for page in s.pages)
        found = {page: count for page, count in enumerate(self.pages._references) if count}
        assert found == dict(expected)
        holds = collections.Counter(s.adapter for s in self.live if s.holds_adapter)
        assert +self.slots.held == holds
        for s in self.live:
            active = s.status in (Status.PREFILLING, Status.RUNNING)
            assert bool(s.pages) == active, s
            if not active or (s.status is Status.RUNNING and not s.all_token):
                assert not s.holds_adapter, s
        assert self.scheduler.num_running <= self.sizes["max_num_seqs"]


def shape(plan):
    """Return a plan as plain data."""
    if isinstance(plan, Decode):
        return "decode", plan.steps, [s.order for s in plan.sequences]
    return "prefill", [(c.sequence.order, c.start, c.end) for c in plan.chunks]
