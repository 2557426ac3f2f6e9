"""The engine starts a call while the one before it is under way, and every request gets what it gets alone.

Alone here means in an engine that never has two calls under way.
"""

import collections
import dataclasses

import numpy as np
import pytest
from engine_outputs import (
    LETTERS,
    TIGHT,
    advance,
    assert_released,
    by_itself,
    drain,
    lettered,
    request,
    run_one,
    some,
)  # fmt: skip
from engine_runs import STEPS, assert_is_reference

from preft_jax import SamplingParams
from serve.engine.engine import Engine
from serve.engine.runner import MAX_STOP_IDS, Runner
from serve.engine.scheduler import Decode, Prefill, Scheduler


class Nothing:
    """Background work that has nothing to do."""

    def run(self, seconds):
        return False


def by_turns(model):
    """Return an engine that has one call under way at most."""
    return Engine(model, TIGHT, background=Nothing(), background_seconds=1e-9)


def kind(plan):
    """Return what a call is; "further" goes on with the rows of the call before it."""
    if isinstance(plan, Prefill):
        return "prefill"
    return "decode" if plan.drawing is None else "further"


class Watched:
    """An engine of which we know what each call was, and what was under way when it started."""

    def __init__(self, engine):
        self.engine, self.started, self.wholes = engine, [], {}
        self.ended_in_flight, self.wrong, self.behind_two, self.starting = set(), [], 0, False
        self._start = engine._starter.start
        engine._starter.start = self.start
        self._prepare = engine._starter.prepare
        engine._starter.prepare = self.prepare

    def start(self, plan, before, **options):
        # The engine takes what is raised here for a failure of the device.
        if list(self.engine._calls) != ([] if before is None else [before]):
            self.wrong.append("more than two calls")
        apart = any(s.cohort is not None for group in self.engine._live.values() for s in group)
        if apart and (before is not None or len({s.cohort for s in plan.sequences}) > 1):
            self.wrong.append("those whose call failed do not run apart from others")
        self.starting = True
        call = self._start(plan, before, **options)
        self.starting = False
        self.started.append((before and kind(before.plan), kind(plan)))
        return call

    def prepare(self, plan):
        if not self.starting:
            self.behind_two += 1
            if [kind(call.plan) for call in self.engine._calls] != ["prefill"]:
                self.wrong.append("it should have been started at once")
        return self._prepare(plan)

    def count(self, before, plan):
        return self.started.count((before, plan))

    @property
    def rows(self):
        """Samples in the calls that are under way."""
        return [(s.request_id, s.index) for call in self.engine._calls for s in call.plan.sequences]

    def step(self):
        before = {key for key, whole in self.wholes.items() if whole.finish_reason}
        advance(self.engine, self.wholes)
        assert not self.wrong
        ended = {key for key, whole in self.wholes.items() if whole.finish_reason} - before
        self.ended_in_flight |= ended & {*self.rows}

    def serve(self, requests, steps=()):
        """Return the samples of each request, the i-th added at step ``steps[i]``, or at once."""
        numbers, steps = [], [*steps, *[0] * (len(requests) - len(steps))]
        assert steps == sorted(steps)
        for step in range(STEPS):
            while len(numbers) < len(requests) and steps[len(numbers)] <= step:
                numbers.append(self.engine.add(requests[len(numbers)]))
            self.step()
            if len(numbers) == len(requests) and not self.engine.has_work:
                break
        assert_released(self.engine)
        assert self.engine.stats.recompiles == 0
        return [[self.wholes[n, i] for i in range(one.n)] for n, one in zip(numbers, requests, strict=True)]


@pytest.fixture
def watched(lively):
    return Watched(Engine(lively, TIGHT))


_alone: dict = {}


def alone(model, one, index=0):
    """Return one sample of a request as a fresh engine gives it that has one call under way at most."""
    if (one, index) not in _alone:
        _alone[one, index] = run_one(by_turns(model), by_itself(one, index))
    return _alone[one, index]


def assert_as_alone(model, requests, samples):
    for one, group in zip(requests, samples, strict=True):
        for index, whole in enumerate(group):
            other = alone(model, one, index)
            assert whole.token_ids == other.token_ids
            assert (whole.text, whole.finish_reason) == (other.text, other.finish_reason)
            assert (whole.stop_reason, whole.error) == (other.stop_reason, None)
            # Float32 rounding: beside others the same row is computed in a batch of another size.
            np.testing.assert_allclose(whole.logprobs, other.logprobs, atol=1e-4)
            assert [[*top.top] for top in whole.tops] == [[*top.top] for top in other.tops]


