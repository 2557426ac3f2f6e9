"""The scheduler in random runs, and where rows decode beside chunks; one call under way at a time, and more."""

import dataclasses
import random

import pytest
from scheduler_world import World, decoding, launch, shape

from serve.engine.sequence import Status

pytestmark = pytest.mark.host

ALWAYS = ("preemptions", "prefix_hit_tokens", "held_up", "forked", "resets", "cancelled")
"""What happens in all runs."""

MIXED = ("mixed",)
"""The same where prompts and rows share calls."""

BESIDE = ("further_steps", "cancelled_beside", "failed_beside")
"""What happens with several calls under way only."""

APART_BESIDE = ("steps_behind_prefill", "prefills_behind_decode", "prefills_behind_both", "prefills_behind_prefill")
"""The same where prompts and rows have calls of their own."""

MIXED_BESIDE = ("mixed_behind_mixed", "mixed_behind_decode")
"""The same where they share calls."""


@dataclasses.dataclass
class Sum:
    """What happened in all random runs."""

    ended: int = 0
    preemptions: int = 0
    prefix_hit_tokens: int = 0
    held_up: int = 0
    forked: int = 0
    resets: int = 0
    cancelled: int = 0
    steps_behind_prefill: int = 0
    prefills_behind_decode: int = 0
    further_steps: int = 0
    prefills_behind_both: int = 0
    prefills_behind_prefill: int = 0
    cancelled_beside: int = 0
    failed_beside: int = 0
    given_up: int = 0
    mixed: int = 0
    mixed_behind_mixed: int = 0
    mixed_behind_decode: int = 0

    def count(self, world, step):
        """Count what a call that was just started is."""
        self.forked += len(step.forks)
        self.held_up += any(sequence.awaits for sequence in world.scheduler.waiting)
        self.mixed += step.kind == "mixed"
        if len(world.calls) == 2:
            pair = world.calls[0].step.kind, step.kind
            self.prefills_behind_decode += pair == ("decode", "prefill")
            self.prefills_behind_prefill += pair == ("prefill", "prefill")
            self.steps_behind_prefill += pair == ("prefill", "decode")
            self.further_steps += pair == ("decode", "decode")
            self.mixed_behind_mixed += pair == ("mixed", "mixed")
            self.mixed_behind_decode += pair == ("decode", "mixed")
        self.prefills_behind_both += len(world.calls) == 3


def run_at_random(draw, total, goes_ahead, mixed):
    """Adds, calls, cancels and lost devices in random order, then whatever is left runs to its end."""
    world = World(
        num_pages=draw.choice((7, 10, 40)),
        room=draw.choice((1, 2, 4)),
        max_num_seqs=draw.choice((1, 3, 6)),
        chunk_tokens=draw.choice((3, 8, 32)),
        prefill_seqs=draw.choice((1, 3)),
        tile_entries=draw.choice((3, 5)),
        decode_steps=draw.choice((1, 4)),
        prefill_sizes=draw.choice(((), (4, 16, 32))),
        goes_ahead=goes_ahead,
        mixed_sizes=draw.choice(((16, 24, 32), (32,))) if mixed else (),
    )
    arriving, near = draw.choice((0.1, 0.3)), draw.choice((0.2, 1.0))
    world.bank.is_near = lambda digest: draw.random() < near
    for _ in range(draw.randint(30, 90)):
        action = draw.random()
        if action < arriving:
            adapters = (None, "a", "b", "c") if mixed else (None, "a", "b", "c", "everywhere")
            world.add(
                draw.choice((1, 3, 4, 5, 8, 13)), adapter=draw.choice(adapters), max_tokens=draw.randint(1, 12),
                n=draw.choice((1, 1, 1, 3)), priority=draw.choice((0, 0, 1, -1)), seed=draw.randint(0, 3),
                score=not mixed and draw.random() < 0.1, stop_ids=draw.choice(((), (), (3,), (5, 6))),
                edits_from=draw.choice((0, 0, 4, 8)),
            )  # fmt: skip
        elif action < 0.9 or not world.live:
            if world.may_fill and draw.random() < 0.5:
                step = world.fill()
            else:
                step = world.ahead() if world.may_go_ahead and draw.random() < 0.7 else world.collect()
            if step is not None:
                total.count(world, step)
        elif action < 0.97:
            world.finish(draw.choice(world.live))
            total.cancelled += 1
            total.cancelled_beside += len(world.calls) > 1
        else:
            # One that is fetched fails, or one that is started.
            steps = [call.step for call in world.calls][:1]
            total.failed_beside += len(world.calls) > 1
            if world.may_go_ahead and draw.random() < 0.5:
                steps.append(world.plan_ahead())
            before = len(world.live)
            world.fail([step for step in steps if step is not None])
            total.given_up += before - len(world.live)
            total.resets += 1
        world.check()
    while world.calls:
        world.commit()
    world.run()
    total.ended += world.order
    total.preemptions += world.scheduler.preemptions
    total.prefix_hit_tokens += world.scheduler.prefix_hit_tokens


