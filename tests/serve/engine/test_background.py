"""Other device work: units in the engine's own queue, when they are started, and that no request notices."""

import threading

import jax
import jax.numpy as jnp
import pytest
from engine_outputs import TIGHT, assert_as_alone, drain, request, some
from fake_engine import FakeClock

from serve.engine.background import Background, Repeated, Unit, UnitCall
from serve.engine.calls import Call
from serve.engine.engine import Engine
from serve.engine.observer import Observer
from serve.engine.pacing import Promise, Share
from serve.engine.plan import Step
from serve.engine.under_way import UnderWay

STEP = Step()


class World:
    """No requests."""

    running = prefilling = waiting = ()


class Units:
    """Work of ``count`` units of so many seconds; notes what became of each."""

    def __init__(self, count=10**6, seconds=0.02, start=lambda params: jnp.zeros(3)):
        self.count, self.seconds, self.start = count, seconds, start
        self.given, self.took, self.errors = 0, [], []

    def next(self):
        if self.given == self.count:
            return None
        self.given += 1
        return Unit(start=self.start, seconds=self.seconds)

    def done(self, unit, seconds):
        self.took.append(seconds)

    def failed(self, unit, error):
        self.errors.append(error)


# When a unit is started.


@pytest.mark.parametrize(("share", "seconds", "calls"), [(0.5, 0.02, 2), (0.2, 0.02, 8), (0.2, 0.001, 1)])
def test_beside_requests_a_unit_is_due_once_its_time_was_earned(share, seconds, calls):
    """Calls of 10 ms each; half of the device's time is 10 ms for each of them, a fifth 2.5 ms."""
    background = Background(Units(seconds=seconds), Share(share))
    for _ in range(3):
        for _ in range(calls):
            background.opened([STEP], 0.0, World())
            assert background.beside() is None
            background.collected(STEP, 0.01)
        background.opened([STEP], 0.0, World())
        assert background.beside() is not None
        assert background.beside() is None, "never two between two calls"


def test_without_a_share_nothing_is_due_beside_requests():
    background = Background(Units(seconds=0.0), Share(0.0))
    background.collected(STEP, 100.0)
    background.opened([STEP], 0.0, World())
    assert background.beside() is None


def test_time_is_not_saved_up():
    background = Background(Units(seconds=0.02), Share(0.5))
    background.collected(STEP, 10.0)
    for given in (True, False):
        background.opened([STEP], 0.0, World())
        assert (background.beside() is not None) == given


def test_an_idle_engine_starts_the_next_unit_as_the_last_one_ends():
    clock = FakeClock()
    background = Background(Units(seconds=0.02), Share(0.0), clock)
    assert background.pause(None) == 0
    last = UnitCall(unit=background.idle(None), arrays=None, started=clock())
    assert background.idle(last) is None
    assert background.pause(last) == pytest.approx(0.02 - Background.MARGIN)
    clock.sleep(0.0195)
    assert background.pause(last) == 0
    assert not background.is_over(last), "another comes behind it"
    assert background.idle(last) is not None


def test_a_unit_that_the_host_starts_slowly_is_begun_earlier():
    """So much before the end of the last one as the last ones of its name took to be started, in the mean."""
    clock = FakeClock()
    background = Background(Units(seconds=0.02, start=lambda params: clock.sleep(0.008)), Share(0.0), clock)
    last = background.start(background.idle(None), None)
    for _ in range(8):
        last = background.start(background.idle(UnitCall(unit=last.unit, arrays=None, started=-1.0)), None)
    clock.sleep(0.001)
    assert background.pause(last) == pytest.approx(0.02 - 0.009 - 0.008 - Background.MARGIN, abs=1e-4)
    clock.sleep(0.003)
    assert background.idle(last) is not None


def started(steps, clock):
    """Start a step as an engine does, and end it; ``steps`` is what is under way."""
    call = Call(step=Step(), parts=[])
    call.started = clock()
    steps.started(call)
    return call


def test_a_step_is_planned_late_behind_units_that_hide_what_the_host_takes():
    clock = FakeClock()
    steps = UnderWay(Background(None, Share(0.0), clock), clock)

    def behind_a_unit(seconds, host):
        """One step ends before a unit, and the host takes so long to start the next."""
        steps.calls.clear()
        started(steps, clock)
        steps.calls.append(UnitCall(unit=Unit(start=None, seconds=seconds), arrays=None, started=clock()))
        steps.calls.popleft()
        steps.took(clock())
        covers = steps.covers
        clock.sleep(host)
        started(steps, clock)
        return covers

    assert behind_a_unit(0.005, host=0.008), "nothing was measured yet"
    assert [behind_a_unit(0.005, host=0.008) for _ in range(20)][-1] is False
    assert behind_a_unit(0.01, host=0.008)
    assert [behind_a_unit(0.005, host=0.002) for _ in range(20)][-1] is True


