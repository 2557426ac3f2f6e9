"""The scheduler alone, with a call planned while the one before it is under way."""

import pytest
from scheduler_world import Place, World, decoding, launch, shape

from serve.engine import lookahead
from serve.engine.scheduler import Scheduler
from serve.engine.sequence import Status

pytestmark = pytest.mark.host


def ahead(world):
    """Return the shape of what was started behind the call under way, or None."""
    return shape(world.ahead())


def draws(world, call=-1):
    """Return who draws in a call under way, and how many tokens at most."""
    return {row.sequence: row.draws for row in world.calls[call].step.rows}


def test_calls_in_their_order():
    world = World(goes_ahead=True)
    world.add(4, max_tokens=12)
    world.add(30, max_tokens=2)
    assert [shape(step) for step in world.run()] == [
        ("prefill", [(0, 0, 4), (1, 0, 12)]),
        ("decode", 1, [0]),
        ("prefill", [(1, 12, 24)]),
        ("decode", 1, [0]),
        ("prefill", [(1, 24, 30)]),
        ("decode", 2, [0, 1]),
        *[("decode", 2, [0])] * 3,
        ("decode", 1, [0]),
    ]


# Behind prefill.


def test_behind_prefill_those_who_decode_take_one_step_if_more_of_a_prompt_follows():
    world, _ = decoding(12, 12, steps=1)
    world.add(30, max_tokens=2)
    assert shape(launch(world)) == ("prefill", [(2, 0, 12)])
    assert ahead(world) == ("decode", 1, [0, 1])
    world.commit()
    assert ahead(world) == ("prefill", [(2, 12, 24)])
    world.run()


def test_behind_the_last_chunk_nothing_is_started_so_that_its_sequence_takes_part():
    world, _ = decoding(12, 12, steps=1)
    world.add(8, max_tokens=2)
    assert shape(launch(world)) == ("prefill", [(2, 0, 8)])
    assert ahead(world) is None
    world.commit()
    assert shape(launch(world)) == ("decode", 2, [0, 1, 2])
    world.run()


@pytest.mark.parametrize(("rows", "expected"), [(4, ("decode", 1, [0])), (2, None)])
def test_behind_the_last_chunk_one_step_is_taken_if_another_prompt_waits_that_may_find_room(rows, expected):
    world, _ = decoding(12, steps=1, max_num_seqs=rows, prefill_seqs=1)
    world.add(8, max_tokens=2)
    world.add(8, max_tokens=2)
    assert shape(launch(world)) == ("prefill", [(1, 0, 8)])
    assert ahead(world) == expected
    world.run()


def test_behind_prefill_nothing_is_started_while_nobody_decodes():
    world = World(goes_ahead=True)
    world.add(30)
    launch(world)
    assert ahead(world) is None
    world.run()


def test_samples_whose_first_token_is_being_drawn_do_not_take_part():
    world, _ = decoding(12, steps=1)
    samples = world.add(8, n=2, max_tokens=4)
    world.add(30)
    assert shape(launch(world)) == ("prefill", [(1, 0, 8), (2, 0, 12)])
    assert samples[1].status is Status.RUNNING
    assert ahead(world) == ("decode", 1, [0])
    world.run()


def test_nothing_is_started_if_such_samples_are_all_that_run():
    world = World(goes_ahead=True)
    samples = world.add(8, n=2, max_tokens=4)
    world.add(30)
    launch(world)
    assert samples[1].status is Status.RUNNING
    assert ahead(world) is None
    world.run()


# Full prefill behind prefill and a step.


def queued(*lengths, **world):
    """Return a world with one who decodes, a prefill call and a step under way, and prompts of these lengths."""
    world, _ = decoding(20, steps=1, **{"max_num_seqs": 12, **world})
    for length in lengths:
        world.add(length, max_tokens=2)
    launch(world)
    assert ahead(world) == ("decode", 1, [0])
    return world


def fill(world):
    return shape(world.fill())


def test_full_prefill_is_started_behind_prefill_and_a_step():
    world = queued(*[8] * 6)
    assert fill(world) == ("prefill", [(4, 0, 8), (5, 0, 8), (6, 0, 8)])
    world.commit()
    assert [call.step.kind for call in world.calls] == ["decode", "prefill"]
    world.commit()
    assert ahead(world) is None, "no prompt waits: those of the last call take part in the next step"
    world.commit()
    assert shape(launch(world)) == ("decode", 2, [0, 1, 2, 3, 4, 5, 6])
    world.run()


