"""The scheduler alone, with no device and no JAX."""

import collections
import random

import pytest
from scheduler_world import PAGE, Bank, World, shape

from serve.engine.fairness import PATIENCE
from serve.engine.packing import Packing, call_size
from serve.engine.sequence import Status

pytestmark = pytest.mark.host


def test_a_prompt_is_cut_to_chunks_and_calls_to_the_budget():
    world = World(chunk_tokens=12, prefill_tokens=32)
    world.add(30, max_tokens=1)
    world.add(20, max_tokens=1)
    world.add(16, max_tokens=1)
    calls = [shape(step)[1] for step in world.run()]
    assert calls == [
        [(0, 0, 12), (1, 0, 12), (2, 0, 8)],
        [(0, 12, 24), (1, 12, 20), (2, 8, 16)],
        [(0, 24, 30)],
    ]


@pytest.mark.parametrize(
    ("tokens", "size"),
    [(0, 8), (1, 8), (8, 8), (9, 8), (23, 8), (24, 32), (32, 32), (40, 32), (47, 32), (48, 64), (64, 64), (99, 64)],
)
def test_a_program_that_would_be_filled_badly_is_not_taken(tokens, size):
    assert call_size(tokens, (8, 32, 64)) == size


def test_tokens_that_would_leave_a_program_half_empty_go_with_the_next_call():
    world = World(chunk_tokens=32, prefill_tokens=32, prefill_sizes=(8, 32))
    world.add(20, max_tokens=1)
    calls = [shape(step)[1] for step in world.run()]
    assert calls == [[(0, 0, 8)], [(0, 8, 16)], [(0, 16, 20)]]
    world.add(20, max_tokens=1)
    world.add(30, max_tokens=1)
    assert shape(world.step())[1] == [(1, 0, 20), (2, 0, 12)], "together they fill it"
    world.run()


def test_gaps_fill_a_program_too_and_rows_that_are_taken_do_not():
    """Prompts with adapters have a tile each; what finds no row counts for nothing."""
    sizes = {"prefill_seqs": 8, "chunk_tokens": 64, "prefill_tokens": 64, "prefill_sizes": (16, 64)}
    world = World(room=9, max_num_seqs=8, **sizes)
    for adapter in "ccccccc":
        world.add(2, adapter=adapter, max_tokens=1)
    assert [at for _, at, _ in shape(world.step())[1]] == [0] * 7, "seven tiles of eight: one call"
    world.run()
    world = World(
        max_num_seqs=2, prefill_seqs=8, chunk_tokens=64, prefill_tokens=64, prefill_sizes=(16, 64), num_pages=99
    )
    for _ in range(8):
        world.add(10, max_tokens=2)
    assert shape(world.step())[1] == [(0, 0, 10), (1, 0, 6)], "two rows: twenty tokens, not eighty"
    world.run()


def test_prompts_that_are_scored_are_not_cut_to_smaller_programs():
    world = World(chunk_tokens=32, prefill_tokens=32, prefill_sizes=(8, 32))
    world.add(20, max_tokens=1, score=True)
    assert shape(world.step())[1] == [(0, 0, 20)]
    world.run()


def test_nobody_is_admitted_to_a_full_batch():
    world = World(prefill_seqs=4)
    group = [world.add(12, max_tokens=1) for _ in range(4)]
    world.step()
    assert [s.computed or s.status for s in group] == [Status.FINISHED] * 2 + [8, Status.WAITING]
    world.run()


def test_a_prompt_may_fill_the_cache_but_leaves_room_to_those_who_run():
    world = World(num_pages=16)
    world.add(63, max_tokens=1)
    world.run()
    world.add(4, max_tokens=9)
    world.step()
    large = world.add(60, max_tokens=1)
    for _ in range(3):
        assert large.status is Status.WAITING
        world.step()
    world.run()


def test_adapters_of_the_next_prompts_are_known_beforehand():
    world = World(prefill_seqs=2, max_num_seqs=1)
    for adapter in ("b", None, "b", "a"):
        world.add(8, adapter=adapter, max_tokens=2)
    world.add(8, adapter="c", priority=-1)
    assert world.scheduler.next_adapters() == ["c", "b"]
    world.step()
    assert world.scheduler.next_adapters() == ["b"]
    assert world.scheduler.next_adapters(2) == ["b", "a"]
    world.run()
    assert world.scheduler.next_adapters() == []


def test_adapters_of_prompts_that_ended_are_not_wanted():
    world = World(max_num_seqs=1)
    world.add(8, adapter="a")
    given_up = world.add(8, adapter="b")
    world.step()
    world.finish(given_up)
    assert world.scheduler.next_adapters() == []