# How often it is ahead.


def test_over_a_long_decode_most_calls_start_while_another_is_under_way(watched, lively, rng):
    requests = [request(some(rng, 8), max_tokens=40, seed=i, sampling=SamplingParams(ignore_eos=True)) for i in (0, 1)]
    assert_as_alone(lively, requests, watched.serve(requests))
    assert watched.engine.stats.preemptions == 0
    alone_in_flight = [plan for before, plan in watched.started if before is None]
    assert alone_in_flight == ["prefill", "decode"]
    assert watched.count("further", "further") > 15


def test_with_background_seconds_two_calls_are_never_under_way(lively, rng):
    watched = Watched(by_turns(lively))
    requests = [request(some(rng, 30), max_tokens=20, seed=i) for i in range(3)]
    watched.serve(requests, steps=[0, 4, 9])
    assert {before for before, _ in watched.started} == {None}
    assert len(watched.started) > 15


def test_background_work_that_gets_idle_time_only_does_not_keep_calls_apart(lively, rng):
    watched = Watched(Engine(lively, TIGHT, background=Nothing()))
    watched.serve([request(some(rng, 8), max_tokens=20)])
    assert watched.count("further", "further") > 5


# What is in calls that overlap.


def test_prompts_that_arrive_while_calls_are_under_way(watched, lively, adapters, rng):
    """Of several chunks, with adapters that have to be loaded, and with too few pages for all."""
    kinds = (None, "lora", "direft", None, "lora_r24", "lora_all", "loreft", None, "loreft_all", "lora")
    requests = [
        request(some(rng, 9 + 11 * i % 32), adapters.get(kind), max_tokens=8 + 3 * i % 17, seed=i,
                sampling=SamplingParams(temperature=0.5 * (i % 3)))
        for i, kind in enumerate(kinds)
    ]  # fmt: skip
    assert_as_alone(lively, requests, watched.serve(requests, steps=[0, 0, 3, 6, 7, 15, 16, 22, 30, 31]))
    pairs = collections.Counter(watched.started)
    for pair in (("prefill", "decode"), ("decode", "prefill"), ("decode", "further"), ("further", "further")):
        assert pairs[pair] > 0, pairs
    assert watched.engine.stats.preemptions > 0


def test_prompts_that_fill_prefill_calls(lively, adapters, rng):
    """Their calls are started two ahead, with adapters that have to make room for each other, and in chunks."""
    kinds = (None, "lora", "direft", "lora", None, "loreft")
    requests = [
        request(some(rng, 5 + 7 * i % 40), adapters.get(kinds[i % len(kinds)]), max_tokens=1 + i % 3, seed=i,
                sampling=SamplingParams(temperature=0.5 * (i % 3)))
        for i in range(18)
    ]  # fmt: skip
    watched = Watched(Engine(lively, dataclasses.replace(TIGHT, max_num_seqs=8, num_kv_pages=60, bank_pages=9)))
    copy, copied = watched.engine.runner.copy_adapters, collections.Counter()

    def copy_adapters(loads):
        copied.update(load.digest for load in loads)
        return copy(loads)

    watched.engine.runner.copy_adapters = copy_adapters
    assert_as_alone(lively, requests, watched.serve(requests))
    assert watched.behind_two > 1
    assert copied == {adapters[kind].digest: 1 for kind in kinds if kind is not None}
    assert watched.count("prefill", "prefill") > 0


def test_penalties_bias_seeds_and_log_probabilities_go_on_from_call_to_call(watched, lively, adapters, rng):
    samplings = (
        SamplingParams(temperature=0.0, presence_penalty=1.5, repetition_penalty=1.7, ignore_eos=True),
        SamplingParams(temperature=0.8, frequency_penalty=1.0, presence_penalty=-1.0, ignore_eos=True),
        SamplingParams(temperature=1.2, repetition_penalty=0.7, logit_bias={5: 6.0, 9: -100}, ignore_eos=True),
        SamplingParams(temperature=1.0, seed=7, ignore_eos=True),
    )
    requests = [
        request(some(rng, 5), adapters["lora"] if i == 1 else None, sampling=sampling, seed=i, max_tokens=19,
                logprobs=3 if i == 2 else None)
        for i, sampling in enumerate(samplings)
    ]  # fmt: skip
    samples = watched.serve(requests)
    assert_as_alone(lively, requests, samples)
    for one, (whole,) in zip(requests, samples, strict=True):
        whole.top_logprobs = whole.tops
        whole.sampling_logprobs = [p for output in whole.outputs for p in output.sampling_logprobs]
        assert_is_reference(lively, one, whole)
    assert watched.count("further", "further") > 5


