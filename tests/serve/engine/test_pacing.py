"""Other work beside requests: by a share, and by a promise of TTFT and TPOT, on a simulated device."""

import pytest

from bench.coserve_model import Units, kept, most, poisson, serve
from preft_jax.errors import ConfigError
from serve.engine.pacing import CallTimes, Promise, Reserve, Share
from serve.engine.plan import Chunk, Row, Step
from serve.engine.sequence import Sequence, Status

pytestmark = pytest.mark.host

TPOT, TTFT = 45, 5000
STEP_MS = 10


class World:
    """Sequences that decode, and the clock; a call takes 10 ms, and each ends behind the units that were given."""

    def __init__(self, pacing, count=1, max_tokens=1000):
        self.pacing, self.now, self.told = pacing, 0.0, 0.0
        self.running = [sequence(n, max_tokens) for n in range(count)]
        self.prefilling, self.waiting = [], []
        chunks = [Chunk(one, 0, 1, 0, True) for one in self.running]
        pacing.arrived(self.running, self.now)
        self.over(Step(chunks), 1)

    def over(self, step, tokens, ms=STEP_MS):
        self.now += ms / 1e3
        self.told = self.now
        for one in step.sampled:
            one.tokens += [0] * tokens
            if one.remaining == 0:
                one.status = Status.FINISHED
        self.pacing.collected(step, ms / 1e3, self.now)
        self.running = [one for one in self.running if one.status is Status.RUNNING]

    def decode(self, ms=STEP_MS, unit_ms=0.0, real_ms=None):
        """Run a decode step with as many units behind it as the pacing takes; returns their milliseconds."""
        step = Step(rows=[Row(one, 1) for one in self.running])
        for one in self.running:
            one.drawing = 1
        self.pacing.opened([step], self.now, self, self.now)
        units = 0
        while unit_ms and self.pacing.takes(unit_ms / 1e3):
            units += 1
        for one in self.running:
            one.drawing = 0
        self.over(step, 1, ms)
        for _ in range(units):
            took = (unit_ms if real_ms is None else real_ms) / 1e3
            self.now += took
            self.pacing.unit_over(unit_ms / 1e3, took, self.now)
        return units * unit_ms


def sequence(number, max_tokens=1000):
    return Sequence(
        request_id=number, order=number, tokens=[0], prompt_len=1, mask=None, max_tokens=max_tokens,
        status=Status.RUNNING,
    )  # fmt: skip


def promise(**changes):
    return Promise(**{"tpot_ms": TPOT, "ttft_ms": TTFT, **changes})


# What one call leaves.


def test_units_take_what_calls_leave_of_the_promised_time():
    """35 of 45 ms in the mean: 7 units of 5 ms a token."""
    world = World(promise())
    given = [world.decode(unit_ms=5) for _ in range(100)]
    assert sum(given) == pytest.approx(100 * (TPOT - STEP_MS), rel=0.05)
    assert world.told <= 0.01 + 100 * TPOT / 1e3, "no token is late"


def test_slack_that_was_saved_up_is_not_one_long_stall():
    world = World(promise())
    for _ in range(100):
        world.decode()
    given = [world.decode(unit_ms=5) for _ in range(5)]
    assert 2 * TPOT - 5 <= max(given) <= 2 * TPOT


def test_a_unit_that_is_longer_than_a_gap_runs_once_there_is_slack_for_it():
    world = World(promise())
    given = [world.decode(unit_ms=300) for _ in range(100)]
    assert given.count(300) == pytest.approx(100 * (TPOT - STEP_MS) / 300, abs=1.5)
    assert max(given) == 300
    assert given[:7] == [0] * 7, "it is not spent before it is earned"