def test_one_decode_step_follows_each_prefill_call_and_more_only_if_no_prompt_waits():
    world = World()
    world.add(4, max_tokens=12)
    world.add(30, max_tokens=2)
    assert [shape(step) for step in world.run()] == [
        ("prefill", [(0, 0, 4), (1, 0, 12)]),
        ("decode", 1, [0]),
        ("prefill", [(1, 12, 24)]),
        ("decode", 1, [0]),
        ("prefill", [(1, 24, 30)]),
        ("decode", 4, [0, 1]),
        ("decode", 4, [0]),
        ("decode", 1, [0]),
    ]


def test_prompts_that_find_no_row_do_not_slow_decoding():
    world = World(max_num_seqs=1)
    world.add(4, max_tokens=9)
    world.add(4, max_tokens=1)
    assert [shape(step)[:2] for step in world.run()[1:3]] == [("decode", 4), ("decode", 4)]


def test_lower_priority_numbers_go_first_then_arrival():
    world = World(max_num_seqs=1)
    for priority in (0, 1, -1, 0, -1):
        world.add(4, max_tokens=1, priority=priority)
    firsts = [step.sequences[0].order for step in world.run()]
    assert firsts == [2, 4, 0, 3, 1]


@pytest.mark.parametrize(
    ("wanted", "entries", "expected"),
    [
        ((5, 5, 5), (1, 1, 1), [(0, 5), (5, 5), (10, 5)]),
        ((5, 5), (2, 2), [(0, 5), (8, 5)]),
        ((5, 5, 5), (3, 0, 1), [(0, 5), (5, 5), (10, 5)]),
        ((20, 9, 9), (3, 3, 3), [(0, 20), (24, 8), (32, 0)]),
        ((8, 8), (3, 3), [(0, 8), (8, 8)]),
        ((3, 2, 2, 2), (1, 1, 1, 1), [(0, 3), (3, 2), (5, 2), (8, 2)]),
        ((3, 6, 2, 2), (2, 1, 2, 1), [(0, 3), (3, 6), (9, 2), (16, 2)]),
        ((40,), (3,), [(0, 32)]),
    ],
)
def test_packing(wanted, entries, expected):
    packing = Packing(32, 8, 3)
    assert [packing.place(*pair) for pair in zip(wanted, entries, strict=True)] == expected