@pytest.mark.parametrize("merged", [False, True])
def test_all_token_adapters_and_plain_rows_go_on_together_and_apart(merged, watched, lively, adapters, rng):
    kinds = (None, "lora_all", "lora", "loreft_all")
    requests = [
        request(some(rng, 4 + i), adapters.get(kind), sampling=SamplingParams(seed=i, ignore_eos=True), max_tokens=18)
        for i, kind in enumerate(kinds)
    ]
    engine = watched.engine
    engine.warm_up()
    for name in engine.runner.programs:
        engine.runner.step_seconds[name] = 1.0 if merged else float("adapted" in name)
    parts = set()
    real = watched._start

    def start(plan, before, **options):
        call = real(plan, before, **options)
        if kind(plan) == "further":
            parts.add(tuple(len(part.sequences) for part in call.parts))
        return call

    watched._start = start
    assert_as_alone(lively, requests, watched.serve(requests))
    assert ((4,) if merged else (2, 2)) in parts
    assert watched.count("further", "further") > 3


def test_samples_that_fork_while_others_decode(watched, lively, adapters, rng):
    """The first of their prompt is in a call behind which the others take a step; more prompts follow."""
    requests = [
        request(some(rng, 6), max_tokens=20, seed=1, sampling=SamplingParams(ignore_eos=True)),
        request(some(rng, 13), adapters["lora"], max_tokens=9, n=3, sampling=SamplingParams(seed=3)),
        request(some(rng, 30), max_tokens=5),
        request(some(rng, 9), adapters["lora_all"], max_tokens=6, n=2, sampling=SamplingParams(seed=9)),
    ]
    assert_as_alone(lively, requests, watched.serve(requests, steps=[0, 4, 4, 14]))
    assert watched.count("prefill", "decode") > 1
    assert watched.count("decode", "prefill") > 0


# Samples that end while the next call runs.


def ending(found, model, one):
    """Return a request with something that ends it after a few tokens, found by the device, the host or in its text."""
    whole = alone(model, one)
    at = next(i for i, token in enumerate(whole.token_ids) if i > 4 and token not in whole.token_ids[:i])
    end = whole.token_ids[at]
    if found == "text":
        return dataclasses.replace(one, stop=(whole.text[at],))
    ids = [end]
    if found == "host":  # Among more end tokens than the device knows, and not of those that it knows.
        others = [t for t in range(250) if t not in whole.token_ids]
        while len(ids) <= MAX_STOP_IDS or end in list(frozenset(ids))[:MAX_STOP_IDS]:
            ids.append(others.pop())
    return dataclasses.replace(one, sampling=dataclasses.replace(one.sampling, stop_token_ids=tuple(ids)))


@pytest.mark.parametrize("found", ["device", "host", "text"])
def test_samples_that_end_early_end_where_they_do_alone(found, watched, lively, rng):
    requests = []
    for i in range(4):
        letters = frozenset(range(97, 123))
        one = request(some(rng, 6), max_tokens=18, sampling=lettered(i, letters, ignore_eos=True))
        requests.append(ending(found, lively, one) if i in (1, 2) else one)
    # Others come for the pages of those that ended.
    requests += [request(some(rng, 12), max_tokens=9, sampling=lettered(i, LETTERS, ignore_eos=True)) for i in (5, 6)]
    samples = watched.serve(requests, steps=[0, 0, 0, 0, 6, 8])
    assert_as_alone(lively, requests, samples)
    for at in (1, 2):
        (whole,) = samples[at]
        assert whole.finish_reason == "stop"
        assert 4 < len(whole.token_ids) < 18
        assert (at, 0) in watched.ended_in_flight, "the next call was under way"


# Requests that are given up while the next call runs.


def decoding(watched, requests, tokens):
    """Add requests; step until a call goes on with another one and each has so many tokens. Returns their sequences."""
    numbers = [watched.engine.add(one) for one in requests]
    for _ in range(STEPS):
        watched.step()
        group = [watched.engine._live[number][0] for number in numbers]
        calls = watched.engine._calls
        if calls and kind(calls[0].plan) == "further" and min(s.generated for s in group) >= tokens:
            return group
    raise AssertionError("no call went on with another")