@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("goes_ahead", [False, True])
def test_random_runs_keep_every_page_and_end_every_sequence(goes_ahead, mixed, rng):
    draw, total = random.Random(int(rng.integers(2**31))), Sum()
    for _ in range(400):
        run_at_random(draw, total, goes_ahead, mixed)
    happened = dataclasses.asdict(total)
    beside = (*BESIDE, *(MIXED_BESIDE if mixed else APART_BESIDE)) if goes_ahead else ()
    often = (*ALWAYS, *(MIXED if mixed else ()))
    assert total.ended > 1000, total
    assert total.given_up > 0, total
    assert min(happened[name] for name in often) > 100, total
    assert min((happened[name] for name in beside), default=16) > 15, total
    never = {*BESIDE, *APART_BESIDE, *MIXED, *MIXED_BESIDE} - {*often, *beside}
    assert mixed or not any(happened[name] for name in never), total


# Steps in which rows decode beside chunks: one call under way at a time, then more.


def test_rows_decode_beside_chunks_while_prompts_wait():
    world = World(mixed_sizes=(24, 32))
    world.add(4, max_tokens=9)
    world.add(30, max_tokens=2)
    assert [shape(step) for step in world.run()] == [
        ("prefill", [(0, 0, 4), (1, 0, 12)]),
        ("mixed", [(1, 12, 24)], [0]),
        ("mixed", [(1, 24, 30)], [0]),
        ("decode", 4, [0, 1]),
        ("decode", 2, [0]),
    ]


@pytest.mark.parametrize(("rows", "taken"), [(1, 24), (8, 24), (9, 16)])
def test_rows_leave_the_tokens_of_their_tiles_to_nobody(rows, taken):
    world = World(mixed_sizes=(16, 32), max_num_seqs=12, prefill_seqs=12, chunk_tokens=32)
    group = [world.add(2, max_tokens=9) for _ in range(rows)]
    world.step()
    long = world.add(32, max_tokens=1)
    step = world.step()
    assert (shape(step)[1], [row.sequence for row in step.rows]) == ([(long.order, 0, taken)], group)
    world.run()


def test_chunks_that_would_leave_a_mixed_program_half_empty_are_cut():
    world = World(mixed_sizes=(16, 64), chunk_tokens=32)
    world.add(2, max_tokens=9)
    world.step()
    world.add(20, max_tokens=1)
    assert shape(world.step()) == ("mixed", [(1, 0, 8)], [0]), "a tile of rows beside it"
    world.run()


def test_samples_fork_beside_rows():
    world = World(mixed_sizes=(16, 32))
    first = world.add(2, max_tokens=9)
    world.step()
    leader, follower = world.add(6, n=2, max_tokens=3)
    step = world.scheduler.schedule()
    assert world.start(step) == step.sampled == [first, leader, follower]
    world.commit()
    world.run()


