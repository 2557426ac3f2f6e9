"""A scheduler and a fake device that keeps, for each KV slot, what its content depends on: a wrong page shows."""

import collections

import numpy as np

from serve.pages import PageManager
from serve.prefix import PageKeys, cache_salt
from serve.scheduler import Decode, Prefill, Scheduler
from serve.sequence import Sequence, Status

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


class World:
    """A scheduler and a fake device; what ``Engine`` does with a plan, without outputs."""

    def __init__(self, num_pages=40, room=2, **sizes):
        self.sizes = {**SIZES, **sizes}
        self.slots = Slots(room)
        self.pages = PageManager(num_pages, PAGE)
        self.scheduler = Scheduler(self.pages, self.slots, **self.sizes)
        self.kv = {}
        self.live = []
        self.order = 0

    def add(self, length=8, *, adapter=None, max_tokens=4, n=1, priority=0, seed=None, score=False, tokens=None):
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
                prompt_len=length, mask=mask, max_tokens=max_tokens, adapter=adapter, entries=ENTRIES.get(adapter, 0),
                all_token=adapter == "everywhere", keys=PageKeys(salt, PAGE), score=score and not i,
                status=Status.FORKING if i else Status.NEW,
            )
            for i in range(n)
        ]  # fmt: skip
        group[0].followers = group[1:]
        self.order += 1
        self.live += group
        self.scheduler.add(group[0])
        return group[0] if n == 1 else group

    # The device.

    def content(self, s, position):
        return s.adapter, tuple(s.tokens[: position + 1])

    def slot(self, s, position):
        return s.pages[position // PAGE], position % PAGE

    def write(self, s, start, end):
        for position in range(start, end):
            self.kv[self.slot(s, position)] = self.content(s, position)

    def check_kv(self, s, end):
        for position in range(end):
            assert self.kv.get(self.slot(s, position)) == self.content(s, position), f"{s} at {position}"

    def start(self, plan):
        """Begin a call; returns what it draws a token for."""
        if isinstance(plan, Decode):
            assert len({s.cohort for s in plan.sequences}) == 1
            assert 1 <= plan.steps <= self.sizes["decode_steps"]
            for s in plan.sequences:
                assert s.status is Status.RUNNING
                assert not s.all_token or self.slots.held[s.adapter] > 0
                assert len(s.pages) * PAGE >= len(s.tokens) - 1 + min(plan.steps, s.remaining)
                self.check_kv(s, len(s.tokens) - 1)
            self.shared_pages_are_full(plan.sequences)
            return list(plan.sequences)
        self.check_prefill(plan)
        drawing = []
        for chunk in plan.chunks:
            s = chunk.sequence
            assert s.adapter is None or self.slots.held[s.adapter] > 0
            self.check_kv(s, chunk.start)
            self.write(s, chunk.start, chunk.end)
            if chunk.last:
                forked = self.scheduler.fork(s)
                for follower, pair in forked:
                    if pair is not None:
                        for offset in range(PAGE):
                            self.kv[pair[1], offset] = self.kv.get((pair[0], offset))
                    self.check_kv(follower, len(follower.tokens))
                drawing += [s, *(follower for follower, _ in forked)]
        return drawing

    def shared_pages_are_full(self, sequences):
        writers = collections.Counter(self.slot(s, len(s.tokens) - 1)[0] for s in sequences if s.pages)
        assert max(writers.values()) == 1, "two sequences write to one page"

    def check_prefill(self, plan):
        sizes, end, entries = self.sizes, 0, collections.Counter()
        assert 1 <= len(plan.chunks) <= sizes["prefill_seqs"]
        assert plan.num_tokens <= sizes["prefill_tokens"]
        assert len({s.cohort for s in plan.sequences}) == 1
        assert len(set(plan.sequences)) == len(plan.chunks)
        for chunk in plan.chunks:
            s = chunk.sequence
            assert s.status is Status.PREFILLING
            assert chunk.start == s.computed < chunk.end <= len(s.tokens)
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

    def commit(self, plan, drawing):
        """Take a call's results."""
        count = 1
        if isinstance(plan, Prefill):
            for chunk in plan.chunks:
                self.scheduler.computed(chunk)
        else:
            count = plan.steps
        for s in plan.sequences:
            if s.cohort is not None and s.cohort[0] == type(plan).__name__:
                s.cohort = None
        for s in drawing:
            if s.status is Status.FINISHED:
                continue
            new = [(7 * len(s.tokens) + s.index + i) % 9 for i in range(min(count, s.remaining))]
            before = len(s.tokens)
            s.tokens += new
            if isinstance(plan, Decode):
                self.write(s, before - 1, before - 1 + len(new))
            del s.tokens[before:]
            self.scheduler.append(s, new)
            if s.remaining <= 0:
                self.finish(s)

    def finish(self, s):
        self.scheduler.finish(s)
        self.live.remove(s)

    def step(self):
        plan = self.scheduler.schedule()
        if plan is not None:
            self.commit(plan, self.start(plan))
        self.check()
        return plan

    def run(self, most=2000):
        """Step until everybody is done; returns the plans."""
        plans = []
        for _ in range(most):
            plan = self.step()
            if plan is not None:
                plans.append(plan)
            elif not self.live:
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
