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
from engine_runs import ROOMY, STEPS, assert_is_reference

from preft_jax import SamplingParams
from serve.engine.arrays import MAX_STOP_IDS, Arrays
from serve.engine.engine import Engine
from serve.engine.observer import Observer
from serve.engine.scheduler import Scheduler


def by_turns(model):
    """Return an engine that has one call under way at most."""
    return Engine(model, TIGHT, goes_ahead=False)


def kind(step, before):
    """Return what a call is; "further" goes on with rows of the call before it."""
    if step.chunks or before is None or before.chunks:
        return step.kind
    return "further"


class Watched(Observer):
    """An engine of which we know what each call was, and what was under way when it started."""

    def __init__(self, model, config=TIGHT, **options):
        self.engine = Engine(model, config, observer=self, **options)
        self.pairs, self.wholes = [], {}
        self.ended_in_flight, self.wrong, self.behind_two, self.copied = set(), [], 0, collections.Counter()
        self.kinds = {}

    def planned(self, step):
        self.behind_two += 1
        if [under_way.kind for under_way in self.engine.under_way] != ["prefill"]:
            self.wrong.append("it should have been started at once")

    def started(self, step, under_way):
        # The engine takes what is raised here for a failure of the device.
        if len(under_way) > 1:
            self.wrong.append("more than two calls")
        before = under_way[0] if under_way else None
        cohorts = {sequence.cohort for sequence in step.sequences}
        if cohorts != {None} and (before is not None or len(cohorts) > 1):
            self.wrong.append("those whose call failed do not run apart from others")
        self.kinds[id(step)] = kind(step, before)
        self.pairs.append((before and self.kinds[id(before)], self.kinds[id(step)]))

    def copying(self, digests):
        self.copied.update(digests)

    def count(self, before, plan):
        return self.pairs.count((before, plan))

    @property
    def rows(self):
        """Samples in the calls that are under way."""
        return [(s.request_id, s.index) for step in self.engine.under_way for s in step.sequences]

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
    return Watched(lively)


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
    alone_in_flight = [plan for before, plan in watched.pairs if before is None]
    assert alone_in_flight == ["prefill", "decode"]
    assert watched.count("further", "further") > 15


def test_an_engine_that_does_not_go_ahead_has_one_call_under_way(lively, rng):
    watched = Watched(lively, goes_ahead=False)
    requests = [request(some(rng, 30), max_tokens=20, seed=i) for i in range(3)]
    watched.serve(requests, steps=[0, 4, 9])
    assert {before for before, _ in watched.pairs} == {None}
    assert len(watched.pairs) > 15


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
    pairs = collections.Counter(watched.pairs)
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
    watched = Watched(lively, dataclasses.replace(ROOMY, prefill_tokens=32, chunk_tokens=16))
    assert_as_alone(lively, requests, watched.serve(requests))
    assert watched.behind_two > 1
    assert watched.copied == {adapters[kind].digest: 1 for kind in kinds if kind is not None}
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


@pytest.mark.usefixtures("rows_apart")
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
    parts, collected = set(), watched.collected

    def noting(sequences, drawn):
        if all(sequence.generated for sequence in sequences):  # No first tokens: they come from prefill calls.
            parts.add(len(sequences))
        return collected(sequences, drawn)

    watched.collected = noting
    assert_as_alone(lively, requests, watched.serve(requests))
    assert (4 in parts) == merged
    assert merged or 2 in parts
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
        steps = watched.engine.under_way
        group = steps[0].sequences if steps else []
        further = bool(steps) and watched.kinds[id(steps[0])] == "further"
        if further and len(group) == len(numbers) and min(s.generated for s in group) >= tokens:
            return sorted(group, key=lambda s: s.request_id)
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
    watched.step()
    (sequence,) = engine.under_way[-1].sequences
    assert sequence.request_id == number
    assert sorted(sequence.pages) == sorted(pages), "there were no others"
    assert watched.pairs[-1] == ("further", "prefill")
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
    (left,) = watched.engine.under_way
    if fails:
        watched.collecting = lambda step: broken() if step is left else None
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
    engine, started, failing = watched.engine, watched.started, []

    def start(step, under_way):
        started(step, under_way)
        if not failing and under_way and watched.pairs[-1] == pair:
            failing.append({"the fetch": step, "the fetch of the older": under_way[0]}.get(where))
            if where == "the start":
                broken()

    def call(operation, sequences):
        if failing and where == "behind the start" and operation == "draw" and not engine.stats.device_failures:
            broken()

    watched.started, watched.calling = start, call
    watched.collecting = lambda step: broken() if failing and step is failing[0] else None
    assert_as_alone(lively, requests, watched.serve(requests, steps=[0, 0, 0, 5, 5, 6]))
    assert len(failing) == engine.stats.device_failures == 1