def long_ones(rng, count, prompt=6, tokens=24):
    sampling = SamplingParams(ignore_eos=True)
    return [request(some(rng, prompt), max_tokens=tokens, seed=i, sampling=sampling) for i in range(count)]


def check_kept(model, watched, kept):
    """The requests that were not given up have what they have alone."""
    drain(watched.engine, watched.wholes)
    for number, one in kept.items():
        assert_as_alone(model, [one], [[watched.wholes[number, 0]]])


def test_the_pages_of_one_that_is_given_up_go_to_the_next_at_once(watched, lively, rng):
    requests = long_ones(rng, 3)
    _, given_up, _ = decoding(watched, requests, 9)
    engine, pages = watched.engine, [*given_up.pages]
    kept_free = engine.pages.allocate(engine.pages.num_available)
    assert (given_up.request_id, 0) in watched.rows
    engine.cancel(given_up.request_id)
    late = request(some(rng, len(pages) * TIGHT.page_size - 2), max_tokens=12)
    number = engine.add(late)
    (sequence,) = engine._live[number]
    watched.step()
    assert sorted(sequence.pages) == sorted(pages), "there were no others"
    assert watched.started[-1] == ("further", "prefill")
    engine.pages.release(kept_free)
    check_kept(lively, watched, {0: requests[0], 2: requests[2], number: late})
    whole, other = watched.wholes[1, 0], alone(lively, requests[1])
    assert whole.finish_reason == "abort"
    assert whole.token_ids == other.token_ids[: len(whole.token_ids)]


def test_all_of_a_call_are_given_up_and_others_come(watched, lively, rng):
    requests = long_ones(rng, 3)
    for s in decoding(watched, requests, 5):
        watched.engine.cancel(s.request_id)
    watched.step()
    assert watched.engine.pages.num_used == 0
    later = [request(some(rng, 20), max_tokens=9) for _ in range(4)]
    assert_as_alone(lively, later, watched.serve(later))


@pytest.mark.parametrize("fails", [False, True])
def test_a_call_that_nobody_waits_for_any_more(fails, watched, lively, rng):
    """The text of the last request ended it."""
    (one,) = long_ones(rng, 1)
    one = dataclasses.replace(one, sampling=lettered(1, frozenset(range(97, 123)), ignore_eos=True))
    watched.serve([ending("text", lively, one)])
    (left,) = watched.engine._calls
    if fails:
        left.results = broken
    later = long_ones(rng, 2)
    assert_as_alone(lively, later, watched.serve(later))
    assert watched.engine.stats.device_failures == fails


# Calls that fail.


class BrokenError(RuntimeError):
    """What a device raises here."""


def broken(*args):
    raise BrokenError("a call failed")


PAIRS = [("further", "further"), ("further", "prefill"), ("prefill", "decode"), ("decode", "prefill")]
"""Calls that are under way together, the older one first."""


@pytest.mark.parametrize("where", ["the start", "behind the start", "the fetch of the older", "the fetch"])
@pytest.mark.parametrize("pair", PAIRS, ids="-".join)
def test_after_a_call_that_fails_beside_another_everybody_finishes(pair, where, watched, lively, adapters, rng):
    kinds = (None, "lora", "lora_all", None, "direft", None)
    requests = [
        request(some(rng, 5 + 25 * (i > 2)), adapters.get(kind), max_tokens=14 - 4 * (i > 2), seed=i,
                sampling=SamplingParams(ignore_eos=True))
        for i, kind in enumerate(kinds)
    ]  # fmt: skip
    requests[3] = dataclasses.replace(requests[3], n=2)
    engine, real, failed = watched.engine, watched._start, []

    def start(plan, before, **options):
        fails = not failed and before is not None and (kind(before.plan), kind(plan)) == pair
        if fails:
            failed.append(plan)
        if fails and where == "the start":
            raise BrokenError(where)
        call = real(plan, before, **options)
        if fails and where == "behind the start":
            raise BrokenError(where)
        if fails:
            (before if where == "the fetch of the older" else call).results = broken
        return call

    watched._start = start
    assert_as_alone(lively, requests, watched.serve(requests, steps=[0, 0, 0, 5, 5, 6]))
    assert len(failed) == engine.stats.device_failures == 1


