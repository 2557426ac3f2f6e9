"""Learned prefixes: keys and values in front of a prompt, written to the cache once for all requests of an adapter."""

import dataclasses

import jax
import numpy as np
import pytest
from engine_runs import ATOL, ROOMY, TIGHT, VISIBLE, alone, assert_is_reference, assert_same, request, serve, serve_one

import preft_jax
from preft_jax import AdapterConfig, AdapterError, RequestError, SamplingParams
from preft_jax.prefix import text_prefix
from preft_jax.shapes import BANK_SITES
from serve.engine.engine import Engine
from serve.engine.observer import Observer

PAGE = ROOMY.page_size
LENGTHS = (2 * PAGE, 5, 20)
"""Two pages, less than one, and a rank page with some of another."""

WHOLE = dataclasses.replace(ROOMY, bank_sites=BANK_SITES, all_token=False, mixed_tokens=64)
SHORT = dataclasses.replace(TIGHT, bank_sites=BANK_SITES, all_token=False)


class Calls(Observer):
    """Counts sequences by the program that is called for them."""

    def __init__(self):
        self.counts = {}

    def calling(self, operation, sequences):
        self.counts[operation] = self.counts.get(operation, 0) + len(sequences)


@pytest.fixture(scope="module")
def prefixes(lively):
    configs = [AdapterConfig(kind="prefix", rank=length) for length in LENGTHS]
    return [preft_jax.random_adapter(config, lively.config, jax.random.key(i)) for i, config in enumerate(configs)]


def prompt(rng, length=13):
    return rng.integers(0, 250, length).tolist()


def test_a_prefix_is_keys_and_values_in_front_of_the_prompt(lively, prefixes, rng):
    engine = Engine(lively, WHOLE)
    for adapter in prefixes:
        one = request(prompt(rng), adapter, max_tokens=8)
        sample, _ = serve_one(engine, one)
        assert_is_reference(lively, one, sample)
        base, _ = serve_one(engine, dataclasses.replace(one, adapter=None))
        assert abs(base.logprobs[0] - sample.logprobs[0]) > VISIBLE


def test_a_prefix_of_a_text_answers_as_if_the_text_stood_there(lively, rng):
    text, own = prompt(rng, 11), prompt(rng)
    adapter = text_prefix(AdapterConfig(kind="prefix", rank=11), lively, text)
    engine = Engine(lively, WHOLE)
    ours, other = (serve_one(engine, one)[0] for one in (request(own, adapter), request([*text, *own])))
    assert ours.token_ids == other.token_ids
    np.testing.assert_allclose(ours.logprobs, other.logprobs, atol=ATOL)


def test_pages_of_a_prefix_are_written_once_and_shared(lively, prefixes, rng):
    """Full ones: what is left of a prefix is written to the page that the prompt goes on in."""
    calls = Calls()
    engine = Engine(lively, WHOLE, observer=calls)
    hits = [serve_one(engine, request(prompt(rng), prefixes[0]))[1] for _ in range(3)]
    assert (hits, calls.counts["write_prefix"]) == ([0, LENGTHS[0], LENGTHS[0]], 1)
    hits = [serve_one(engine, request(prompt(rng), prefixes[2]))[1] for _ in range(3)]
    assert (hits, calls.counts["write_prefix"]) == ([0, 2 * PAGE, 2 * PAGE], 4)
    one = request(prompt(rng), prefixes[2])
    first, _ = serve_one(engine, one)
    again, hit = serve_one(engine, one)
    assert hit == 4 * PAGE
    assert calls.counts["write_prefix"] == 5
    assert_same(lively, one, again, first)
    assert engine.stats.prompt_tokens == 7 * 13 + LENGTHS[2] + 13 - hit


@pytest.mark.parametrize("config", [WHOLE, SHORT], ids=["whole", "in chunks and preempted"])
def test_beside_others_each_answer_is_that_of_the_request_alone(config, lively, prefixes, adapters, rng):
    """Also of samples that fork, with a temperature, and with penalties, which see the prompt alone."""
    calls = Calls()
    engine = Engine(lively, config, observer=calls)
    adapters = [*prefixes, adapters["lora"], None, prefixes[0]]
    requests = [request(prompt(rng, 17), one, max_tokens=14) for one in adapters]
    warm = SamplingParams(temperature=0.8, repetition_penalty=1.3, presence_penalty=0.5)
    requests.append(request(prompt(rng, 9), prefixes[2], n=2, sampling=warm, max_tokens=10))
    for one, group in zip(requests, serve(engine, requests), strict=True):
        for index, sample in enumerate(group):
            assert_is_reference(lively, one, sample, index)
            assert_same(lively, one, sample, alone(lively, one, index, WHOLE), index)
    assert (engine.stats.preemptions > 0) == (config is SHORT)
    assert ("mixed" in calls.counts) == (config is WHOLE)


def test_decode_has_no_adapter_and_a_prefix_has_a_program_of_its_own(lively, prefixes, rng):
    engine = Engine(lively, WHOLE)
    assert "write-prefix" in engine.runner.programs
    assert not any("adapted" in name for name in engine.runner.programs)
    assert "write-prefix" not in Engine(lively, ROOMY).runner.programs


def test_a_device_that_fails_at_a_prefix_is_used_again(lively, prefixes, rng):
    class Fails(Calls):
        def calling(self, operation, sequences):
            super().calling(operation, sequences)
            if operation == "write_prefix" and self.counts[operation] == 1:
                raise RuntimeError("the device failed")

    engine = Engine(lively, WHOLE, observer=Fails())
    one = request(prompt(rng), prefixes[2])
    (done,) = engine.generate([one])
    assert engine.stats.device_failures == 1
    assert done.token_ids == alone(lively, one, config=WHOLE).token_ids


def test_what_an_engine_refuses(lively, prefixes, rng):
    one = request(prompt(rng), prefixes[2])
    with pytest.raises(AdapterError, match=r"prefix.*name them in bank_sites"):
        Engine(lively, ROOMY).add(one)
    engine = Engine(lively, WHOLE)
    with pytest.raises(RequestError, match="behind a learned prefix of 20 and max_tokens is 40"):
        engine.add(dataclasses.replace(one, max_tokens=40))
    with pytest.raises(RequestError, match="every token sees the adapter's learned prefix; leave it out"):
        engine.add(dataclasses.replace(one, edit_mask=np.ones(13, bool)))
    assert not engine.has_work


def test_generate_serves_prefixes(lively, prefixes, rng):
    one = request(prompt(rng), prefixes[1])
    (done,) = preft_jax.generate(lively, [one.prompt.token_ids], prefixes[1], max_tokens=6, sampling=one.sampling)
    assert done.token_ids == alone(lively, one, config=WHOLE).token_ids