def test_packing_never_lists_too_many_rank_pages():
    draw = random.Random(0)
    for _ in range(500):
        tile, most = draw.choice((4, 8)), draw.randint(1, 4)
        budget = tile * draw.randint(1, 6)
        packing, lists, end = Packing(budget, tile, most), collections.Counter(), 0
        while end < budget:
            wanted, entries = draw.randint(1, 2 * tile), draw.randint(0, most)
            at, count = packing.place(wanted, entries)
            if count <= 0:
                assert at == budget
                break
            assert at >= end
            assert count == min(wanted, budget - at)
            lists.update(dict.fromkeys(range(at // tile, -(-(at + count) // tile)), entries))
            assert max(lists.values()) <= most
            end = at + count


def test_admission_takes_the_pages_of_a_known_prefix_but_computes_the_last_token():
    world = World()
    world.add(12, adapter="a", max_tokens=1, seed=5)
    world.run()
    same = world.add(12, adapter="a", max_tokens=1, seed=5)
    assert shape(world.step())[1] == [(1, 8, 12)]
    assert world.scheduler.prefix_hit_tokens == 8
    assert same.status is Status.FINISHED
    for other in ("b", None):
        world.add(12, adapter=other, max_tokens=1, seed=5)
        assert shape(world.step())[1][0][1:] == (0, 12)
    scored = world.add(12, adapter="a", max_tokens=1, seed=5, score=True)
    assert shape(world.step())[1] == [(scored.order, 0, 12)]
    assert world.scheduler.prefix_hit_tokens == 8


def test_generated_tokens_can_be_found_but_for_the_last_whose_kv_was_never_computed():
    world = World()
    first = world.add(4, max_tokens=4)
    world.run()
    after = world.add(tokens=[*first.tokens, 1, 2, 3], max_tokens=1)
    assert shape(world.step())[1] == [(1, 4, 11)]
    world.run()
    again = world.add(tokens=[*after.tokens, 1], max_tokens=1)
    assert shape(world.step())[1] == [(again.order, 8, 13)]


def test_what_every_sample_generated_can_be_found():
    world = World()
    samples = world.add(6, n=2, max_tokens=7)
    world.run()
    assert samples[0].tokens != samples[1].tokens
    for sample in samples:
        world.add(tokens=[*sample.tokens, 1], max_tokens=1)
        assert shape(world.step())[1][0][1] == 12


def test_the_last_to_be_served_is_preempted_and_goes_on_where_it_was():
    world = World(num_pages=6)
    first, urgent, last = (world.add(7, max_tokens=9, priority=p) for p in (0, -1, 1))
    world.step()
    assert [s.status for s in (first, urgent, last)] == [Status.RUNNING, Status.RUNNING, Status.RUNNING]
    before = None
    while not world.scheduler.preemptions:
        before = [*last.tokens]
        world.step()
    assert last.status is Status.WAITING
    assert last.tokens == before
    assert (last.pages, last.computed, last.registered) == ([], 0, 0)
    steps = world.run()
    again = [c for step in steps for c in step.chunks if c.sequence is last]
    assert again[-1].end > last.prompt_len, "generated tokens are computed again with the prompt"
    assert len(last.tokens) == 16


def test_a_preempted_sequence_comes_before_later_arrivals():
    world = World(num_pages=6, max_num_seqs=3)
    world.add(7, max_tokens=9)
    second = world.add(7, max_tokens=9)
    while not world.scheduler.preemptions:
        world.step()
    later = world.add(7, max_tokens=1)
    chunks = [c.sequence for step in world.run() for c in step.chunks]
    assert chunks.index(second) < chunks.index(later)


def test_an_adapter_that_cannot_be_acquired_holds_up_nobody_else():
    world = World()
    world.bank.broken = {"a"}
    stuck = [world.add(8, adapter="a", max_tokens=2) for _ in range(3)]
    others = [world.add(8, adapter=adapter, max_tokens=2) for adapter in (None, "b", None)]
    for _ in range(10):
        world.step()
    assert all(s.status is Status.FINISHED for s in others)
    assert all(s.status is Status.WAITING for s in stuck)
    world.bank.broken = set()
    assert [c.sequence for c in world.step().chunks] == stuck, "in order of arrival"
    world.run()


def test_one_adapter_more_than_there_is_room_for_waits_for_a_prefill_to_end():
    world = World(room=1)
    world.add(20, adapter="a", max_tokens=3)
    waits = world.add(8, adapter="b", max_tokens=1)
    world.add(8, adapter="a", max_tokens=1)
    assert [c.sequence.order for c in world.step().chunks] == [0, 2]
    assert waits.status is Status.WAITING
    world.run()


def test_an_all_token_adapter_stays_while_it_decodes():
    world = World(room=1)
    everywhere = world.add(8, adapter="everywhere", max_tokens=6)
    world.add(8, adapter="a", max_tokens=1)
    world.step()
    assert everywhere.holds_adapter
    while everywhere.status is not Status.FINISHED:
        assert world.bank.held["everywhere"] == 1
        world.step()
    world.run()


@pytest.mark.parametrize(("length", "copies"), [(8, 0), (9, 1)])
def test_samples_fork_from_one_prefill(length, copies):
    world = World()
    leader, *followers = world.add(length, adapter="a", n=3, max_tokens=6)
    drawing = world.start(world.scheduler.schedule())
    assert drawing == [leader, *followers]
    full = length // PAGE
    assert all(s.pages[:full] == leader.pages[:full] for s in followers)
    assert len({page for s in drawing for page in s.pages[full:]}) == 3 * copies
    world.commit()
    assert not any(step.chunks for step in world.run())


@pytest.mark.parametrize("short", ["rows", "pages"])
def test_samples_without_room_are_prefilled_on_their_own(short):
    world = World(**({"max_num_seqs": 2} if short == "rows" else {"num_pages": 4}))
    leader, *followers = world.add(9, n=3, max_tokens=3)
    world.step()
    assert leader.status is Status.RUNNING
    assert [s.status for s in followers] == [Status.RUNNING, Status.WAITING]
    chunks = [c for step in world.run() for c in step.chunks]
    assert chunks
    assert all(c.start == 8 for c in chunks if c.sequence is followers[1]), "from the leader's pages"


def test_samples_of_a_request_that_ends_before_its_fork_wait_on_their_own():
    world = World()
    leader, follower = world.add(30, n=2)
    world.step()
    world.finish(leader)
    assert follower.status is Status.WAITING
    world.run()


def test_sequences_of_a_failed_call_run_apart_until_one_succeeds():
    world = World(max_num_seqs=6)
    group = [world.add(4, max_tokens=3) for _ in range(3)]
    for cohort, s in zip((1, 1, 2), group, strict=True):
        s.cohort = ("prefill", cohort)
    free = world.add(4, max_tokens=3)
    assert [c.sequence for c in world.step().chunks] == group[:2]
    assert [s.cohort for s in group] == [None, None, ("prefill", 2)]
    assert (group[2].status, free.status) == (Status.WAITING, Status.WAITING)
    assert world.step().sequences == group[:2]
    assert world.step().sequences == [group[2]]
    world.step()
    assert world.step().sequences == [free]
    group[0].cohort = group[2].cohort = ("decode", 3)
    assert world.step().sequences == [group[2]] or group[0].status is Status.FINISHED
    world.run()


@pytest.mark.parametrize("status", [status for status in Status if status is not Status.NEW])
def test_a_sequence_can_be_finished_in_every_status(status):
    world = World()
    leader, follower = world.add(30, adapter="a", n=2)
    s = follower if status is Status.FORKING else leader
    while s.status is not status and status is not Status.FINISHED:
        world.step()
    if status is Status.FINISHED:
        world.run()
        world.scheduler.finish(s)
    else:
        world.finish(s)
    world.check()
    assert s.status is Status.FINISHED
    world.run()


def test_a_reset_computes_everything_again():
    world = World()
    running = world.add(4, adapter="everywhere", max_tokens=8)
    partly = world.add(30, adapter="a", max_tokens=2)
    world.step()
    tokens = [*running.tokens]
    world.lose()
    world.check()
    assert running.tokens == tokens
    assert [s.status for s in (running, partly)] == [Status.WAITING] * 2
    assert shape(world.step())[1][0] == (0, 0, 5)
    world.run()


def test_there_is_a_plan_while_somebody_can_go_on():
    world = World(num_pages=6)
    last = world.add(4, max_tokens=4, priority=1)
    first = world.add(20, max_tokens=1)
    world.step()
    assert world.scheduler.schedule().sequences == [first], "the last chunk of its prompt"
    assert (last.status, first.status) == (Status.WAITING, Status.RUNNING)


def test_nobody_starves_beside_a_stream_of_others():
    world = World(room=2, num_pages=30)
    slow = [world.add(30, adapter="c", max_tokens=12, priority=0), world.add(30, max_tokens=12)]
    for step in range(400):
        if step % 2 == 0 and len(world.live) < 12:
            world.add(6, adapter=(None, "a", "b")[step % 3], max_tokens=3)
        world.step()
        if all(s.status is Status.FINISHED for s in slow):
            break
    assert step < 60


class Pages(Bank):
    """Room for ``room`` rank pages; adapter "b" takes two."""

    def acquire(self, digest):
        used = sum(1 + (name == "b") for name in +self.held)
        if not self.held[digest] and used + 1 + (digest == "b") > self.room:
            return False
        self.held[digest] += 1
        return True


def test_an_adapter_of_many_rank_pages_does_not_starve_behind_small_ones():
    """Two rank pages: whenever one is given back, a small adapter is there that fits and the large one does not."""
    world = World(bank=Pages(2), prefill_seqs=2, max_num_seqs=4, prefill_tokens=24)
    large = None
    for i in range(60):
        # Of three chunks each, one begun in every call: one of the two pages is in use at any time.
        world.add(36, adapter=("a", "c")[i % 2], max_tokens=1)
        if i == 3:
            large = world.add(8, adapter="b", max_tokens=1)
        world.step()
        if large is not None and large.status is Status.FINISHED:
            break
    assert large is not None
    assert large.status is Status.FINISHED
    assert large.overtaken == 0, "another wait is counted anew"
    world.run()


def test_while_room_is_kept_for_one_those_without_adapters_go_on():
    world = World(room=1, prefill_seqs=2)
    world.add(60, adapter="a", max_tokens=1)
    world.step()
    waits = world.add(8, adapter="b", max_tokens=1)
    waits.overtaken = PATIENCE
    same, plain = world.add(8, adapter="a", max_tokens=1), world.add(8, max_tokens=1)
    world.step()
    assert (waits.status, same.status) == (Status.WAITING, Status.WAITING)
    assert plain.status is not Status.WAITING
    world.run()


def test_an_adapter_that_never_comes_holds_up_nobody_however_often_it_was_overtaken():
    world = World()
    world.bank.broken.add("a")
    stuck = world.add(8, adapter="a")
    stuck.overtaken = PATIENCE
    others = [world.add(8, adapter="b", max_tokens=1) for _ in range(6)]
    for _ in range(30):
        world.step()
    assert all(s.status is Status.FINISHED for s in others)
    world.finish(stuck)


def test_a_call_looks_at_few_of_very_many_that_find_no_room():
    world = World(room=1)
    world.add(60, adapter="a", max_tokens=1)
    world.step()
    for _ in range(1000):
        world.add(8, adapter="b", max_tokens=1)
    plain = world.add(8, max_tokens=1)
    asked, acquire = [], world.bank.acquire
    world.bank.acquire = lambda digest: asked.append(digest) or acquire(digest)
    world.step()
    assert 0 < len(asked) <= 100
    assert plain.status is not Status.WAITING, "nothing is missing for it"
    world.bank.acquire = acquire
    world.run(most=6000)


def test_decoding_takes_several_steps_while_those_that_wait_find_no_room():
    world = World(room=1)
    world.add(6, max_tokens=20)
    world.step()
    world.bank.broken.add("x")
    world.add(6, adapter="x")
    steps = [world.step() for _ in range(3)]
    assert any(step.repeats > 1 for step in steps), steps
