"""A device call that fails takes down nobody but the request that it fails for."""

import dataclasses

import jax
import numpy as np
import pytest
from engine_outputs import TIGHT, Whole, advance, alone, assert_as_alone, drain, lettered, request, some

from preft_jax import Adapter, SamplingParams, random_adapter
from preft_jax.adapters.allocator import BankAllocator
from preft_jax.adapters.bank import init_bank, write_adapter
from preft_jax.adapters.config import AdapterConfig
from preft_jax.adapters.pages import pack_adapter
from preft_jax.sampling.device import INVALID
from preft_jax.text.streams import TextStream
from serve.engine.engine import Engine
from serve.engine.observer import Observer
from serve.engine.residency import Load
from serve.engine.runner import Runner
from serve.store.host_copy import pack

pytestmark = pytest.mark.usefixtures("rows_apart")


class BrokenError(RuntimeError):
    """What a device raises here."""


class Faults(Observer):
    """Lets a call of the device fail whenever ``breaks`` says so of its sequences; ``times`` counts."""

    def __init__(self, call, breaks):
        self.call, self.breaks, self.times, self.active = call, breaks, 0, True

    def calling(self, operation, sequences):
        self.look(operation, sequences)

    def collecting(self, step):
        self.look("fetch", step.sequences)

    def writing(self, digests):
        self.look("write_adapters", digests)

    def look(self, operation, what):
        if self.active and operation == self.call and self.breaks(what):
            self.times += 1
            raise BrokenError(f"in {operation}")


def breaking(model, call, breaks, config=TIGHT):
    """Return an engine whose device fails, and what makes it fail."""
    faults = Faults(call, breaks)
    return Engine(model, config, observer=faults), faults


def apart(engine):
    """Let rows with and without all-token adapters be decoded by two calls."""
    engine.warm_up()
    engine.runner.step_seconds = {name: float("adapted" in name) for name in engine.runner.programs}


def mixed(rng, adapters):
    """Return requests of every kind; their first two share a prefill call."""
    kinds = (None, "lora", "direft", None, "lora_all", "lora_skip", "loreft")
    samplings = (SamplingParams(temperature=0.0), SamplingParams(seed=4), lettered(2))
    return [
        request(some(rng, 5 + 4 * i), adapters.get(kind), sampling=samplings[i % 3], max_tokens=6 + i, n=1 + (i == 3))
        for i, kind in enumerate(kinds)
    ]


def serve(engine, requests):
    """Return the samples of each request, whatever becomes of them."""
    numbers = [engine.add(one) for one in requests]
    wholes = drain(engine)
    assert engine.stats.recompiles == 0
    return [[wholes[number, i] for i in range(one.n)] for number, one in zip(numbers, requests, strict=True)]


def assert_others_as_alone(model, requests, samples, bad):
    for at, (one, group) in enumerate(zip(requests, samples, strict=True)):
        if at not in bad:
            assert_as_alone(model, one, group)


@pytest.mark.parametrize(
    ("call", "which"),
    [(call, which) for call in ("prefill", "decode", "draw") for which in (0, 1, 3)]
    + [("decode_adapted", 4), ("prefill", 4)],
)
def test_a_request_whose_calls_fail_ends_alone(call, which, lively, adapters, rng):
    requests = mixed(rng, adapters)
    engine, faults = breaking(lively, call, lambda sequences: any(s.request_id == which for s in sequences))
    apart(engine)
    samples = serve(engine, requests)
    assert_others_as_alone(lively, requests, samples, {which})
    for whole in samples[which]:
        assert whole.finish_reason == "error"
        assert f"BrokenError: in {call}" in whole.error
    assert engine.stats.device_failures >= faults.times > 0
    assert engine.stats.failed == len(samples[which])


def test_a_request_that_fails_at_the_fetch_ends_alone(lively, adapters, rng):
    requests = mixed(rng, adapters)
    requests[1] = dataclasses.replace(requests[1], max_tokens=25)
    engine, _ = breaking(
        lively, "fetch", lambda sequences: any(s.request_id == 1 and s.generated > 2 for s in sequences)
    )
    samples = serve(engine, requests)
    assert_others_as_alone(lively, requests, samples, {1})
    (whole,) = samples[1]
    assert whole.finish_reason == "error"
    assert "in fetch" in whole.error
    assert whole.token_ids == alone(lively, requests[1]).token_ids[: len(whole.token_ids)]
    assert len(whole.token_ids) > 2, "what it had is kept"


