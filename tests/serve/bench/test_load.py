import itertools

import pytest
from fake_engine import FakeClock, FakeEngine

from preft_jax.text.chat import EncodedPrompt
from serve.bench.load import EngineTarget, LoadRequest
from serve.engine.request import Request

pytestmark = pytest.mark.host


def make_request(request):
    return Request(prompt=EncodedPrompt(request.prompt, ()), max_tokens=request.max_tokens)


def load(*requests, engine=None, **options):
    """Run ``(arrival, max_tokens[, first token])`` each; return the engine, the clock and the result."""
    clock = FakeClock()
    engine = (engine or FakeEngine)(clock)
    target = EngineTarget(engine, make_request, clock=clock, sleep=clock.sleep, **options)
    found = [
        LoadRequest(arrival=arrival, prompt=[*first, 1], max_tokens=count, user=i)
        for i, (arrival, count, *first) in enumerate(requests)
    ]
    return engine, clock, target.run(found)


def test_times_count_from_the_arrival_on_the_given_clock():
    # Steps of 1 s. The second arrives in the middle of a step and joins the one that begins at 2 s.
    _, _, result = load((0.0, 3), (1.5, 2))
    first, second = result.records
    assert first.times == (1.0, 2.0, 3.0)
    assert (first.ttft, first.tpot, first.e2el) == (1.0, 1.0, 3.0)
    assert second.sent == 1.5
    assert second.times == (1.5, 2.5)
    assert (second.ttft, second.tpot) == (1.5, 1.0)
    assert result.duration == 4.0


def test_it_sleeps_until_the_next_arrival_and_counts_the_wait():
    _, clock, result = load((0.0, 1), (5.0, 1))
    assert clock.slept == [1.0, 4.0, 1.0]
    assert [record.times for record in result.records] == [(1.0,), (1.0,)]
    assert result.duration == 6.0


def test_records_come_in_the_order_of_the_requests_not_of_arrival():
    _, _, result = load((3.0, 1), (0.0, 2))
    assert [record.sent for record in result.records] == [3.0, 0.0]
    assert [record.adapter for record in result.records] == [0, 1]


def test_no_more_than_max_concurrency_run_and_the_held_back_count_from_when_they_may():
    engine, _, result = load(*[(0.0, 2)] * 5, max_concurrency=2)
    assert engine.most == 2
    assert [record.sent for record in result.records] == [0.0, 0.0, 2.0, 2.0, 4.0]
    assert {record.ttft for record in result.records} == {1.0}


def test_a_request_that_is_not_held_back_counts_from_its_arrival_also_with_max_concurrency():
    _, _, result = load((0.0, 4), (0.5, 1), (1.7, 1), max_concurrency=3)
    assert [record.sent for record in result.records] == [0.0, 0.5, 1.7]


@pytest.mark.parametrize("most", [1, 3, 7])
def test_max_concurrency_holds_for_any_arrivals(rng, most):
    arrivals = rng.exponential(0.7, 40).cumsum()
    requests = [(float(at), int(rng.integers(1, 6))) for at in arrivals]
    engine, _, result = load(*requests, max_concurrency=most)
    assert engine.most <= most
    assert all(len(r.times) == count for r, (_, count) in zip(result.records, requests, strict=True))
    assert all(r.sent >= at for r, (at, _) in zip(result.records, requests, strict=True))
    # Ends and beginnings at one time are the same instant computed in two ways.
    changes = [(round(r.sent, 6), 1) for r in result.records] + [
        (round(r.sent + r.e2el, 6), -1) for r in result.records
    ]
    assert max(itertools.accumulate(step for _, step in sorted(changes))) <= most


def test_refused_failed_and_aborted_requests_are_records():
    faults = {13: "error", 14: "abort", 15: "refused"}
    requests = [(0.0, 2), *[(0.0, 2, token) for token in faults]]
    _, _, result = load(*requests, engine=lambda clock: FakeEngine(clock, faults=faults))
    assert [record.status for record in result.records] == ["completed", "failed", "aborted", "rejected"]
    assert [record.error for record in result.records] == [None, "broken", "broken", "refused"]
    assert len(result.completed) == 1


def test_a_load_without_requests_is_over_at_once():
    assert load()[2].duration == 0


def test_requests_that_the_engine_forgets_fail():
    class Forgetful(FakeEngine):
        def step(self):
            self.running.clear()
            return []

    _, _, result = load((0.0, 2), engine=Forgetful)
    assert result.records[0].status == "failed"
    assert "stopped before" in result.records[0].error


def test_an_interrupted_run_cancels_what_runs():
    made = []

    class Interrupted(FakeEngine):
        def step(self):
            made.append(self)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        load((0.0, 2), (0.0, 2), (9.0, 1), engine=Interrupted)
    assert made[0].cancelled == [1, 2]


def test_counters_are_the_numbers_of_the_engines_stats():
    engine, clock, _ = load((0.0, 2))
    assert EngineTarget(engine, make_request, clock=clock).counters() == {"recompiles": 0, "steps": 2}
