"""Calls in which prompts are prefilled and sequences decode: every request gets what it gets alone."""

import collections
import dataclasses
import functools

import jax
import numpy as np
import pytest
from engine_runs import GREEDY, ROOMY, TIGHT, assert_is_reference, assert_same, request, serve
from engine_runs import alone as alone_unmixed

from preft_jax import ConfigError, SamplingParams
from preft_jax.adapters.allocator import BankAllocator
from preft_jax.adapters.bank import init_bank, write_adapter
from preft_jax.adapters.pages import pack_adapter
from preft_jax.models import forward
from preft_jax.models.batch import DecodeBatch, Span, pack_prefill
from preft_jax.models.cache import init_cache
from serve.engine.engine import Engine
from serve.engine.observer import Observer

MIXED = dataclasses.replace(ROOMY, all_token=False, mixed_tokens=64)
NARROW = dataclasses.replace(TIGHT, all_token=False, prefill_tokens=64, mixed_tokens=64)
KINDS = (None, "lora", "loreft_f3l2", "direft", "lora_r24", "lora_pattern", "lora_skip", "loreft")


class Kinds(Observer):
    """Counts the kinds of calls, and those that started behind another."""

    def __init__(self):
        self.calls, self.pairs = collections.Counter(), collections.Counter()

    def started(self, step, under_way):
        self.calls[step.kind] += 1
        if under_way:
            self.pairs[under_way[0].kind, step.kind] += 1


def requests_of(adapters, rng, sampling=GREEDY, **fields):
    lengths = (33, 1, 17, 40, 16, 8, 25, 2)
    return [
        request(rng.integers(0, 250, count), adapters.get(kind), spans=[(0, 1)], sampling=sampling, seed=i, **fields)
        for i, (kind, count) in enumerate(zip(KINDS, lengths, strict=True))
    ]


def check(model, requests, done):
    for one, samples in zip(requests, done, strict=True):
        for index, sample in enumerate(samples):
            assert_is_reference(model, one, sample, index)
            assert_same(model, one, sample, alone_unmixed(model, one, index), index)


@pytest.mark.parametrize(
    ("config", "sampling"),
    [(MIXED, SamplingParams(temperature=0.9, top_p=0.9, repetition_penalty=1.2)), (NARROW, GREEDY)],
    ids=["roomy-drawn", "tight-greedy"],
)
def test_prompts_that_come_one_by_one_are_computed_beside_those_who_decode(config, sampling, lively, adapters, rng):
    kinds = Kinds()
    requests = requests_of(adapters, rng, sampling, max_tokens=14)
    engine = Engine(lively, config, observer=kinds)
    check(lively, requests, serve(engine, requests, every=2))
    assert kinds.calls["mixed"] >= 5
    assert kinds.pairs["mixed", "mixed"] > 0, "the tokens of one call are still being drawn when the next one starts"
    if config is NARROW:
        assert engine.stats.preemptions > 0


def test_samples_fork_in_a_mixed_call(lively, adapters, rng):
    kinds = Kinds()
    long = request(rng.integers(0, 250, 9), max_tokens=30, seed=1)
    forked = request(
        rng.integers(0, 250, 13), adapters["lora"], n=3, sampling=SamplingParams(temperature=1.2), max_tokens=9, seed=5
    )
    requests = [long, forked]
    done = serve(Engine(lively, MIXED, observer=kinds), requests, every=4)
    check(lively, requests, done)
    assert kinds.calls["mixed"] == 1
    assert len({tuple(sample.token_ids) for sample in done[1]}) == 3


def test_a_request_whose_mixed_calls_fail_ends_alone(lively, adapters, rng):
    requests = requests_of(adapters, rng, max_tokens=9)

    class Failing(Observer):
        def calling(self, operation, sequences):
            if any(s.request_id == 3 for s in sequences) and operation in ("mixed", "prefill"):
                raise RuntimeError("broken")

    engine = Engine(lively, MIXED, observer=Failing())
    numbers = [engine.add(one) for one in requests]
    ended = {}
    while engine.has_work:
        ended |= {out.request_id: out for out in engine.step() if out.finish_reason is not None}
    assert ended[numbers[3]].finish_reason == "error"
    assert {out.finish_reason for number, out in ended.items() if number != numbers[3]} == {"length"}


def test_nothing_is_compiled_after_warm_up(lively, adapters, rng):
    engine = Engine(lively, MIXED)
    engine.warm_up()
    mixed = [name for name in engine.runner.programs if name.startswith("mixed")]
    assert mixed == ["mixed-16", "mixed-32", "mixed-48", "mixed-64"]
    requests = requests_of(adapters, rng, max_tokens=9)
    serve(engine, requests, every=1)  # This looks whether anything was.


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mixed_tokens": 40}, "mixed_tokens is 40"),
        ({"mixed_tokens": 128}, "up to prefill_tokens 64"),
        ({"all_token": True}, "without all_token"),
        ({"scoring": True}, "without all_token and scoring"),
    ],
)
def test_sizes_that_cannot_work_are_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        dataclasses.replace(MIXED, **changes).resolve("cpu")


def test_a_mixed_forward_pass_is_a_prefill_and_a_decode(lively, adapters, rng):
    """The same logits and KV as the two passes one after the other."""
    config, page, width, tile = lively.config, 8, 6, 16
    packed = pack_adapter(adapters["lora"], config)
    place = BankAllocator(4).allocate(packed)
    bank = write_adapter(init_bank(config, 4, np.float32), packed, place)

    def span(length, pages):
        tokens = rng.integers(0, 250, length).astype(np.int32)
        return Span(tokens=tokens, start=0, edit_mask=np.eye(2, dtype=bool)[np.zeros(length, int)], kv_pages=pages,
                    adapter_pages=place)  # fmt: skip

    def pack(*spans):
        return pack_prefill(
            spans, num_tokens=32, num_requests=4, page_table_width=width, page_size=page, tile=tile, min_entries=1
        )

    decoding, coming = [span(11, [0, 1]), span(7, [2, 3])], [span(13, [4, 5]), span(1, [6])]
    pages = np.zeros(
        (20, width), np.int32
    )  # Rows may stand at the last 20 of 32 tokens: two do, behind two of a prompt.
    pages[5, :2], pages[6, :2] = (0, 1), (2, 3)
    tokens, positions = np.zeros(20, np.int32), np.full(20, -1, np.int32)
    tokens[5:7], positions[5:7] = rng.integers(0, 250, 2), (11, 7)
    rows = DecodeBatch(tokens, positions, pages)
    args = lively.params, bank
    prefill, mixed = (
        jax.jit(functools.partial(program, config, max_query_len=32)) for program in (forward.prefill, forward.mixed)
    )
    _, cache = prefill(*args, init_cache(config, 8, page, np.float32), pack(*decoding))
    chunks_BV, apart = prefill(*args, cache, pack(*coming))
    rows_BV, apart = jax.jit(functools.partial(forward.decode, config))(lively.params, apart, rows)
    ours_rows, ours_chunks, together = mixed(*args, cache, pack(*coming), rows)
    np.testing.assert_allclose(ours_rows[5:7], rows_BV[5:7], atol=1e-4)
    np.testing.assert_allclose(ours_chunks[:2], chunks_BV[:2], atol=1e-4)
    for ours, other in zip(jax.tree.leaves(together), jax.tree.leaves(apart), strict=True):
        np.testing.assert_allclose(ours, other, atol=1e-4)