def cannot_write(model, adapter):
    """Return an engine that cannot write an adapter to the bank."""
    return breaking(model, "write_adapters", lambda digests: adapter.digest in digests)[0]


def test_an_adapter_that_cannot_be_written_fails_only_its_requests(lively, adapters, rng):
    requests = [
        request(some(rng, 9 + i), adapters.get(kind)) for i, kind in enumerate((None, "lora", "direft", "lora"))
    ]
    engine = cannot_write(lively, adapters["lora"])
    samples = serve(engine, requests)
    assert_others_as_alone(lively, requests, samples, {1, 3})
    for which in (1, 3):
        assert samples[which][0].finish_reason == "error"
        assert "in write_adapters" in samples[which][0].error


def test_an_adapter_that_cannot_be_written_ahead_fails_nobody_else(lively, adapters, rng):
    requests = [request(some(rng, 6), max_tokens=8) for _ in range(TIGHT.max_num_seqs)]
    requests.append(request(some(rng, 6), adapters["lora"]))
    engine = cannot_write(lively, adapters["lora"])
    assert_others_as_alone(lively, requests, serve(engine, requests), {6})


def test_a_cancelled_prompt_with_an_adapter_fails_no_call(lively, adapters, rng):
    requests = [request(some(rng, 6), max_tokens=8 + i) for i in range(2 * TIGHT.max_num_seqs)]
    engine = Engine(lively, TIGHT)
    numbers = [engine.add(one) for one in requests]
    engine.cancel(engine.add(request(some(rng, 6), adapters["lora"])))
    wholes = drain(engine)
    assert engine.stats.device_failures == 0
    for number, one in zip(numbers, requests, strict=True):
        assert_as_alone(lively, one, [wholes[number, 0]])


@pytest.mark.parametrize("call", ["prefill", "decode", "draw", "write_adapters", "copy_pages", "fetch"])
@pytest.mark.parametrize("nth", [1, 2, 3])
def test_after_a_call_that_fails_once_everybody_finishes(call, nth, lively, adapters, rng):
    requests = mixed(rng, adapters)
    calls = [0]

    def once(what):
        several = call in ("write_adapters", "copy_pages") or len(what) > 1
        calls[0] += several
        return several and calls[0] == nth

    engine, _ = breaking(lively, call, once)
    apart(engine)
    assert_others_as_alone(lively, requests, serve(engine, requests), ())
    assert engine.stats.device_failures == (calls[0] >= nth)


def test_one_request_alone_survives_a_call_that_fails_once(lively, rng):
    one, tries = request(some(rng, 9), max_tokens=9), iter([False, True])
    engine, _ = breaking(lively, "decode", lambda sequences: next(tries, False))
    assert_as_alone(lively, one, serve(engine, [one])[0])


@pytest.mark.parametrize("call", ["prefill", "decode", "draw"])
def test_if_every_call_fails_every_request_ends(call, lively, adapters, rng):
    requests = mixed(rng, adapters)
    engine, faults = breaking(lively, call, lambda sequences: True)
    apart(engine)
    for group, one in zip(serve(engine, requests), requests, strict=True):
        everywhere = one.adapter is not None and not one.adapter.config.prefill_only
        for whole in group:
            assert whole.finish_reason == "error" or (everywhere and call == "decode")
    faults.active = False
    assert_others_as_alone(lively, requests, serve(engine, requests), ())


