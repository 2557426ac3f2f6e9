"""Where others fell. Each test names a trap, holds the engine to the right thing, and fails with the trap put in."""

import dataclasses
import itertools

import jax
import numpy as np
import pytest
import reference
from engine_outputs import TIGHT, advance, assert_released, drain, request, run_all, run_one, some

from preft_jax import Adapter, AdapterConfig, SamplingParams, random_adapter
from preft_jax.models.cache import NO_SLOT
from serve.engine import admission, arrays, prefix
from serve.engine.engine import Engine
from serve.engine.scheduler import Scheduler

ATOL = 1e-4
"""Float32 rounding through two layers; a trap changes a log-probability by at least a hundred times as much."""


def assert_right(model, one, whole):
    """Every token has the float64 log-probability that the contracts give it, and a greedy one is the best."""
    adapter, prompt, ids = one.adapter, one.prompt.token_ids, whole.token_ids
    mask = reference.adapter_mask(adapter, len(prompt), len(ids), one.prompt.unedited_spans)
    rows = reference.forward(model.config, model.params, [*prompt, *ids], adapter, mask)[len(prompt) - 1 : -1]
    raw = reference.log_softmax(rows)
    chosen = raw[np.arange(len(ids)), ids]
    assert whole.finish_reason in ("stop", "length"), whole.error
    assert np.abs(np.array(whole.logprobs) - chosen).max() < ATOL
    if one.sampling.temperature == 0:
        assert (raw.max(axis=1) - chosen < ATOL).all()


def serve_right(model, requests, config=TIGHT):
    """Serve requests in a fresh engine, all right; returns the engine."""
    engine = Engine(model, config)
    for one, samples in zip(requests, run_all(engine, requests), strict=True):
        for whole in samples:
            assert_right(model, one, whole)
    assert engine.stats.recompiles == 0
    return engine


@pytest.fixture(scope="module")
def lora(adapters):
    return adapters["lora"]


def masks_from(decide):
    """Return an ``arrays.span_of`` that takes the edit mask from ``decide(chunk)``, not from the request."""
    real = arrays.span_of

    def span_of(chunk, adapter_pages):
        span = real(chunk, adapter_pages)
        return dataclasses.replace(span, edit_mask=decide(chunk, span))

    return span_of


# The prompt mask.


def test_generated_tokens_are_not_edited_when_they_are_computed_again(lively, lora, rng, trap):
    requests = [request(some(rng, 20), lora, max_tokens=40) for _ in range(3)]

    def check():
        assert serve_right(lively, requests).stats.preemptions > 0

    def whatever_is_prefilled(chunk, span):
        return np.stack([np.ones(len(span.tokens), bool), np.zeros(len(span.tokens), bool)], axis=1)

    trap(arrays, "span_of", masks_from(whatever_is_prefilled), check)


@pytest.mark.parametrize("length", [1, 17])
def test_a_prompt_or_a_last_chunk_of_one_token_is_edited(length, lively, lora, rng, trap):
    requests = [request(some(rng, length), lora), request(some(rng, length))]

    def only_longer_ones(chunk, span):
        return span.edit_mask & (len(span.tokens) > 1)

    trap(arrays, "span_of", masks_from(only_longer_ones), lambda: serve_right(lively, requests))


def test_the_last_prompt_token_is_prefilled_with_its_edit(lively, lora, rng, trap):
    def left_to_decode(chunk, span):
        mask = span.edit_mask.copy()
        mask[-1] &= chunk.end != chunk.sequence.prompt_len
        return mask

    requests = [request(some(rng, 12), lora)]
    trap(arrays, "span_of", masks_from(left_to_decode), lambda: serve_right(lively, requests))


def test_a_prompt_that_is_all_in_the_cache_computes_and_edits_its_last_token(lively, lora, rng, trap):
    one = request(some(rng, 24), lora)

    def check():
        engine = serve_right(lively, [one])
        assert_right(lively, one, run_one(engine, one))
        assert engine.stats.prefix_hit_tokens == 16

    def base_alone(chunk, span):
        return span.edit_mask & (chunk.start == 0)

    trap(arrays, "span_of", masks_from(base_alone), check)