def test_and_behind_that_in_its_turn():
    world = queued(*[8] * 9)
    assert fill(world) == ("prefill", [(4, 0, 8), (5, 0, 8), (6, 0, 8)])
    world.commit()
    world.commit()
    assert ahead(world) == ("decode", 1, [0, 1, 2, 3])
    assert fill(world) == ("prefill", [(7, 0, 8), (8, 0, 8), (9, 0, 8)])
    world.run()


def test_while_nobody_decodes_it_is_started_right_behind_prefill():
    world = World(goes_ahead=True, max_num_seqs=9)
    for _ in range(6):
        world.add(8)
    assert shape(launch(world)) == ("prefill", [(0, 0, 8), (1, 0, 8), (2, 0, 8)])
    assert ahead(world) is None
    assert world.may_fill
    assert fill(world) == ("prefill", [(3, 0, 8), (4, 0, 8), (5, 0, 8)])
    assert not world.may_fill
    world.run()


def test_a_call_that_is_not_full_waits_for_prompts_that_may_come():
    world = queued(*[8] * 5)
    assert fill(world) is None
    assert not any(s.started for s in world.scheduler.waiting)
    world.add(8)
    assert fill(world) == ("prefill", [(4, 0, 8), (5, 0, 8), (6, 0, 8)])
    world.run()


def test_tokens_fill_a_call_too():
    world = queued(12, 12, 12, 12, 12, prefill_tokens=24)
    assert fill(world) == ("prefill", [(3, 0, 12), (4, 0, 12)])
    world.run()


def test_chunks_that_follow_those_under_way_are_in_it():
    world = queued(30, 8, 8)
    assert shape(world.calls[0].step) == ("prefill", [(1, 0, 12), (2, 0, 8), (3, 0, 8)])
    assert fill(world) is None, "one chunk does not fill a call"
    for _ in range(2):
        world.add(8)
    assert fill(world) == ("prefill", [(1, 12, 24), (4, 0, 8), (5, 0, 8)])
    world.run()


@pytest.mark.parametrize("short", [{"max_num_seqs": 6}, {"num_pages": 13}])
def test_without_room_for_all_of_it_none_is_started(short):
    world = queued(*[8] * 6, **short)
    held = world.pages.num_used
    assert fill(world) is None
    assert world.pages.num_used == held
    world.run()


@pytest.mark.parametrize(("room", "started"), [(6, True), (5, False)])
def test_adapters_that_are_in_use_leave_room_for_those_of_the_next_call(room, started):
    world, _ = decoding(20, steps=1, max_num_seqs=9, room=room)
    names = [f"adapter-{i}" for i in range(6)]
    for name in names:
        world.add(8, adapter=name)
    launch(world)
    ahead(world)
    assert (fill(world) is not None) is started
    assert sorted(+world.bank.held) == (names if started else names[:3])
    world.run()


# Behind decode.


def test_behind_decode_prefill_goes_first():
    world, _ = decoding(12, 12)
    launch(world)
    world.add(30)
    assert ahead(world) == ("prefill", [(2, 0, 12)])
    world.commit()
    assert ahead(world) == ("decode", 1, [0, 1]), "and then a step, with the tokens that are known by now"
    world.run()


def test_prefill_and_decode_take_turns_whether_or_not_they_were_planned_ahead():
    world, _ = decoding(20)
    launch(world)
    world.add(8)
    assert ahead(world) == ("prefill", [(1, 0, 8)])
    world.commit()
    assert ahead(world) is None
    world.add(16)
    world.commit()
    assert shape(launch(world)) == ("decode", 1, [0, 1])
    world.commit()
    assert shape(launch(world)) == ("prefill", [(2, 0, 12)])
    assert ahead(world) == ("decode", 1, [0, 1])
    world.commit()
    world.commit()
    assert shape(launch(world)) == ("prefill", [(2, 12, 16)])
    world.run()


@pytest.mark.parametrize(("decode_steps", "each"), [(1, 1), (4, 2), (5, 2), (8, 4)])
def test_two_calls_have_as_many_steps_together_as_one_alone(decode_steps, each):
    world, group = decoding(20, 20, decode_steps=decode_steps)
    for start in (launch, World.ahead):
        assert shape(start(world)) == ("decode", each, [0, 1])
    assert [s.drawing for s in group] == [2 * each] * 2
    world.run()


