"""Background work: how long it may take, when the engine lets it run, and that no request notices."""

import pytest
from engine_outputs import TIGHT, advance, assert_as_alone, drain, request, some
from fake_engine import FakeClock

from serve.engine.background import RepeatedCall
from serve.engine.engine import Engine


class Work:
    """A function to call; ``seconds`` says how long each call takes, the last one again and again."""

    def __init__(self, *seconds, ends=None, breaks=None):
        self.clock, self.seconds, self.ends, self.breaks, self.calls = FakeClock(), seconds, ends, breaks, 0

    def __call__(self):
        self.clock.sleep(self.seconds[min(self.calls, len(self.seconds) - 1)])
        self.calls += 1
        if self.calls == self.breaks:
            raise ValueError("broken")
        return self.calls != self.ends

    def repeated(self):
        return RepeatedCall(self, self.clock)


def test_calls_are_made_while_the_next_is_expected_to_fit():
    work = Work(1.0)
    repeated = work.repeated()
    assert repeated.run(3.5)
    assert work.calls == 3
    assert repeated.run(0.5), "too little for a call, and there is more to do"
    assert work.calls == 3
    assert repeated.run(1.0)
    assert work.calls == repeated.calls == 4


def test_a_slow_call_is_expected_again_and_forgotten_by_halves():
    work = Work(4.0, 1.0)
    repeated = work.repeated()
    repeated.run(0.0)
    assert work.calls == 1
    repeated.run(3.9)
    assert work.calls == 1
    repeated.run(4.0)
    assert work.calls == 5, "4 s were expected of the first call, 2 of the second and 1 of the others"


@pytest.mark.parametrize("budget", [0.0, 0.3, 1.0, 2.7, 10.0])
def test_calls_of_the_same_length_never_take_more_than_the_budget(budget):
    work = Work(0.25)
    repeated = work.repeated()
    repeated.run(0.0)
    for _ in range(5):
        start = work.clock()
        repeated.run(budget)
        assert work.clock() - start <= budget + 1e-9


def test_it_ends_when_there_is_nothing_more_to_do():
    work = Work(1.0, ends=2)
    repeated = work.repeated()
    assert not repeated.run(10.0)
    assert not repeated.run(10.0)
    assert work.calls == 2
    assert repeated.error is None


def test_a_failure_stops_it_for_good_and_is_kept():
    work = Work(1.0, breaks=2)
    repeated = work.repeated()
    assert not repeated.run(10.0)
    assert not repeated.run(10.0)
    assert work.calls == 2
    assert str(repeated.error) == "broken"


def test_one_slow_first_call_does_not_end_the_work():
    work = Work(20.0, 0.05)
    repeated = work.repeated()
    for _ in range(1000):
        repeated.run(0.1)
    assert work.calls > 1


class Seen:
    """Background work that notes what it was given, and what the engine was doing."""

    def __init__(self):
        self.engine, self.given, self.in_flight, self.waiting = None, [], [], []

    def run(self, seconds):
        self.given.append(seconds)
        self.in_flight.append(bool(self.engine._calls))
        self.waiting.append(self.engine.has_work)
        return True


def seen_by(model, **seconds):
    seen = Seen()
    seen.engine = Engine(model, TIGHT, background=seen, **seconds)
    return seen, seen.engine


def test_an_idle_engine_gives_the_idle_seconds(lively):
    seen, engine = seen_by(lively, background_seconds=0.25, idle_seconds=0.5)
    for _ in range(3):
        assert engine.step() == []
    assert seen.given == [0.5] * 3


@pytest.mark.parametrize("between", [0.0, 0.25])
def test_work_runs_between_calls_and_changes_no_result(between, lively, adapters, rng):
    seen, engine = seen_by(lively, background_seconds=between, idle_seconds=0.5)
    requests = [request(some(rng, 20), adapters[kind], max_tokens=9, n=2) for kind in ("lora", "loreft", "lora_all")]
    numbers = [engine.add(one) for one in requests]
    wholes = drain(engine)
    for number, one in zip(numbers, requests, strict=True):
        assert_as_alone(lively, one, [wholes[number, i] for i in range(2)])
    assert not any(seen.in_flight), "the device is one queue"
    calls = engine.stats.prefill_calls + engine.stats.decode_calls
    assert [given for given in seen.given if given == 0.25] == [0.25] * (calls if between else 0)
    assert engine.stats.recompiles == 0


def test_outputs_do_not_wait_for_idle_work(lively, rng):
    seen, engine = seen_by(lively, idle_seconds=0.5)
    engine.add(request(some(rng, 9)))
    drain(engine)
    assert not any(seen.waiting)


def test_no_idle_work_while_a_request_is_running(lively, rng):
    seen, engine = seen_by(lively, idle_seconds=0.5)
    engine.add(request(some(rng, 9), max_tokens=20))
    advance(engine, {}, 3)
    assert seen.given == []


def test_work_that_fails_does_not_reach_the_engine(lively, rng):
    work = Work(0.01, breaks=3)
    engine = Engine(lively, TIGHT, background=work.repeated(), background_seconds=0.02, idle_seconds=0.02)
    one = request(some(rng, 9), max_tokens=12)
    number = engine.add(one)
    assert_as_alone(lively, one, [drain(engine)[number, 0]])
    assert work.calls == 3