def test_there_is_nothing_to_wait_for_without_work():
    clock = FakeClock()
    for background in (Background(None, Share(0.5), clock), Background(Units(count=0), Share(0.5), clock)):
        assert background.pause(None) is None
        assert background.beside() is None
    background = Background(Units(count=1, seconds=0.02), Share(0.0), clock)
    last = UnitCall(unit=background.idle(None), arrays=None, started=clock())
    assert not background.is_over(last)
    clock.sleep(0.02)
    assert background.is_over(last)


def test_a_function_is_repeated_until_it_has_nothing_to_do():
    left = [1, 2, 3]
    work = Repeated(lambda params: left.pop() if left else None, seconds=0.5)
    seconds = []
    while (unit := work.next()) is not None:
        seconds.append(unit.seconds)
        unit.start(None)
        work.done(unit, 0.1)
    assert seconds == pytest.approx([0.5, 0.3, 0.2, 0.15])
    assert work.units == 3
    work = Repeated(lambda params: 1)
    work.failed(work.next(), ValueError("broken"))
    assert work.next() is None
    assert str(work.error) == "broken"


# In the engine.


def steps(engine, count):
    for _ in range(count):
        assert engine.step() == []


def test_an_idle_engine_gives_the_device_to_it(lively):
    work = Units(count=7, seconds=0.0)
    engine = Engine(lively, TIGHT, background=work)
    assert engine.pause == 0
    steps(engine, 20)
    assert len(work.took) == 7
    assert all(seconds >= 0 for seconds in work.took)
    assert engine.pause is None
    assert not engine.has_work


def test_units_get_the_engines_own_weights(lively):
    seen = []
    engine = Engine(lively, TIGHT, background=Units(count=1, seconds=0.0, start=lambda p: seen.append(p) or p["norm"]))
    steps(engine, 3)
    assert seen[0] is engine.runner.params


def test_at_most_one_unit_is_ahead_of_a_request_and_one_behind_that(lively, rng):
    """A unit that is under way when a request comes, and one that was started as that one ended."""
    over = threading.Event()

    class Long:
        def block_until_ready(self):
            over.wait()

    work = Units(seconds=1000.0, start=lambda params: Long())
    engine = Engine(lively, TIGHT, background=work)
    steps(engine, 5)
    assert work.given == 2, "one under way; the next is only looked at"
    assert engine.pause == Background.LONGEST_PAUSE, "it may be over sooner than expected"
    one = request(some(rng, 9), max_tokens=4)
    number = engine.add(one)
    assert engine.pause == 0
    engine.step()
    assert [step.kind for step in engine.under_way] == ["prefill"]
    over.set()
    assert_as_alone(lively, one, [drain(engine)[number, 0]])


def test_what_a_unit_took_is_known_however_late_the_engine_looks(lively):
    """It is expected to take 0.2 s: an idle engine need not look sooner, and would believe it for ever."""
    work, clock = Units(count=2, seconds=0.2, start=lambda params: jnp.zeros(3)), FakeClock()
    engine = Engine(lively, TIGHT, background=work, clock=clock)
    engine.step()
    engine._under_way.calls[0].over.result()
    assert engine.pause == 0, "it is over"
    clock.sleep(0.3)
    steps(engine, 4)
    assert work.took[0] == 0


class Order(Observer):
    """Notes how many units were given out when each step is started and collected."""

    def __init__(self, work):
        self.work, self.starts, self.ahead = work, [], 0

    def started(self, step, under_way):
        self.starts.append(self.work.given)
        self.ahead += len(under_way) == 1


@pytest.mark.parametrize("share", [0.0, 0.3, 0.9])
def test_beside_requests_it_gets_its_share_and_changes_no_result(share, lively, adapters, rng):
    work = Units(seconds=1e-5)
    order = Order(work)
    engine = Engine(lively, TIGHT, background=work, background_share=share, observer=order)
    requests = [request(some(rng, 20), adapters[kind], max_tokens=9, n=2) for kind in ("lora", "loreft", "lora_all")]
    numbers = [engine.add(one) for one in requests]
    wholes = drain(engine)
    for number, one in zip(numbers, requests, strict=True):
        assert_as_alone(lively, one, [wholes[number, i] for i in range(2)])
    between = [b - a for a, b in zip(order.starts, order.starts[1:], strict=False)]
    assert max(between) <= 1, "never two units between two calls"
    assert (sum(between) > 3) == (share > 0)
    assert order.ahead > 3, "calls are started ahead all the same"
    assert engine.stats.recompiles == 0