def test_sequences_of_a_failed_call_run_beside_nobody_and_are_not_overtaken_for_ever():
    world = World(mixed_sizes=(16, 32), max_num_seqs=6)
    suspect = world.add(8, max_tokens=3)
    step = world.scheduler.schedule()
    world.start(step)
    world.fail([step])
    assert suspect.cohort is not None
    world.add(4, max_tokens=9, priority=-1)
    for _ in range(20):
        if sum(s.status is Status.WAITING for s in world.live) < 2:
            world.add(8, max_tokens=3)
        step = world.step()
        assert len({s.cohort for s in step.sequences}) == 1
    assert suspect.status is Status.FINISHED
    world.run()


def test_sequences_of_a_mixed_call_that_failed_run_together_again_once_their_calls_succeed():
    world = World(mixed_sizes=(16, 32))
    group = [world.add(4, max_tokens=90)]
    world.step()
    group.append(world.add(8, max_tokens=90))
    step = world.scheduler.schedule()
    assert shape(step) == ("mixed", [(1, 0, 8)], [0])
    world.start(step)
    world.fail([step])
    for _ in range(8):
        world.step()
    assert not world.recovery.apart
    assert [s.cohort for s in group] == [None, None]
    assert world.step().sequences == group
    world.run()


def test_behind_a_mixed_step_comes_the_next_with_those_whose_prompts_end_in_it():
    world, _ = decoding(12, mixed_sizes=(24, 32))
    world.add(8, max_tokens=4)
    world.add(30, max_tokens=2)
    assert shape(launch(world)) == ("mixed", [(1, 0, 8), (2, 0, 12)], [0])
    assert shape(world.ahead()) == ("mixed", [(2, 12, 24)], [0, 1])
    world.commit()
    assert shape(world.ahead()) == ("mixed", [(2, 24, 30)], [0, 1])
    world.commit()
    assert shape(world.ahead()) == ("decode", 2, [0, 1, 2])
    world.run()


def test_samples_decode_behind_the_mixed_step_in_which_they_fork():
    world, _ = decoding(12, mixed_sizes=(16, 32))
    samples = world.add(6, n=2, max_tokens=4)
    launch(world)
    assert [s.drawing for s in samples] == [1, 1]
    assert shape(world.ahead()) == ("decode", 2, [0, 1, 1])
    assert [s.drawing for s in samples] == [3, 3]
    world.run()


def test_a_sequence_that_ends_with_the_mixed_step_under_way_is_not_in_the_next():
    world, _ = decoding(12, mixed_sizes=(16, 32))
    world.add(8, max_tokens=1)
    launch(world)
    assert shape(world.ahead()) == ("decode", 2, [0])
    world.run()


def test_full_prefill_is_not_started_where_rows_decode_beside_it():
    world, _ = decoding(12, mixed_sizes=(16, 32), max_num_seqs=12)
    for _ in range(9):
        world.add(8)
    launch(world)
    assert world.fill() is None
    world.run()


@pytest.mark.parametrize("mixed_sizes", [(), (16, 32)])
@pytest.mark.parametrize("short", ["adapters", "pages"])
def test_those_that_found_no_room_are_let_in_when_there_is_some(short, mixed_sizes):
    """One decodes on and on; another is there that holds what a third one waits for."""
    world, (long,) = decoding(60, mixed_sizes=mixed_sizes, room=1, num_pages=23)
    length, adapters = (8, "ab") if short == "adapters" else (44, (None, None))
    holds = world.add(length, adapter=adapters[0], max_tokens=4)
    waits = world.add(length, adapter=adapters[1], max_tokens=2)
    while holds.status is not Status.RUNNING:
        world.turn()
    assert waits.status is Status.WAITING
    while waits.status is not Status.FINISHED:
        world.turn()
    assert long.generated < 30
    world.run()