def test_padding_rows_list_the_null_page(lively, adapters, rng, trap):
    requests = [request(some(rng, 9), adapters["lora_all"], max_tokens=8), request(some(rng, 9), max_tokens=8)]

    def check():
        engine = Engine(lively, TIGHT)
        engine.warm_up()
        engine.runner.step_seconds = dict.fromkeys(engine.runner.programs, 1.0)
        made, seen = engine.runner.arrays, []
        real = made.row_pages
        made.row_pages = lambda rows, *args: seen.append((rows, real(rows, *args))) or seen[-1][1]
        for one, samples in zip(requests, run_all(engine, requests), strict=True):
            assert_right(lively, one, samples[0])
        assert any(len(rows) == 2 for rows, _ in seen)
        for rows, lists in seen:
            for pages in lists.values():
                null = [i for i in range(len(pages)) if i >= len(rows) or not rows[i].all_token]
                assert (pages[null] == 0).all()
        batch = made.packed([], None, 16)
        assert (batch.slots_T == NO_SLOT).all()
        assert all((tiles.page_NE == 0).all() for tiles in batch.tiles.values())

    def the_last_one(places, *, real=arrays.pack_rows, **kwargs):
        held = [place for place in places if place]
        return real([place or held[-1] for place in places] if held else places, **kwargs)

    trap(arrays, "pack_rows", the_last_one, check)


# KV and the prefix cache.


def served_in_turn(model, requests):
    engine = Engine(model, TIGHT)
    for one in requests:
        assert_right(model, one, run_one(engine, one))
    return engine


def test_no_user_is_served_from_anothers_cache(lively, adapters, rng, trap):
    prompt = some(rng, 24)
    kinds = (None, "lora", "direft", "lora_all", None)

    def tokens_only(**parts):
        return b""

    trap(
        admission, "adapter_salt", tokens_only,
        lambda: served_in_turn(lively, [request(prompt, adapters.get(kind)) for kind in kinds]),
    )  # fmt: skip


def test_an_adapter_reloaded_under_its_name_gets_a_cache_of_its_own(lively, lora, rng, trap):
    new = Adapter(lora.config, jax.tree.map(lambda leaf: leaf[::-1].copy(), lora.params))
    prompt = some(rng, 24)

    def named(**parts):
        return prefix.adapter_salt(**{**parts, "digest": "alice"})

    trap(
        admission, "adapter_salt", named,
        lambda: served_in_turn(lively, [request(prompt, adapter) for adapter in (lora, new, lora)]),
    )  # fmt: skip


def test_a_name_that_equals_another_part_of_a_key_is_another_key(trap):
    def check():
        parts = [("ab", "c", None), ("a", "bc", None), ("a", "b", "c"), ("a", "bc", ""), ("a", "bsalt:", "c")]
        salts = {prefix.cache_salt(base=base, kv_dtype=kv, salt=salt) for base, kv, salt in parts}
        assert len(salts) == len(parts)
        adapters = ("a1", 1, ""), ("a", 11, ""), ("a", 1, "1")
        assert len({prefix.adapter_salt(digest=d, fold_version=v, adapter_dtype=t) for d, v, t in adapters}) == 3

    def joined(parts):
        return b"".join(parts)

    trap(prefix, "_joined", joined, check)


def test_the_cache_tells_generated_tokens_from_prompt_tokens(lively, adapters, rng, trap):
    """The first turn's answer is un-edited; a prompt of the same tokens is edited throughout, and the reverse."""
    lora = adapters["lora"]
    one = request(some(rng, 12), lora, max_tokens=18)

    def check():
        engine = Engine(lively, TIGHT)
        first = run_one(engine, one)
        assert_right(lively, one, first)
        again = request([*one.prompt.token_ids, *first.token_ids], lora)
        assert_right(lively, again, run_one(engine, again))
        assert engine.stats.prefix_hit_tokens == 8

    real = prefix.PageKeys.keys

    def without_mask(self, tokens, mask_TG, num_tokens):
        return real(self, tokens, np.zeros_like(mask_TG), num_tokens)

    trap(prefix.PageKeys, "keys", without_mask, check)


# Adapters.


def test_base_requests_go_on_beside_an_adapter_that_cannot_load(lively, lora, rng, trap):
    def check():
        engine = Engine(lively, TIGHT)
        engine.adapters.acquire = lambda digest: False
        stuck = engine.add(request(some(rng, 9), lora))
        others = [engine.add(request(some(rng, 9))) for _ in range(4)]
        wholes = advance(engine, {}, 20)
        assert [wholes[i, 0].finish_reason for i in others if (i, 0) in wholes] == ["length"] * 4
        engine.cancel(stuck)
        drain(engine, wholes)

    real = Scheduler.plan_prefill

    def in_order(self, *sizes, **how):
        first = next(iter(self._waiting), None)
        if first is not None and first.adapter is not None and not self._take_adapter(first):
            return None
        return real(self, *sizes, **how)

    trap(Scheduler, "plan_prefill", in_order, check)