def test_one_whose_calls_fail_again_and_again_ends_alone(watched, lively, rng):
    requests = long_ones(rng, 3)

    def collecting(step):
        if step.rows and any(s.request_id == 1 and s.generated > 4 for s in step.sequences):
            broken()

    watched.collecting = collecting
    samples = watched.serve(requests)
    assert_as_alone(lively, requests[::2], samples[::2])
    (whole,) = samples[1]
    assert (whole.finish_reason, "a call failed" in whole.error) == ("error", True)
    assert whole.token_ids == alone(lively, requests[1]).token_ids[: len(whole.token_ids)]
    assert 4 < len(whole.token_ids) < 24


def test_an_adapter_that_cannot_be_written_while_a_call_is_under_way(watched, lively, adapters, rng):
    requests = [*long_ones(rng, 2), request(some(rng, 9), adapters["lora"]), request(some(rng, 9), adapters["direft"])]
    engine, bad = watched.engine, adapters["lora"].digest
    beside = []

    def writing(digests):
        if bad in digests:
            beside.append(len(engine.under_way))
            broken()

    watched.writing = writing
    samples = watched.serve(requests, steps=[0, 0, 5, 5])
    kept = (0, 1, 3)
    assert_as_alone(lively, [requests[i] for i in kept], [samples[i] for i in kept])
    assert samples[2][0].finish_reason == "error"
    assert beside[0] == 2, "behind the step beside which it was copied"


# What a broken engine would do.


def test_one_that_is_given_up_is_in_no_later_call(watched, lively, rng):
    """The rows of its call go on without it; the first page is one of theirs."""
    requests = long_ones(rng, 3)
    first, given_up, _ = decoding(watched, requests, 9)
    assert 0 in first.pages
    watched.engine.cancel(given_up.request_id)
    watched.step()
    assert all(given_up not in step.sequences for step in watched.engine.under_way[1:])
    check_kept(lively, watched, {0: requests[0], 2: requests[2]})
    assert watched.count("further", "further") > 5


def check_a_long_decode(model, requests):
    samples = Watched(model).serve(requests)
    assert_as_alone(model, requests, samples)


def test_rows_go_on_from_what_the_device_drew(lively, rng, trap):
    requests = long_ones(rng, 2)
    real = Arrays.picks

    def from_the_host(self, sequences, index, fresh, size):
        return real(self, sequences, index, [True] * len(sequences), size)

    trap(Arrays, "picks", from_the_host, lambda: check_a_long_decode(lively, requests))


def test_there_are_pages_for_what_is_being_drawn(lively, rng, trap):
    requests = long_ones(rng, 2)
    real = Scheduler.plan_rows

    def forgetting(self, sequences, repeats):
        sequences = list(sequences)
        drawing = [sequence.drawing for sequence in sequences]
        for sequence in sequences:
            sequence.drawing = 0
        step = real(self, sequences, repeats)
        for sequence, count in zip(sequences, drawing, strict=True):
            sequence.drawing += count
        return step

    trap(Scheduler, "plan_rows", forgetting, lambda: check_a_long_decode(lively, requests))