@pytest.mark.parametrize(
    "most",
    [
        4,
        100,
    ],
)
def test_a_request_that_fails_in_its_second_chunk_ends_while_others_keep_coming(most, lively, adapters, rng):
    engine, _ = breaking(
        lively, "prefill", lambda sequences: any(s.request_id == 0 and s.computed > 0 for s in sequences)
    )
    bad = engine.add(request(some(rng, 30), adapters["lora"]))
    wholes = {}
    for _ in range(60):
        if len(engine._live) < most:
            engine.add(request(some(rng, 5), max_tokens=3))
        advance(engine, wholes)
        if (bad, 0) in wholes:
            break
    failures = engine.stats.device_failures
    drain(engine, wholes)
    assert wholes[bad, 0].finish_reason == "error"
    assert failures < 10


# Logits that are no numbers.


def overflowing(adapter):
    """Return an adapter of finite numbers that are too large to be multiplied."""
    return Adapter(adapter.config, jax.tree.map(lambda leaf: np.full_like(leaf, 1e19), adapter.params))


@pytest.mark.parametrize("kind", ["lora", "direft_free", "lora_all"])
def test_an_adapter_whose_numbers_overflow_fails_only_its_requests(kind, lively, adapters, rng):
    requests = mixed(rng, adapters)
    requests.insert(2, request(some(rng, 9), overflowing(adapters[kind]), max_tokens=4))
    engine = Engine(lively, TIGHT)
    for _ in range(2):
        samples = serve(engine, requests)
        (whole,) = samples[2]
        assert whole.finish_reason == "error"
        assert "logits are not numbers" in whole.error
        assert_others_as_alone(lively, requests, samples, {2})
    assert engine.stats.device_failures == 0


class Invalid(Observer):
    """Lets the first draw of each call be of logits that are no numbers, for some sequences."""

    def __init__(self, of, step=0):
        self.of, self.step = of, step

    def collected(self, sequences, drawn):
        tokens = np.array(drawn.token_NB)
        rows = [row for row, sequence in enumerate(sequences) if self.of(sequence)]
        if len(tokens) > self.step:
            tokens[self.step, rows] = INVALID
        return drawn._replace(token_NB=tokens)


@pytest.mark.parametrize("least", [0, 3])
def test_a_row_that_draws_nothing_ends_and_keeps_what_it_had(least, lively, adapters, rng):
    requests = mixed(rng, adapters)
    engine = Engine(lively, TIGHT, observer=Invalid(lambda s: s.request_id == 0 and s.generated >= least))
    samples = serve(engine, requests)
    (whole,) = samples[0]
    assert whole.finish_reason == "error"
    assert "logits are not numbers" in whole.error
    assert len(whole.token_ids) >= least
    assert whole.token_ids == alone(lively, requests[0]).token_ids[: len(whole.token_ids)]
    assert_others_as_alone(lively, requests, samples, {0})


def test_a_prompt_that_once_had_no_numbers_can_be_asked_again(lively, rng):
    one = request(some(rng, 24))
    engine = Engine(lively, TIGHT)
    number = engine.add(one)
    engine.step()  # Its first chunk is computed.
    engine.runner.cache = jax.tree.map(lambda x: x * np.nan, engine.runner.cache)
    assert drain(engine)[number, 0].finish_reason == "error"
    number = engine.add(one)
    assert_as_alone(lively, one, [drain(engine)[number, 0]])


def test_a_stop_text_before_the_failure_ends_the_sample_well(lively, rng):
    one = request(some(rng, 9), sampling=lettered(3), max_tokens=16)
    stopping = dataclasses.replace(one, stop=(alone(lively, one).text[1:3],))
    config = dataclasses.replace(TIGHT, decode_steps=8)  # Two calls of four steps.
    engine = Engine(lively, config, observer=Invalid(lambda s: s.generated, step=3))
    assert_as_alone(lively, stopping, serve(engine, [stopping])[0])


# Too few pages.


def test_all_finish_when_pages_run_out(lively, adapters, rng):
    requests = [
        request(some(rng, 20), adapters[kind] if kind else None, max_tokens=40)
        for kind in (None, "lora", "lora_all", None, "loreft", None)
    ]
    engine = Engine(lively, TIGHT)
    samples = serve(engine, requests)
    assert engine.stats.preemptions > 3
    assert_others_as_alone(lively, requests, samples, ())