def test_all_running_requests_count_and_none_that_only_waits_for_its_last_token():
    world = World(promise(), count=1)
    for _ in range(20):
        world.decode()
    young = sequence(1)
    world.running.append(young)
    world.over(Step([Chunk(young, 0, 1, 0, True)]), 1)
    given = world.decode(unit_ms=5)
    # One of its tokens is drawn by the step before the units: half of what it earns with the next one is kept.
    assert given <= 2 * TPOT - 2 * STEP_MS
    last = sequence(2, max_tokens=1)
    world.running = [last]
    last.drawing = 1
    step = Step([Chunk(last, 0, 1, 0, True)])
    world.pacing.opened([step], world.now, world, world.now)
    assert world.pacing.takes(0.2), "nobody is delayed"


def test_prompts_that_wait_go_first():
    world = World(promise())
    for _ in range(50):
        world.decode()
    for name in ("prefilling", "waiting"):
        setattr(world, name, [sequence(7)])
        assert world.decode(unit_ms=5) == 0
        setattr(world, name, [])
    assert world.decode(unit_ms=5) > 0


def test_who_is_still_to_come_gets_its_first_token_in_time():
    """Units are shorter than TTFT less what prompts wait alone, 300 ms here, and less the queue before them."""
    pacing = promise(ttft_ms=400, tpot_ms=1000)
    world = World(pacing)
    for number in range(100):
        other = sequence(10 + number, max_tokens=1)
        pacing.arrived([other], world.now - 0.29)
        world.over(Step([Chunk(other, 0, 1, 0, True)]), 1)
        world.decode()
    step = Step(rows=[Row(world.running[0], 1)])
    pacing.opened([step], world.now, world, world.now)
    assert not pacing.takes(0.15)
    assert pacing.takes(0.06)


def test_nothing_runs_while_serving_alone_is_slower_than_promised_and_it_begins_again_behind_it():
    world = World(promise(), max_tokens=10**6)
    for _ in range(30):
        assert world.decode(ms=60, unit_ms=5) == 0
    given = [world.decode(unit_ms=5) for _ in range(400)]
    assert given[0] == 0
    assert sum(given[-50:]) > 0


def test_a_request_that_cannot_catch_up_holds_up_nobody():
    world = World(promise(), count=1, max_tokens=60)
    world.now += 10.0
    world.pacing.unit_over(10.0, 10.0, world.now)
    for _ in range(20):
        world.decode()
    assert world.decode(unit_ms=5) > 0


def test_a_slowdown_bounds_what_units_add_to_a_request():
    world = World(promise(slowdown=0.1))
    for _ in range(20):
        world.decode()
    given = [world.decode(unit_ms=5) for _ in range(200)]
    assert sum(given) == pytest.approx(0.1 * 220 * STEP_MS, rel=0.1)


def test_a_slowdown_counts_what_steps_lose_beside_units():
    """Each takes longer behind a unit, by six tenths of that."""
    world = World(promise(slowdown=0.1))
    for _ in range(20):
        world.decode()
    before, given = world.now, 0.0
    for _ in range(600):
        given = world.decode(ms=STEP_MS + 0.6 * given, unit_ms=5)
    assert world.now - before == pytest.approx(600 * STEP_MS * 1.1 / 1e3, rel=0.02)


def test_units_that_take_longer_than_expected_are_believed():
    world = World(promise(), max_tokens=10**6)
    for _ in range(400):
        world.decode(unit_ms=5, real_ms=20)
    assert world.told <= 0.01 + 400 * TPOT / 1e3
    assert world.decode(unit_ms=5) <= 25


def test_a_broken_promise_raises_the_reserve_and_kept_ones_lower_it():
    reserve = Reserve(0.1, 0.05)
    for value in range(100):
        reserve.add(value / 1000)
    assert reserve.seconds == pytest.approx(0.09, abs=0.02)
    before = reserve.seconds
    reserve.ended(broke=True)
    assert reserve.seconds == pytest.approx(before + 0.045)
    for _ in range(9):
        reserve.ended(broke=False)
    assert reserve.seconds == pytest.approx(before)