def test_while_somebody_waits_without_room_calls_end_with_the_first_who_makes_room():
    world, _ = decoding(4, 9, max_num_seqs=2)
    world.add(8)
    assert shape(launch(world)) == ("decode", 2, [0, 1])
    assert ahead(world) == ("decode", 1, [0, 1])
    world.commit()
    assert ahead(world) is None, "one of them ends"
    world.commit()
    assert shape(launch(world)) == ("prefill", [(2, 0, 8)])
    world.run()


def test_the_same_rows_go_on_until_they_end():
    world, _ = decoding(9, 20)
    steps = [launch(world)]
    while (step := world.ahead()) is not None:
        steps.append(step)
        world.commit()
    assert [shape(step) for step in steps] == [
        *[("decode", 2, [0, 1])] * 4,
        *[("decode", 2, [1])] * 5,
        ("decode", 1, [1]),
    ]
    world.run()


def test_they_do_not_go_on_if_somebody_joined():
    world, _ = decoding(20, 20)
    launch(world)
    world.add(16, max_tokens=5)
    assert ahead(world) == ("prefill", [(2, 0, 12)])
    world.commit()
    assert ahead(world) == ("decode", 1, [0, 1])
    world.commit()
    assert ahead(world) == ("prefill", [(2, 12, 16)])
    world.commit()
    assert ahead(world) is None, "the new one decodes with them"
    world.commit()
    assert shape(launch(world)) == ("decode", 2, [0, 1, 2])
    assert ahead(world) == ("decode", 2, [0, 1, 2])
    world.run()


def test_they_do_not_go_on_beside_one_that_joined_a_moment_ago():
    """A step behind a prompt's last chunk: another prompt was there that was given up meanwhile."""
    world, _ = decoding(20, steps=1, prefill_seqs=1)
    world.add(8, max_tokens=5)
    given_up = world.add(8)
    launch(world)
    assert ahead(world) == ("decode", 1, [0])
    world.finish(given_up)
    world.commit()
    assert ahead(world) is None
    world.run()


@pytest.mark.parametrize(
    ("lengths", "expected"),
    [
        ((3, 20), ("decode", 2, [1])),
        ((3, 3, 20), None),
        ((3, 20, 20), ("decode", 2, [1, 2])),
        ((3, 3, 3, 20), None),
        ((3, 3), None),
        ((4, 3), ("decode", 1, [0])),
    ],
)
def test_they_go_on_if_half_of_them_do(lengths, expected):
    world, _ = decoding(*lengths, prefill_seqs=4)
    assert shape(launch(world))[:2] == ("decode", 2)
    assert ahead(world) == expected
    world.run()


def test_those_that_the_host_ended_do_not_count():
    world, group = decoding(20, 20, 20, 20, prefill_seqs=4)
    launch(world)
    for s in group[:2]:
        world.finish(s)
    assert ahead(world) == ("decode", 2, [2, 3])
    world.commit()
    for s in group[2:]:
        world.finish(s)
    assert ahead(world) is None
    world.run()


def test_an_end_token_that_the_device_found_a_moment_ago_is_no_obstacle():
    world = World(goes_ahead=True)
    group = [world.add(8, max_tokens=20, stop_ids=ids) for ids in ((7 * 9 % 9, 7 * 10 % 9), ())]
    world.step()
    launch(world)
    assert ahead(world) == ("decode", 2, [0, 1])
    assert [*world.calls[1].drawn] == group[1:], "but it is not known yet"
    world.run()
    assert group[0].generated == 2


# Pages.


def test_pages_are_there_for_all_that_may_be_drawn():
    world, (s,) = decoding(20)
    launch(world)
    assert len(s.pages) == 2, "tokens 4 and 5"
    world.ahead()
    assert len(s.pages) == 2, "6 and 7"
    world.commit()
    world.ahead()
    assert len(s.pages) == 3, "8 and 9"
    world.run()


