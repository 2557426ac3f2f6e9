"""Prefill and decode apart: what one engine prefills with adapters, an engine without any decodes."""

import dataclasses

import numpy as np
import pytest
from engine_outputs import lettered, run_all
from engine_runs import ATOL, GREEDY, TIGHT, request
from hlo import assert_in_place

from preft_jax import SamplingParams
from preft_jax.errors import AdapterError, ConfigError, RequestError
from serve.engine.config import EngineConfig
from serve.engine.engine import Engine
from serve.engine.handover import Handover, hand_over
from serve.engine.kv_pages import SIZES

PREFILL = dataclasses.replace(TIGHT, all_token=False, scoring=True, role="prefill")
DECODE = EngineConfig(
    max_num_seqs=6, max_model_len=64, page_size=4, num_kv_pages=96, prefill_tokens=64, prefill_seqs=4, tile=16,
    mixed_tokens=64, decode_steps=4, role="decode",
)  # fmt: skip
SHORT = dataclasses.replace(DECODE, num_kv_pages=24, mixed_tokens=0, prefix_caching=False)
"""Two sequences of 48 tokens fill the cache."""
KINDS = (None, "lora", "lora_r24", "direft", "loreft_f3l2", "lora_skip")
DRAWN = SamplingParams(temperature=0.8, top_k=30, presence_penalty=0.5, repetition_penalty=1.2)


@pytest.fixture(scope="module")
def prefill(lively):
    engine = Engine(lively, PREFILL)
    engine.warm_up()
    return engine


@pytest.fixture(scope="module")
def decode(lively):
    engine = Engine(lively, DECODE)
    engine.warm_up()
    return engine


def over_the_wire(handovers):
    """Return what another process would make of handovers."""
    return Handover.all_from(b"".join(part for handover in handovers for part in handover.to_bytes()))


def apart(prefill, decode, requests):
    """Return the samples of requests that one engine prefills and another decodes."""
    given = over_the_wire(hand_over(prefill, requests))
    done = run_all(decode, [one.request(asked) for one, asked in zip(given, requests, strict=True)])
    assert prefill.stats.recompiles == decode.stats.recompiles == 0
    return done


def assert_together(lively, requests, done):
    """What was made apart is what one engine makes."""
    together = run_all(Engine(lively, dataclasses.replace(TIGHT, scoring=True)), requests)
    for asked, ours, theirs in zip(requests, done, together, strict=True):
        for sample, other in zip(ours, theirs, strict=True):
            assert (sample.token_ids, sample.text) == (other.token_ids, other.text), asked
            assert (sample.finish_reason, sample.stop_reason) == (other.finish_reason, other.stop_reason)
            np.testing.assert_allclose(sample.logprobs, other.logprobs, atol=ATOL)
            assert [list(top.top) for top in sample.tops] == [list(top.top) for top in other.tops]
            assert (sample.prompt_logprobs is None) == (other.prompt_logprobs is None)
            for score, wanted in zip(sample.prompt_logprobs or (), other.prompt_logprobs or (), strict=True):
                assert (score is None) == (wanted is None)
                assert score is None or score.logprob == pytest.approx(wanted.logprob, abs=ATOL)


@pytest.mark.parametrize("sampling", [GREEDY, DRAWN], ids=["greedy", "drawn"])
def test_apart_is_together(sampling, prefill, decode, lively, adapters, rng):
    """Every kind of adapter, several samples of one prompt, prompts shorter and longer than a page and a chunk."""
    requests = [
        request(
            rng.integers(0, 250, 3 + 7 * i), adapters.get(kind), spans=[(4, 9)] if i > 1 else (), sampling=sampling,
            max_tokens=12, seed=i, n=1 + i % 3, logprobs=i % 3 or None, prompt_logprobs=2 if i == 3 else None,
        )
        for i, kind in enumerate(KINDS)
    ]  # fmt: skip
    assert_together(lively, requests, apart(prefill, decode, requests))
    assert decode.runner.bank is None
    assert decode.stats.mixed_calls


def test_what_ends_a_sample(prefill, decode, lively, adapters, rng):
    """A stop text within the first token and behind it, an end token that is the first, and one token in all."""
    tokens, sampling = rng.integers(0, 250, 12), lettered(seed=5)
    plain = request(tokens, adapters["lora"], sampling=sampling, max_tokens=12, logprobs=1)
    (sample,) = apart(prefill, decode, [plain])[0]
    ends = dataclasses.replace(sampling, stop_token_ids=(sample.token_ids[0],))
    requests = [
        dataclasses.replace(plain, stop=(sample.text[:1],)),
        dataclasses.replace(plain, stop=(sample.text[2:4],)),
        dataclasses.replace(plain, sampling=ends),
        dataclasses.replace(plain, max_tokens=1),
    ]
    done = apart(prefill, decode, requests)
    assert [len(group[0].token_ids) for group in done] != [12] * 4
    assert_together(lively, requests, done)


