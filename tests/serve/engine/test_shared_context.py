"""One context, many adapters: what lies before the first edited token is the base model's, and prefilled once."""

import dataclasses
import logging

import numpy as np
import pytest
from engine_runs import ROOMY, TIGHT, VISIBLE, assert_is_reference, assert_same, request, serve, serve_one

from preft_jax import Adapter, sequence_edit_mask
from serve.engine.engine import Engine

PAGE = ROOMY.page_size
CONTEXT = 5 * PAGE
MARKER = (251, 252)
KINDS = ("lora", "lora_r24", "direft", "loreft")


def by_rule(adapter, positions="prompt", marker=None):
    """Return the same weights, that act elsewhere."""
    config = dataclasses.replace(adapter.config, positions=positions, alora_invocation_tokens=marker)
    return Adapter(config, adapter.params)


@pytest.fixture(scope="module")
def suffix(adapters):
    """Return adapters that edit the last tokens of a prompt, in four spellings."""
    return [
        by_rule(adapters["lora"], "l5"),
        by_rule(adapters["direft"], "l8"),
        by_rule(adapters["loreft"], "prompt", MARKER),
        by_rule(adapters["lora_r24"], "all", MARKER),
    ]


@pytest.fixture
def context(rng):
    return rng.integers(0, 250, CONTEXT).tolist()


def asks(rng, context, adapters, **fields):
    """Return a request of each adapter and of the base model over one context: a marker and a question behind it."""
    return [request([*context, *MARKER, *rng.integers(0, 250, 6)], one, **fields) for one in (*adapters, None)]


def alone(model, one, config=ROOMY):
    """Return a request's sample, and the engine that was made for it."""
    engine = Engine(model, config)
    return serve_one(engine, one)[0]


@pytest.mark.parametrize("first", ["an adapter", "the base model"])
def test_a_context_is_prefilled_once_for_all_adapters_and_the_base_model(first, lively, suffix, context, rng):
    engine = Engine(lively, ROOMY)
    requests = asks(rng, context, suffix, max_tokens=8)
    requests = requests if first == "an adapter" else requests[::-1]
    samples, hits = zip(*(serve_one(engine, one) for one in requests), strict=True)
    assert hits == (0, *[CONTEXT] * (len(requests) - 1))
    total = sum(len(one.prompt.token_ids) for one in requests)
    assert engine.stats.prompt_tokens == total - CONTEXT * (len(requests) - 1) == CONTEXT + 8 * len(requests)
    for one, sample in zip(requests, samples, strict=True):
        other = alone(lively, one)
        assert sample.token_ids == other.token_ids
        assert_is_reference(lively, one, sample)


def test_outputs_over_a_shared_context_are_those_of_each_request_alone_exactly(lively, suffix, context, rng):
    """Float32, and the same program over the same shapes: chunks of a page, whatever is cached."""
    config = dataclasses.replace(ROOMY, chunk_tokens=PAGE)
    engine = Engine(lively, config)
    for one in asks(rng, context, suffix, max_tokens=8):
        sample, _ = serve_one(engine, one)
        other = alone(lively, one, config)
        assert (sample.token_ids, sample.logprobs) == (other.token_ids, other.logprobs)
    assert engine.stats.prompt_tokens == CONTEXT + 8 * 5


@pytest.mark.parametrize("chunk", [None, PAGE])
def test_a_context_that_comes_with_all_of_them_at_once_is_prefilled_once(chunk, lively, suffix, context, rng):
    engine = Engine(lively, dataclasses.replace(ROOMY, chunk_tokens=chunk))
    requests = asks(rng, context, suffix, max_tokens=8)
    for one, (sample,) in zip(requests, serve(engine, requests), strict=True):
        assert_is_reference(lively, one, sample)
    assert engine.stats.prompt_tokens == CONTEXT + 8 * len(requests)
    assert engine.stats.prefix_hit_tokens == CONTEXT * (len(requests) - 1)


@pytest.mark.parametrize("config", [ROOMY, TIGHT], ids=["roomy", "tight"])
def test_at_once_too(config, lively, suffix, context, rng):
    """Beside one another, preempted and in chunks, every answer is the one that its adapter gives alone."""
    engine = Engine(lively, config)
    requests = asks(rng, context[: 3 * PAGE], suffix, max_tokens=8)
    serve_one(engine, request(context[: 3 * PAGE], max_tokens=1))
    before = engine.stats.prefix_hit_tokens
    done = serve(engine, requests)
    assert engine.stats.prefix_hit_tokens - before >= (2 if config is ROOMY else 1) * PAGE * len(requests)
    for one, (sample,) in zip(requests, done, strict=True):
        assert_is_reference(lively, one, sample)
        assert_same(lively, one, sample, alone(lively, one))


def test_pages_with_an_edited_token_and_behind_one_are_an_adapters_own(lively, suffix, context, rng):
    """A second turn finds its own pages; another adapter, and the base model, those of the context alone."""
    engine = Engine(lively, ROOMY)
    one = request([*context, *MARKER, *rng.integers(0, 250, 6)], suffix[2], max_tokens=3)
    serve_one(engine, one)
    assert serve_one(engine, one)[1] == CONTEXT
    longer = [*one.prompt.token_ids, 1, 2]
    assert serve_one(engine, request(longer, suffix[2]))[1] == CONTEXT + PAGE
    for adapter in (None, suffix[3], by_rule(suffix[2]), by_rule(suffix[2], marker=MARKER[1:])):
        sample, hits = serve_one(engine, again := request(longer, adapter))
        assert hits == (0 if adapter is not None and adapter.config.alora_invocation_tokens is None else CONTEXT)
        assert_is_reference(lively, again, sample)


def test_a_prompt_without_the_marker_is_the_base_models(lively, suffix, context, caplog):
    """Its pages, its tokens, and nothing generated is edited, also by an adapter that edits what is generated."""
    engine = Engine(lively, ROOMY)
    sample, _ = serve_one(engine, request(context, max_tokens=8))
    with caplog.at_level(logging.WARNING, "preft.engine"):
        for adapter in (suffix[2], suffix[3], suffix[3]):
            other, hits = serve_one(engine, request(context, adapter, max_tokens=8))
            assert hits == CONTEXT - PAGE
            assert other.token_ids == sample.token_ids
            np.testing.assert_allclose(other.logprobs, sample.logprobs, atol=1e-5)
    assert engine.stats.unmarked_prompts == 3
    assert len(caplog.records) == 2
    assert "lacks its alora_invocation_tokens [251, 252]: nothing is edited" in caplog.text


def test_an_activated_lora_edits_what_is_generated(lively, suffix, context, rng):
    engine = Engine(lively, ROOMY)
    tokens = [*context, *MARKER, *rng.integers(0, 250, 6)]
    activated = request(tokens, suffix[3], max_tokens=8)
    sample, _ = serve_one(engine, activated)
    assert_is_reference(lively, activated, sample)
    mask = sequence_edit_mask(activated.prompt, suffix[3].config, 8)
    assert np.flatnonzero(mask[:, 0]).tolist() == list(range(CONTEXT, len(tokens) + 8))
    alone_in_the_prompt, _ = serve_one(engine, request(tokens, by_rule(suffix[3], marker=MARKER), max_tokens=8))
    assert alone_in_the_prompt.logprobs[0] == pytest.approx(sample.logprobs[0], abs=1e-4)
    assert np.abs(np.subtract(alone_in_the_prompt.logprobs, sample.logprobs)).max() > VISIBLE