def test_a_sample_has_one_last_output_even_after_failures(lively, adapters, rng):
    requests = mixed(rng, adapters)
    counter = iter(range(10**6))
    engine, _ = breaking(lively, "decode", lambda sequences: next(counter) % 3 == 0)
    numbers = [engine.add(one) for one in requests]
    wholes: dict[tuple[int, int], Whole] = {}
    drain(engine, wholes)
    assert set(wholes) == {(number, i) for number, one in zip(numbers, requests, strict=True) for i in range(one.n)}
    for (number, i), whole in wholes.items():
        other = alone(lively, requests[number], i).token_ids
        assert whole.token_ids == other[: len(whole.token_ids)]
        assert whole.finish_reason == "error" or whole.token_ids == other


def test_a_text_that_cannot_be_made_ends_its_own_sample_only(lively, rng, monkeypatch):
    requests = [request(some(rng, 7 + i), max_tokens=8) for i in range(3)]
    engine = Engine(lively, TIGHT)
    texts, push, make = [], TextStream.push, TextStream.__init__

    def made(self, *args, **options):
        make(self, *args, **options)
        texts.append(self)

    monkeypatch.setattr(TextStream, "__init__", made)
    numbers = [engine.add(one) for one in requests]

    def broken(self, token_ids):
        if self is texts[1]:
            raise BrokenError("no such character")
        return push(self, token_ids)

    monkeypatch.setattr(TextStream, "push", broken)
    wholes = drain(engine)
    assert wholes[numbers[1], 0].finish_reason == "error"
    assert "no such character" in wholes[numbers[1], 0].error
    for i in (0, 2):
        assert_as_alone(lively, requests[i], [wholes[numbers[i], 0]])


def test_after_a_failure_the_old_cache_and_bank_are_gone_before_new_ones_are_made(lively, monkeypatch):
    runner = Engine(lively, TIGHT).runner
    old = jax.tree.leaves((runner.cache, runner.bank))
    make = runner._new_cache

    def look():
        assert all(array.is_deleted() for array in old)
        return make()

    monkeypatch.setattr(runner, "_new_cache", look)
    runner.reset()
    assert not any(array.is_deleted() for array in jax.tree.leaves((runner.cache, runner.bank)))


def test_a_load_of_an_adapter_that_had_to_go_again_is_not_carried_out(lively, tiny):
    """Its page belongs to another by then, and a call must not write a page twice."""
    engine = Engine(lively, dataclasses.replace(TIGHT, bank_pages=2))
    adapters = [random_adapter(AdapterConfig(rank=8), tiny.config, jax.random.key(i)) for i in range(2)]
    first, second = map(engine.adapters.keep, adapters)
    assert engine.adapters.acquire(first)
    engine.adapters.release(first)
    assert engine.adapters.acquire(second)
    assert [entry.digest for entry in engine.adapters.unwritten] == [second]


@pytest.mark.parametrize(("dtype", "writes"), [("float32", 1), ("bfloat16", 8), ("fp8", 2)])
def test_pages_written_together_are_those_written_one_by_one(writes, dtype, lively, adapters):
    """Five adapters of many kinds at once, as on an accelerator; c keeps its float32 bits in a bfloat16 bank."""
    own = "bfloat16" if dtype == "fp8" else dtype
    model = dataclasses.replace(lively, params=jax.tree.map(lambda leaf: leaf.astype(own), lively.params))
    config = dataclasses.replace(TIGHT, bank_pages=12, adapter_dtype="fp8" if dtype == "fp8" else None)
    runner = Runner(model, config.resolve("cpu"))
    runner.rank_pages.writes = writes
    runner.programs = runner._name_programs(key=(dtype, writes))
    allocator, loads = BankAllocator(12), []
    expected = init_bank(model.config, 12, runner.dtype)
    for kind in ("lora", "direft", "loreft", "loreft_f3l2", "lora_r24"):
        edits = pack_adapter(adapters[kind], model.config, runner.adapter_dtype)
        place = allocator.allocate(edits)
        loads.append(Load(kind, pack(edits).slabs, place))
        expected = write_adapter(expected, edits, place)
    runner.write_adapters(loads)
    for ours, theirs in zip(jax.tree.leaves(runner.bank), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(ours, theirs)