def test_a_preempted_request_is_taken_over_again(prefill, lively, adapters, rng):
    """Its prompt's KV comes from the host once more, and what it generated is computed behind it, un-edited."""
    engine = Engine(lively, SHORT)
    requests = [
        request(rng.integers(0, 250, 30), adapters[kind], sampling=DRAWN, max_tokens=30, seed=i)
        for i, kind in enumerate(("lora", "direft", "loreft_f3l2"))
    ]
    done = apart(prefill, engine, requests)
    assert engine.stats.preemptions > 0
    assert_together(lively, requests, done)


def test_a_device_that_fails_takes_over_again(prefill, lively, adapters, rng, monkeypatch):
    engine = Engine(lively, DECODE)
    asked = request(rng.integers(0, 250, 30), adapters["lora"], max_tokens=8)
    monkeypatch.setattr(engine.runner, "decode", _once(RuntimeError("lost"), engine.runner.decode))
    done = apart(prefill, engine, [asked])
    assert engine.stats.device_failures == 1
    assert_together(lively, [asked], done)


def _once(error, function):
    """Return a function that fails when it is first called."""
    left = [error]

    def call(*args, **kwargs):
        if left:
            raise left.pop()
        return function(*args, **kwargs)

    return call


def test_keys_are_those_of_the_prompts_own_adapter(prefill, lively, adapters, rng):
    """A prompt that was taken over before is found, but not with another adapter."""
    engine = Engine(lively, DECODE)
    tokens = rng.integers(0, 250, 25)
    hits = []
    for kind in ("lora", "lora", "direft", None):
        before = engine.stats.prefix_hit_tokens
        asked = request(tokens, adapters.get(kind), max_tokens=4)
        assert_together(lively, [asked], apart(prefill, engine, [asked]))
        hits.append(engine.stats.prefix_hit_tokens - before)
    assert hits == [0, 24, 0, 0]


@pytest.mark.parametrize("size", SIZES)
def test_kv_is_written_in_place(size, decode, compiled_here):
    text = decode.runner.programs.trace(f"put-pages-{size}").lower().compile().as_text()
    assert_in_place(text, decode.runner.cache.kv)


def test_what_does_not_fit_is_refused_by_name(prefill, decode, lively, tiny, adapters, rng):
    asked = request(rng.integers(0, 250, 9), adapters["lora"], n=2, max_tokens=4)
    (handover,) = hand_over(prefill, [asked])
    rest = handover.request(asked)
    other = Engine(lively, dataclasses.replace(DECODE, kv_dtype="bfloat16"))
    for engine, one, message in (
        (Engine(tiny, DECODE), rest, "base model's digest"),
        (other, rest, "KV dtype is float32 and this engine's is bfloat16"),
        (decode, dataclasses.replace(rest, n=1), "n is 1, and the handover has 2 samples"),
        (decode, dataclasses.replace(rest, logprobs=3), "logprobs is 3"),
        (decode, dataclasses.replace(rest, prompt=[1, 2, 3]), "prompt is not the handover's"),
    ):
        with pytest.raises(RequestError, match=message):
            engine.add(one)
    with pytest.raises(AdapterError, match="has no adapters"):
        decode.add(asked)
    with pytest.raises(AdapterError, match="the adapter edits every token"):
        prefill.add(request([1, 2, 3], adapters["lora_all"]))
    with pytest.raises(RequestError, match="bring no KV"):
        Handover.of(decode.generate([request([1, 2, 3])]))
    whole = b"".join(handover.to_bytes())
    for data in (whole[:-1], whole[:5], b"\x02" + bytes(7) + b"{}"):
        with pytest.raises(RequestError, match="no handover of version 1"):
            Handover.all_from(data)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"role": "decoder"}, "role is 'decoder'; allowed: both, prefill, decode"),
        ({"role": "decode", "bank_pages": 9}, "role is decode, which has no adapters"),
        ({"role": "prefill", "all_token": True}, "all_token is on, and role is prefill"),
        ({"role": "prefill", "mixed_tokens": 256}, "role is prefill: nothing is decoded"),
    ],
)
def test_roles_are_checked(options, message):
    with pytest.raises(ConfigError, match=message):
        EngineConfig(**options).resolve("cpu")