def test_what_calls_take_is_looked_up_by_kind_and_size():
    times, rows = CallTimes(), [Row(sequence(n), 1) for n in range(64)]
    times.add(Step(rows=rows[:8], repeats=4), 0.04)
    times.add(Step(rows=rows, repeats=1), 0.02)
    assert times.of(Step(rows=rows[:7], repeats=2)) == pytest.approx(0.02), "of the nearest size"
    assert times.of(Step(rows=rows[:60])) == pytest.approx(0.02)
    assert times.of(Step([Chunk(sequence(0), 0, 9, 0, True)])) == 0.0, "nothing is known of its kind"


@pytest.mark.parametrize("wrong", [{"tpot_ms": 0}, {"ttft_ms": float("inf")}, {"slowdown": -1}, {"percentile": 1.0}])
def test_a_promise_is_of_numbers(wrong):
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        promise(**wrong)


# On a simulated device: the real scheduler, requests with random lengths that arrive at random.


CASES = {
    "light": {"rate": 1.0},
    "moderate": {"rate": 5.0},
    "heavy": {"rate": 9.0, "least": 0.5},
    "long units": {"rate": 3.0, "unit_ms": (200, 50)},
    "estimates that are too low": {"rate": 4.0, "guess": 0.1},
    "estimates that are too high": {"rate": 4.0, "guess": 10.0},
    "units that vary": {"rate": 4.0, "spread": 0.5},
    "first tokens within 400 ms": {"rate": 2.0, "tpot_ms": 120, "ttft_ms": 400},
    "short answers": {"rate": 4.0, "output": 12},
}


@pytest.mark.parametrize("case", CASES)
def test_a_promise_is_kept_and_units_get_most_of_what_is_left(case):
    """Serving alone keeps it always; 97 of 100 are promised. The bound is what exact decode steps would leave."""
    options = {
        "unit_ms": (8, 16), "guess": 1.0, "spread": 0.05, "tpot_ms": TPOT, "ttft_ms": TTFT, "output": 200, "least": 0.8,
    } | CASES[case]  # fmt: skip
    requests = poisson(options["rate"], 40, 800, options["output"], seed=len(case))
    tpot_ms, ttft_ms = options["tpot_ms"], options["ttft_ms"]
    alone, flights = serve(requests, Share(0.0), None)
    assert kept(flights, tpot_ms, ttft_ms) >= 0.99
    bound = most(alone, flights, tpot_ms)
    units = Units([ms / 1e3 for ms in options["unit_ms"]], guess=options["guess"], spread=options["spread"])
    world, flights = serve(requests, Promise(tpot_ms=tpot_ms, ttft_ms=ttft_ms), units)
    assert kept(flights, tpot_ms, ttft_ms) >= 0.97
    assert world.unit_seconds >= options["least"] * bound


def test_units_run_in_the_quiet_parts_of_a_load_that_comes_in_bursts():
    """40 requests a second for 2 of 15 seconds, else one in two seconds."""
    bursts = [
        (a + 15000 * n, p, o)
        for n in range(4)
        for a, p, o in poisson(40, 2, 800, 100, n) + poisson(0.5, 13, 800, 100, n)
    ]
    _, flights = serve(sorted(bursts), Share(0.0), None)
    before = kept(flights, TPOT, TTFT)
    world, flights = serve(sorted(bursts), Promise(tpot_ms=TPOT, ttft_ms=TTFT), Units([0.01]))
    assert kept(flights, TPOT, TTFT) >= min(before, 0.97) - 0.02
    assert world.unit_seconds > 0.5 * world.until / 1e3


def test_a_unit_longer_than_any_slack_runs_while_nothing_is_asked_for():
    requests = poisson(0.2, 60, 800, 20)
    world, _ = serve(requests, Promise(tpot_ms=TPOT, ttft_ms=500), Units([2.0]))
    assert world.unit_seconds > 20


def test_answers_too_short_for_any_unit_leave_it_the_moments_without_requests():
    """Answers of three tokens earn 110 ms of slack at most, and units take 150."""
    requests = [(20.0 * n, 100, 3) for n in range(2000)]
    world, flights = serve(requests, Promise(tpot_ms=TPOT, ttft_ms=TTFT), Units([0.15]))
    assert kept(flights, TPOT, TTFT) >= 0.97
    assert world.unit_seconds > 1