def test_one_whose_calls_fail_again_and_again_ends_alone(watched, lively, rng):
    requests = long_ones(rng, 3)
    real = watched._start

    def start(plan, before, **options):
        call = real(plan, before, **options)
        if isinstance(plan, Decode) and any(s.request_id == 1 and s.generated > 4 for s in plan.sequences):
            call.results = broken
        return call

    watched._start = start
    samples = watched.serve(requests)
    assert_as_alone(lively, requests[::2], samples[::2])
    (whole,) = samples[1]
    assert (whole.finish_reason, "a call failed" in whole.error) == ("error", True)
    assert whole.token_ids == alone(lively, requests[1]).token_ids[: len(whole.token_ids)]
    assert 4 < len(whole.token_ids) < 24


def test_an_adapter_that_cannot_be_written_while_a_call_is_under_way(watched, lively, adapters, rng):
    requests = [*long_ones(rng, 2), request(some(rng, 9), adapters["lora"]), request(some(rng, 9), adapters["direft"])]
    engine, bad = watched.engine, adapters["lora"].digest
    real, beside = engine.runner.write_adapters, []

    def write(loads):
        if any(load.digest == bad for load in loads):
            beside.append(len(engine._calls))
            broken()
        real(loads)

    engine.runner.write_adapters = write
    samples = watched.serve(requests, steps=[0, 0, 5, 5])
    kept = (0, 1, 3)
    assert_as_alone(lively, [requests[i] for i in kept], [samples[i] for i in kept])
    assert samples[2][0].finish_reason == "error"
    assert beside[0] == 1


# What a broken engine would do.


def check_one_given_up(model, rng_seed):
    """The rows of a call go on beside one that the host ended; the first page is one of theirs."""
    rng = np.random.default_rng(rng_seed)
    watched, requests = Watched(Engine(model, TIGHT)), long_ones(rng, 3)
    first, given_up, _ = decoding(watched, requests, 9)
    assert 0 in first.pages
    watched.engine.cancel(given_up.request_id)
    check_kept(model, watched, {0: requests[0], 2: requests[2]})
    assert watched.count("further", "further") > 5


def test_a_row_that_the_host_ended_writes_nothing(lively, rng, trap):
    seed = int(rng.integers(2**31))
    real = Runner._row_args

    def all_alive(self, sequences, *args):
        rows, plan, *rest = real(self, sequences, *args)
        return rows, plan._replace(alive_B=np.arange(len(plan.alive_B)) < len(sequences)), *rest

    trap(Runner, "_row_args", all_alive, lambda: check_one_given_up(lively, seed))


def check_a_long_decode(model, requests):
    samples = Watched(Engine(model, TIGHT)).serve(requests)
    assert_as_alone(model, requests, samples)


def test_rows_go_on_from_what_the_device_drew(lively, rng, trap):
    requests = long_ones(rng, 2)
    real = Runner._call_decode

    def from_the_host(self, name, sequences, places, steps, begin=None, after=None, **options):
        return real(self, name, sequences, places, steps, begin, **options)

    trap(Runner, "_call_decode", from_the_host, lambda: check_a_long_decode(lively, requests))


def test_there_are_pages_for_what_is_being_drawn(lively, rng, trap):
    requests = long_ones(rng, 2)
    real = Scheduler._decode

    def forgetting(self, rows, steps, drawing=None):
        plan = real(self, rows, steps, drawing and dict.fromkeys(drawing, 0))
        return plan and Decode(plan.sequences, plan.steps, drawing)

    trap(Scheduler, "_decode", forgetting, lambda: check_a_long_decode(lively, requests))


def test_samples_whose_first_token_is_being_drawn_take_no_step(lively, rng, trap):
    long = long_ones(rng, 1)
    forked = request(some(rng, 13), max_tokens=9, n=2, sampling=SamplingParams(seed=3, ignore_eos=True))
    requests = [*long, forked, request(some(rng, 30), max_tokens=5)]
    real = Scheduler.ahead

    def everybody(self, under_way):
        if isinstance(under_way, Prefill) and self._running and real(self, under_way):
            return self._decode(list(self._running), 1)
        return real(self, under_way)

    def check():
        assert_as_alone(lively, requests, Watched(Engine(lively, TIGHT)).serve(requests, steps=[0, 4, 4]))

    trap(Scheduler, "ahead", everybody, check)
