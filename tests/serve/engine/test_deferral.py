"""Prompts that come while calls run: their adapters are copied beside the next call, and few calls wait for copies.

The real scheduler, book of adapters and order of copies, on a fake device.
"""

import types

import numpy as np
import pytest
from scheduler_world import SIZES, Bank, World, decoding, shape

from serve.engine.residency import Residency
from serve.engine.sequence import Status
from serve.engine.staging import Staging
from serve.store.host_copy import Columns, Known

MIXED = {"tile": 4, "prefill_tokens": 32, "mixed_sizes": (8, 16, 24)}
ROOM = SIZES["prefill_seqs"] * SIZES["tile_entries"]


class Device:
    """Takes copies and writes."""

    def copy_adapters(self, loads):
        return loads

    def write_adapters(self, loads):
        pass


class Resident(Bank):
    """The engine's book, with one rank page for each adapter; ``held`` counts as the world's own bank does."""

    def __init__(self, room=8):
        super().__init__(room)
        copy = Known({"q": Columns((0,))}, {"q": ["a page"]})
        self.book = Residency(1 + room, lambda adapter: copy)
        self.staging = Staging(self.book, Device(), ROOM)

    def acquire(self, digest):
        taken = self.book.acquire(digest)
        self.held[digest] += taken
        return taken

    def release(self, digest):
        super().release(digest)
        self.book.release(digest)

    def is_near(self, digest):
        return self.book.is_near(digest)


class Careless(Resident):
    """Says of every adapter that it is near: nothing is deferred."""

    def is_near(self, digest):
        return True


class StagedWorld(World):
    """Brings adapters as ``Starter`` and ``Engine`` do."""

    def add(self, length=8, *, adapter=None, **how):
        if adapter is not None:
            self.bank.book.claim(self.order, types.SimpleNamespace(digest=adapter))
        return super().add(length, adapter=adapter, **how)

    def start(self, step):
        staging, upcoming = self.bank.staging, self.scheduler.next_adapters
        staging.bring({chunk.sequence.adapter for chunk in step.chunks if chunk.sequence.adapter is not None})
        begin = staging.copies(upcoming(1 if not step.chunks and step.repeats == 1 else 2))
        if begin is not None:
            begin()
        drawn = super().start(step)
        staging.settle(upcoming(2))
        for adapter in {chunk.sequence.adapter for chunk in step.chunks} - {None}:
            assert self.bank.book.entry(adapter).written, "it runs without its adapter"
        return drawn


def served(bank, sizes, prompts=60):
    """Serve prompts that come now and then, one or two at a time, each with an adapter of its own.

    Returns the world and, for each prompt, how many calls were started from its arrival up to its own first one.
    """
    rng = np.random.default_rng(0)
    world = StagedWorld(num_pages=400, bank=bank, goes_ahead=True, **{"max_num_seqs": 16, **sizes})
    came, starts, calls = {}, {}, 0
    while len(came) < prompts or world.live:
        for _ in range(int(rng.choice(3, p=(0.6, 0.3, 0.1))) if len(came) < prompts else 0):
            one = world.add(int(rng.integers(2, 9)), adapter=f"u{len(came)}", max_tokens=int(rng.integers(4, 20)))
            came[one] = calls
        for step in world.turn():
            calls += 1
            for chunk in step.chunks:
                starts.setdefault(chunk.sequence, calls - came[chunk.sequence])
    return world, list(starts.values())


@pytest.mark.parametrize("sizes", [{}, MIXED], ids=["separate", "mixed"])
def test_of_prompts_that_come_while_calls_run_few_wait_for_their_copies(sizes):
    before, sooner = served(Careless(), sizes)
    after, later = served(Resident(), sizes)
    assert before.bank.book.loads == after.bank.book.loads == len(sooner) == len(later) == 60
    assert before.bank.staging.waits > 30
    assert after.bank.staging.waits < 6, "only while nothing ran beside which they could be copied"
    assert np.mean(later) <= np.mean(sooner) + 1, "each is left to the next call once"


@pytest.mark.parametrize("sizes", [{}, MIXED], ids=["separate", "mixed"])
def test_a_prompt_waits_for_one_step_beside_which_its_adapter_is_copied(sizes):
    world, rows = decoding(30, 30, bank=Resident(), make=StagedWorld, **sizes)
    world.start(world.scheduler.schedule())
    late = world.add(4, adapter="a")
    hot = [row.order for row in rows]
    assert shape(world.ahead()) == ("decode", 1, hot)
    assert world.bank.book.entry("a").written
    world.commit()
    step = world.ahead()
    assert [chunk.sequence for chunk in step.chunks] == [late]
    assert world.bank.staging.waits == 0


@pytest.mark.parametrize("scarce", [{"max_num_seqs": 2}, {"num_pages": 16}], ids=["rows", "pages"])
def test_who_comes_behind_a_prompt_that_is_left_out_does_not_take_its_room(scarce):
    world, _ = decoding(30, bank=Resident(), make=StagedWorld, **scarce)
    world.start(world.scheduler.schedule())
    first, other = world.add(48, adapter="a"), world.add(48)
    assert world.ahead().kind == "decode"
    world.commit()
    assert [chunk.sequence for chunk in world.ahead().chunks] == [first]
    assert other.status is Status.WAITING
    world.run()


def test_a_prompt_whose_adapter_found_no_room_for_its_copy_is_not_left_out_again():
    world, _ = decoding(30, bank=Resident(), make=StagedWorld)
    world.bank.staging = Staging(world.bank.book, Device(), 0)
    world.start(world.scheduler.schedule())
    late = world.add(4, adapter="a")
    assert world.ahead().kind == "decode"
    world.commit()
    assert [chunk.sequence for chunk in world.ahead().chunks] == [late]
    assert world.bank.staging.waits == 1


def test_a_prompt_beside_which_nothing_runs_is_not_left_out():
    world = StagedWorld(bank=Resident(), goes_ahead=True)
    late = world.add(4, adapter="a")
    (step,) = world.turn()
    assert [chunk.sequence for chunk in step.chunks] == [late]
    assert world.bank.staging.waits == 1
