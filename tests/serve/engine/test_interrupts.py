"""A KeyboardInterrupt at any line that the engine reaches: it begins anew, and says what was lost."""

import pytest
from engine_outputs import drain, some
from engine_runs import TIGHT, request
from interrupts import Interrupt, moments

from preft_jax import SamplingParams
from serve.engine.engine import Engine
from serve.engine.whole import INTERRUPTED

GREEDY = SamplingParams(temperature=0.0)


@pytest.fixture(scope="module")
def engine(lively):
    engine = Engine(lively, TIGHT)
    engine.warm_up()
    return engine


@pytest.fixture(scope="module")
def asked(adapters):
    return [
        request([5, 6, 7, 8, 9], adapters["lora"], max_tokens=4, sampling=GREEDY),
        request([1, 2, 3], None, max_tokens=5, sampling=GREEDY, n=2),
    ]


def served(engine, asked):
    """Serve requests by hand, as ``generate`` does; return the tokens and last output of each sample by its key."""
    numbers = [engine.add(one) for one in asked]
    return collect(engine, numbers, asked, {})


def collect(engine, numbers, asked, found):
    while engine.has_work:
        take(engine.step(), found)
    return [found[n, i] for n, one in zip(numbers, asked, strict=True) for i in range(one.n)]


def take(outputs, found):
    for output in outputs:
        tokens, last = found.get((output.request_id, output.index), ([], None))
        assert last is None or last.finish_reason is None, "something comes behind a sample's last output"
        found[output.request_id, output.index] = (tokens + output.token_ids, output)


def interrupted(engine, asked, at):
    """Serve requests with an interrupt at a line; return what each sample got, and where it was raised."""
    found, numbers = {}, []
    with Interrupt(at) as interrupt:
        try:
            for one in asked:
                numbers.append(engine.add(one))
            while engine.has_work:
                outputs = engine.step()
                take(outputs, found)
        except KeyboardInterrupt:
            pass
    while engine.has_work:
        take(engine.step(), found)
    return numbers, found, interrupt


@pytest.fixture(scope="module")
def whole(engine, asked):
    """What the requests get, uninterrupted, and the lines on the way, once nothing is compiled or cached any more."""
    expected = [tokens for tokens, _ in served(engine, asked)]
    with Interrupt() as counted:
        served(engine, asked)
    return expected, counted.places


def check(engine, asked, expected, at):
    numbers, found, interrupt = interrupted(engine, asked, at)
    keys = [(n, i) for n, one in zip(numbers, asked, strict=False) for i in range(one.n)]
    known, tokens = set(keys), dict(zip(keys, expected, strict=False))
    assert set(found) <= known, interrupt.raised
    for key in known:
        own, last = found[key]
        assert last.finish_reason in ("length", "stop", "abort"), interrupt.raised
        assert own == tokens[key][: len(own)], interrupt.raised
        if last.finish_reason == "abort":
            assert last.error == INTERRUPTED
        else:
            assert own == tokens[key], interrupt.raised
    assert [tokens for tokens, _ in served(engine, asked)] == expected, interrupt.raised
    assert not engine.has_work
    assert engine.scheduler.num_running == engine.scheduler.num_waiting == engine.pages.num_used == 0
    return interrupt.raised


def test_an_interrupt_anywhere(engine, asked, whole, rng):
    """Some of the lines, others with each seed; the slow test takes all."""
    expected, places = whole
    some_of = rng.choice(moments(places, rng), 80, replace=False)
    assert len({check(engine, asked, expected, at) for at in some_of}) > 60


@pytest.mark.slow
def test_an_interrupt_at_every_line(engine, asked, whole, rng):
    expected, places = whole
    seen = {check(engine, asked, expected, at) for at in moments(places, rng)}
    assert seen == set(places)


def test_what_was_lost_is_said(engine, asked, whole, monkeypatch):
    """The cases that were seen: at a launch, and while adapters are packed; outputs that were not returned are lost."""
    expected, _ = whole
    for owner, name in ((engine._starter, "start"), (engine.runner, "decode"), (engine.runner, "draw")):
        with monkeypatch.context() as patch:

            def stop(*_, **__):
                raise KeyboardInterrupt

            patch.setattr(owner, name, stop)
            numbers = [engine.add(one) for one in asked]
            with pytest.raises(KeyboardInterrupt):
                drain(engine)
        lost = {}
        assert engine.has_work
        take(engine.step(), lost)
        assert {(output.finish_reason, output.error) for _, output in lost.values()} == {("abort", INTERRUPTED)}
        assert {key[0] for key in lost} == set(numbers)
        assert [tokens for tokens, _ in served(engine, asked)] == expected


def test_an_interrupted_generate_leaves_an_engine_that_serves(engine, asked, whole, monkeypatch):
    expected, _ = whole
    calls = []

    def stop(*args, **options):
        calls.append(args)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(engine.runner, "copy_adapters", stop)
        patch.setattr(engine.runner, "prefill", stop)
        with pytest.raises(KeyboardInterrupt):
            engine.generate(asked)
    assert calls
    assert not engine.has_work
    assert [one.token_ids for one in engine.generate(asked)] == expected


def test_adapters_that_are_kept_stay_kept(lively, adapters, rng, monkeypatch):
    engine = Engine(lively, TIGHT)
    engine.load_adapters([adapters["lora"]])
    with monkeypatch.context() as patch:
        patch.setattr(engine.runner, "prefill", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        engine.add(request(some(rng, 5)))
        with pytest.raises(KeyboardInterrupt):
            engine.step()
    drain(engine)
    assert engine.adapters.knows(adapters["lora"].digest)