def test_a_bad_adapter_fails_its_own_requests_only(lively, lora, rng):
    bad = Adapter(lora.config, jax.tree.map(lambda leaf: np.full_like(leaf, 1e19), lora.params))
    requests = [request(some(rng, 9), adapter) for adapter in (None, lora, bad, None, bad)]
    engine = Engine(lively, TIGHT)
    for one, (whole,) in zip(requests, run_all(engine, requests), strict=True):
        if one.adapter is bad:
            assert whole.finish_reason == "error"
        else:
            assert_right(lively, one, whole)
    with pytest.raises(Exception, match="NaN"):
        engine.add(request([1], Adapter(lora.config, jax.tree.map(lambda leaf: leaf * np.nan, lora.params))))
    assert_released(engine)


def test_rows_are_found_by_request_at_high_concurrency(lively, lora, rng, trap):
    requests = [
        request(some(rng, 1 + i % 13), (None, lora)[i % 2], max_tokens=1 + 7 * i % 11, sampling=SamplingParams(seed=i))
        for i in range(30)
    ]
    real = arrays.Arrays.rows

    cursor = itertools.count()

    def ring(self, sequences, size):
        rows = real(self, sequences, size)
        if len(sequences) > 1 and next(cursor) > 2:
            rows.page_table_BP[: len(sequences)] = np.roll(rows.page_table_BP[: len(sequences)], 1, axis=0)
        return rows

    trap(arrays.Arrays, "rows", ring, lambda: serve_right(lively, requests))


# Sampling.


def test_temperature_zero_is_greedy_beside_any_other(lively, rng):
    prompt = some(rng, 9)
    requests = [request(prompt, sampling=SamplingParams(temperature=t, seed=1)) for t in (0.0, 1e-30, 1.3)]
    engine = serve_right(lively, requests)
    zero, least, _ = run_all(engine, requests)
    assert zero[0].token_ids == least[0].token_ids


def test_draws_do_not_depend_on_the_place_in_the_batch(lively, rng, trap):
    one = request(some(rng, 9), sampling=SamplingParams(temperature=1.3), seed=11, max_tokens=10)
    fill = [request(some(rng, 9), sampling=SamplingParams(), seed=i, max_tokens=12) for i in range(5)]

    def check():
        drawn = set()
        for place in range(6):
            samples = run_all(Engine(lively, TIGHT), [*fill[:place], one, *fill[place:]])
            drawn.add(tuple(samples[place][0].token_ids))
        assert len(drawn) == 1

    real = arrays.sampling_arrays

    def by_row(params, seeds, size):
        return real(params, [seed + row for row, seed in enumerate(seeds)], size)

    trap(arrays, "sampling_arrays", by_row, check)


def test_no_token_outside_the_vocabulary_is_drawn(lively, rng):
    requests = [
        request(some(rng, 9), sampling=SamplingParams(temperature=50.0), seed=i, max_tokens=40) for i in range(6)
    ]
    for samples in run_all(Engine(lively, TIGHT), requests):
        assert 0 <= min(samples[0].token_ids) <= max(samples[0].token_ids) < lively.config.vocab_size


# Shapes.


def test_other_targets_ranks_and_layers_do_not_recompile(lively, rng):
    targets = [("q",), ("down", "o"), ("q", "k", "v", "o", "gate", "up", "down")]
    configs = [
        *(AdapterConfig(rank=rank, targets=some_of) for rank in (1, 17, 48) for some_of in targets),
        AdapterConfig(kind="direft", rank=33), AdapterConfig(kind="loreft", rank=2, layers=(1,)),
        AdapterConfig(rank=4, layers=(0,), positions="f1+l1"),
    ]  # fmt: skip
    made = [random_adapter(config, lively.config, jax.random.key(i), strength=0.5) for i, config in enumerate(configs)]
    serve_right(lively, [request(some(rng, 5 + i), adapter, max_tokens=3) for i, adapter in enumerate(made)])
