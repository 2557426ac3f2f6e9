"""Prefill and decode apart: what one engine prefills with adapters, an engine without any decodes."""

import dataclasses
import json
import struct

import jax
import numpy as np
import pytest
from engine_outputs import lettered, run_all
from engine_runs import ATOL, GREEDY, TIGHT, request
from hlo import assert_in_place

from preft_jax import AdapterConfig, SamplingParams, random_adapter
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
        (prefill, rest, "has the role prefill and takes no handovers"),
        (Engine(lively, TIGHT), rest, "has the role both and takes no handovers"),
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
    prefix = random_adapter(AdapterConfig(kind="prefix", rank=4), lively.config, jax.random.key(0))
    with pytest.raises(AdapterError, match="learned prefixes are not handed over; serve them with role both"):
        prefill.add(request([1, 2, 3], prefix))
    with pytest.raises(RequestError, match="bring no KV"):
        Handover.of(decode.generate([request([1, 2, 3])]))


@pytest.fixture(scope="module")
def wire(prefill, adapters):
    """Return the parts of a handover: length, header, mask and KV."""
    (handover,) = hand_over(prefill, [request(list(range(9)), adapters["lora"], logprobs=1)])
    return [bytes(part) for part in handover.to_bytes()]


def with_header(wire, change):
    """Return a handover's bytes with another header: fields that change, or a text."""
    text = change if isinstance(change, bytes) else json.dumps({**json.loads(wire[1]), **change}).encode()
    return b"".join([struct.pack("<q", len(text)), text, *wire[2:]])


@pytest.mark.parametrize(
    "change",
    [
        b"{}", b"7", b"\xff", b"[" * 10**5, b"9" * 10**4,
        {"version": 2}, {"more": 1}, {"token_ids": []}, {"token_ids": [1, 2]}, {"token_ids": ["1"] * 9},
        {"token_ids": [-1] * 9}, {"mask_groups": 0}, {"mask_groups": 3}, {"mask_groups": -1}, {"adapter": 7},
        {"adapter": None}, {"adapter_dtype": None}, {"fold_version": None},
        {"kv_digest": 7}, {"kv_dtype": "object"}, {"kv_dtype": ["float32"]}, {"kv_shape": [9]}, {"kv_shape": None},
        {"kv_shape": [9, 10**30, 1, 1]}, {"kv_shape": [9, float("inf"), 1, 1]}, {"kv_shape": [9, -1, -1, 1]},
        {"kv_shape": [9, 2**31 - 1, 2**31 - 1, 1]}, {"kv_shape": [9, True, 1, 1]},
        {"seed": "x"}, {"seed": -1}, {"seed": 2**80}, {"first": []}, {"first": [7]}, {"first": {}},
        {"first": [["1", 0.0, 0.0, {}]]}, {"first": [[1, "a", 0.0, {}]]}, {"first": [[1, 0.0, 0.0, {"a": 0.0}]]},
        {"first": [[1, 0.0, 0.0, {"1": None}]]}, {"first": [[1, 0.0, 0.0, []]]}, {"prompt_logprobs": [[1]]},
        {"prompt_logprobs": 7},
    ],
    ids=lambda change: str(change)[:40],
)  # fmt: skip
def test_a_header_is_read_strictly(change, wire):
    with pytest.raises(RequestError, match="no handover of version 1"):
        Handover.all_from(with_header(wire, change))


def test_bytes_of_another_length_are_no_handover(wire):
    (handover,) = Handover.all_from(with_header(wire, {}))
    assert handover.prompt.token_ids == list(range(9))
    whole, rest = b"".join(wire), b"".join(wire[1:])
    lengths = [struct.pack("<q", length) + rest for length in (0, -1, -(2**63), len(rest) + 1, 2**63 - 1)]
    for data in (whole[:-1], whole[:5], whole + b"x", *lengths):
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