def test_nobody_is_preempted_and_nothing_is_kept_if_pages_are_short():
    world, group = decoding(13, 13, num_pages=4)
    launch(world)
    world.ahead()
    assert [len(s.pages) for s in group] == [2, 2]
    world.commit()
    before = [[*s.pages] for s in group]
    assert ahead(world) is None, "both need a page"
    assert [s.pages for s in group] == before
    assert world.scheduler.preemptions == 0
    world.commit()
    assert shape(launch(world)) == ("decode", 1, [0]), "now the last one is preempted"
    assert world.scheduler.preemptions == 1
    world.run()


def test_a_page_too_few_keeps_all_from_going_on_and_none_is_taken():
    world, _ = decoding(13, 13, num_pages=5)
    launch(world)
    world.ahead()
    world.commit()
    assert ahead(world) is None
    assert world.pages.num_available == 1
    assert world.scheduler.preemptions == 0
    world.run()


@pytest.mark.parametrize(("num_pages", "expected"), [(6, None), (7, ("decode", 1, [0]))])
def test_behind_prefill_nobody_is_preempted_either(num_pages, expected):
    world, (s,) = decoding(12, prompt=7, steps=1, decode_steps=1, num_pages=num_pages)
    assert (len(s.tokens), len(s.pages)) == (9, 2), "its next token needs a page"
    large = world.add(16, max_tokens=1)
    launch(world)
    assert (large.status, ahead(world)) == (Status.PREFILLING, expected)
    assert world.pages.num_available == 0
    assert world.scheduler.preemptions == 0
    world.run()


def test_a_sequence_that_ends_by_its_length_is_given_no_page():
    """Both come to the end of a page; one ends there."""
    world, (short, long) = decoding(5, 20)
    launch(world)
    world.ahead()
    world.commit()
    assert [len(s.pages) for s in (short, long)] == [2, 2]
    assert ahead(world) == ("decode", 2, [1])
    assert [len(s.pages) for s in (short, long)] == [2, 3]
    world.run()


def test_a_sequence_that_ends_within_the_further_steps_is_given_pages_up_to_there():
    world, (short, long) = decoding(4, 20, prompt=5)
    launch(world)
    world.ahead()
    assert draws(world) == {short: 1, long: 2}
    assert [len(s.pages) for s in (short, long)] == [2, 3], "tokens 7 of the one, 7 and 8 of the other"
    world.run()


# What a broken scheduler would do.


def long_run():
    world, _ = decoding(40, 40, num_pages=30)
    return world.run()


def patched_rows(change):
    """Return a ``plan_rows`` that plans while ``change`` is done to the sequences, and gives them back as they were."""
    real = Scheduler.plan_rows

    def plan_rows(self, sequences, repeats):
        sequences = [*sequences]
        before = [s.drawing for s in sequences]
        for s in sequences:
            change(s)
        step = real(self, sequences, repeats)
        draws = {row.sequence: row.draws for row in step.rows} if step else {}
        for s, drawing in zip(sequences, before, strict=True):
            s.drawing = drawing + draws.get(s, 0)
        return step

    return plan_rows


def test_pages_for_what_is_being_drawn_are_not_forgotten(trap):
    trap(Scheduler, "plan_rows", patched_rows(lambda s: setattr(s, "drawing", 0)), long_run)


def test_rows_whose_newest_tokens_are_not_known_are_not_started_from_what_the_host_knows(trap):
    trap(World, "read", lambda self, s: Place([*s.tokens], s.remaining), long_run)


def test_what_a_step_may_draw_is_counted_until_it_is_over(trap):
    real = Scheduler.plan_rows

    def forgetting(self, sequences, repeats):
        step = real(self, sequences, repeats)
        for row in step.rows if step else ():
            row.sequence.drawing -= row.draws
        return step

    trap(Scheduler, "plan_rows", forgetting, long_run)


def test_a_slot_is_one_sequence_s(trap):
    real = Scheduler.plan_prefill

    def first_slot(self, *sizes, **how):
        step = real(self, *sizes, **how)
        for chunk in step.chunks if step else ():
            chunk.sequence.slot = 0
        return step

    trap(Scheduler, "plan_prefill", first_slot, long_run)


def test_a_chunk_is_not_computed_twice_at_a_time(trap):
    real = lookahead.full_prefill

    def forgetting(scheduler):
        for s in scheduler.prefilling:
            s.started = s.computed
        return real(scheduler)

    def check():
        world, _ = decoding(12)
        for _ in range(6):
            world.add(30)
        world.run()

    trap(lookahead, "full_prefill", forgetting, check)