@pytest.mark.parametrize(("seconds", "least"), [(1e-5, 1), (1e-3, UnderWay.MOST + 2), (0.02, UnderWay.MOST + 2)])
def test_beside_a_promise_it_runs_between_steps_and_changes_no_result(seconds, least, lively, adapters, rng):
    """One unit after the other while there is room, if some together hide the host; one alone need not."""
    work = Units(count=100, seconds=seconds)
    order = Order(work)
    promise = Promise(tpot_ms=10000, ttft_ms=60000)
    engine = Engine(lively, TIGHT, background=work, background_pacing=promise, observer=order)
    requests = [request(some(rng, 20), adapters[kind], max_tokens=9, n=2) for kind in ("lora", "loreft", "lora_all")]
    numbers = [engine.add(one) for one in requests]
    wholes = drain(engine)
    for number, one in zip(numbers, requests, strict=True):
        assert_as_alone(lively, one, [wholes[number, i] for i in range(2)])
    between = [b - a for a, b in zip(order.starts, order.starts[1:], strict=False)]
    assert max(between) >= least
    assert engine.stats.recompiles == 0
    work.count = work.given
    steps(engine, 30)
    assert len(work.took) == work.given


def test_what_other_work_compiles_is_no_recompilation_of_the_engine(lively, rng):
    def start(params):
        compiled.append(jax.jit(lambda x: x + len(compiled))(jnp.zeros(3)))
        return compiled[-1]

    compiled = []
    work = Units(2, 1e-5, start)
    engine = Engine(lively, TIGHT, background=work, background_share=0.5)
    engine.add(request(some(rng, 20), max_tokens=9))
    drain(engine)
    steps(engine, 30)
    assert len(compiled) == len(work.took) == 2
    assert engine.stats.recompiles == 0


def test_tokens_of_the_call_before_a_unit_go_out_first(lively, rng):
    """A unit's results are waited for only once what was started before it has been told."""

    class Slow:
        def block_until_ready(self):
            raise AssertionError("waited for")

    work = Units(seconds=1e-9, start=lambda params: Slow())
    engine = Engine(lively, TIGHT, background=work, background_share=0.9)
    engine.add(request(some(rng, 9), max_tokens=3))
    told = []
    for _ in range(4):
        told += engine.step()
        if told:
            break
    assert told
    assert not work.errors


@pytest.mark.parametrize("where", ["start", "fetch"])
def test_work_that_fails_does_not_reach_the_engine(where, lively, rng):
    class Late:
        def block_until_ready(self):
            raise ValueError("broken")

    def start(params):
        if where == "start":
            raise ValueError("broken")
        return Late()

    work = Units(count=3, seconds=1e-9, start=start)
    engine = Engine(lively, TIGHT, background=work, background_share=0.5)
    one = request(some(rng, 9), max_tokens=12)
    number = engine.add(one)
    assert_as_alone(lively, one, [drain(engine)[number, 0]])
    steps(engine, 9)
    assert [str(error) for error in work.errors] == ["broken"] * 3
    assert engine.stats.device_failures == 0


def test_units_under_way_go_on_when_a_call_fails(lively, rng):
    class Failing(Observer):
        times = 0

        def collecting(self, step):
            if step.rows and not self.times:
                self.times += 1
                raise RuntimeError("broken")

    work = Units(seconds=1e-9)
    engine = Engine(lively, TIGHT, background=work, background_share=0.5, observer=Failing())
    one = request(some(rng, 9), max_tokens=12)
    number = engine.add(one)
    assert_as_alone(lively, one, [drain(engine)[number, 0]])
    assert engine.stats.device_failures == 1
    work.count = work.given
    steps(engine, 9)
    assert len(work.took) == work.given
    assert not work.errors


def test_a_share_is_a_part_of_the_whole(lively):
    with pytest.raises(ValueError, match="background_share is 1"):
        Engine(lively, TIGHT, background=Units(), background_share=1)
    promise = Promise(tpot_ms=50, ttft_ms=500)
    with pytest.raises(ValueError, match="both given"):
        Engine(lively, TIGHT, background=Units(), background_share=0.1, background_pacing=promise)
