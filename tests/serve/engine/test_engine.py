"""What a request may ask for, what it gets, and how the engine ends it."""

import dataclasses

import jax
import numpy as np
import pytest
import reference
from engine_outputs import (
    SCORING,
    TIGHT,
    advance,
    alone,
    assert_as_alone,
    assert_released,
    drain,
    lettered,
    request,
    run_all,
    run_one,
    some,
)  # fmt: skip
from engine_runs import assert_is_reference
from text_tokenizers import unigram

from preft_jax import Adapter, SamplingParams
from preft_jax.errors import AdapterError, ConfigError, RequestError
from preft_jax.sampling.parameters import derived_seed
from preft_jax.text.chat import EncodedPrompt
from serve.engine.engine import Engine
from serve.engine.request import Request
from serve.engine.sequence import Status

NAN = float("nan")


def base(model, **fields):
    """Return an engine that serves nothing but the base model."""
    return Engine(model, dataclasses.replace(TIGHT, all_token=False, bank_pages=1, **fields))


@pytest.fixture
def engine(lively):
    return Engine(lively, TIGHT)


# What is refused.


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("prompt", EncodedPrompt([], ())), ("prompt", b"text"), ("prompt", 12), ("adapter", "alice"),
        ("sampling", {"temperature": 1}), ("max_tokens", 0), ("max_tokens", 1.0), ("max_tokens", True), ("n", 0),
        ("n", 129), ("seed", -1), ("seed", 2**32), ("priority", 2**31), ("priority", 0.5), ("logprobs", 21),
        ("logprobs", -1), ("logprobs", True), ("prompt_logprobs", 21), ("stop", "abc"), ("stop", ("",)), ("stop", (7,)),
        ("deadline", 0), ("deadline", -1.0), ("deadline", NAN), ("deadline", True), ("deadline", "soon"),
    ],
)  # fmt: skip
def test_a_bad_field_is_named(name, value):
    with pytest.raises(RequestError, match=name):
        Request(**{"prompt": EncodedPrompt([1], ()), name: value})


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"tokens": [1, 256]}, "0 to 255"),
        ({"tokens": [-1]}, "0 to 255"),
        ({"tokens": [1] * 60, "max_tokens": 5}, "max_model_len 64"),
        ({"tokens": [1], "max_tokens": 64}, "max_model_len 64"),
        ({"tokens": [1], "prompt_logprobs": 1}, "scoring=True"),
    ],
)
def test_a_request_that_can_never_be_served_is_refused_at_once(fields, message, engine, rng):
    good = request(some(rng, 9), max_tokens=3)
    number = engine.add(good)
    with pytest.raises(RequestError, match=message):
        engine.add(request(**fields))
    assert [key for key, _ in drain(engine)] == [number]


@pytest.mark.parametrize("tokens", [["a"], [None], [1.5] * 20])
def test_token_ids_that_are_no_integers_are_refused(tokens, engine, rng):
    with pytest.raises(RequestError):
        engine.add(Request(prompt=EncodedPrompt(tokens, ()), max_tokens=2))


def test_what_the_whole_cache_cannot_hold_is_refused(lively):
    engine = base(lively, num_kv_pages=3)
    with pytest.raises(RequestError, match="whole KV cache holds 24"):
        engine.add(request([1] * 20, max_tokens=5))
    engine.add(request([1] * 20, max_tokens=4))


def test_stop_texts_without_a_tokenizer_are_refused(lively):
    with pytest.raises(RequestError, match="stop_token_ids"):
        base(dataclasses.replace(lively, tokenizer=None)).add(request([1], stop=("a",)))


def test_adapters_that_cannot_be_served_are_refused(lively, adapters, engine):
    loud = adapters["lora"]
    other = dataclasses.replace(loud, config=dataclasses.replace(loud.config, base_model_digest="1" * 64))
    skip = request([1] * 9, adapters["lora_skip"], spans=[(5, 12)])
    lacking = Adapter(loud.config, {"layers": [{"q": {}}, *loud.params["layers"][1:]]})
    with pytest.raises(AdapterError, match="rank"):
        base(lively, max_rank=16).add(request([1], adapters["lora_r24"]))
    with pytest.raises(AdapterError, match="bank_pages"):
        base(lively).add(request([1], loud))
    with pytest.raises((AdapterError, RequestError), match="base"):
        engine.add(request([1], other))
    with pytest.raises(AdapterError, match=r"missing layers\.0\.q\.lora_a"):
        engine.add(request([1], lacking))
    with pytest.raises(AdapterError, match=r"all_token=True.*--all-token"):
        Engine(lively, dataclasses.replace(TIGHT, all_token=False)).add(request([1], adapters["lora_all"]))
    with pytest.raises(RequestError, match="span"):
        engine.add(skip)
    assert_released(engine)
    assert engine.adapters.on_host == set()


def test_a_model_with_fewer_positions_is_refused(lively):
    with pytest.raises(ConfigError, match="1024 positions"):
        Engine(lively, dataclasses.replace(TIGHT, max_model_len=1025))


# How a sample ends.


def test_one_token(engine, lively, rng):
    one = request(some(rng, 20), max_tokens=1, n=3)
    for whole in run_all(engine, [one])[0]:
        assert len(whole.outputs) == len(whole.token_ids) == 1
        assert whole.finish_reason == "length"
    assert engine.stats.decode_calls == 0


def test_a_stop_text_cuts_the_sample_wherever_it_lies(lively, rng):
    one = request(some(rng, 9), sampling=lettered(3, ignore_eos=True), max_tokens=18)
    text = alone(lively, one).text
    assert len(text) == 18
    requests = []
    for start in range(18):
        for length in (1, 2, 3, 5):
            requests.append(dataclasses.replace(one, stop=(text[start : start + length],)))
    requests.append(dataclasses.replace(one, stop=(text[4:7], text[5:7], text[6:9], "zz")))
    requests.append(dataclasses.replace(one, stop=(text[-3:] + "z", "zz")))
    engine = Engine(lively, TIGHT)
    for asked, (whole,) in zip(requests, run_all(engine, requests), strict=True):
        ends = [(text.find(stop) + len(stop), text.find(stop), stop) for stop in asked.stop if stop in text]
        if not ends:
            assert (whole.text, whole.finish_reason) == (text, "length")
            continue
        end = min(ends)[0]
        at, stop = min((at, stop) for found, at, stop in ends if found == end)
        assert (whole.text, whole.finish_reason, whole.stop_reason) == (text[:at], "stop", stop)
        assert whole.token_ids == list(text[:end].encode())
        assert len(whole.logprobs) == end
    assert engine.stats.recompiles == 0


def test_stop_ids_end_a_sample_and_belong_to_it(engine, lively, rng):
    one = request(some(rng, 9), sampling=lettered(5), max_tokens=16)
    ids = alone(lively, one).token_ids
    end = ids[6]
    first = ids.index(end)
    few = dataclasses.replace(one.sampling, stop_token_ids=(end,))
    many = dataclasses.replace(one.sampling, stop_token_ids=(*range(200, 230), end))
    both = [dataclasses.replace(one, sampling=sampling) for sampling in (few, many)]
    for (whole,) in run_all(engine, both):
        assert whole.token_ids == ids[: first + 1]
        assert (whole.finish_reason, whole.stop_reason) == ("stop", end)


@pytest.mark.parametrize(
    "stop",
    [
        (),
        ("zzzz",),
    ],
)
def test_the_text_of_an_end_token_is_the_same_with_and_without_stop_texts(stop, engine, lively, rng):
    one = request(some(rng, 9), sampling=lettered(5), max_tokens=16)
    whole = alone(lively, one)
    sampling = dataclasses.replace(one.sampling, stop_token_ids=(whole.token_ids[6],))
    ended = run_one(engine, dataclasses.replace(one, sampling=sampling, stop=stop))
    assert ended.text == whole.text[: len(ended.token_ids) - 1]


def test_a_stop_text_may_be_or_hold_a_special_token_and_end_with_the_end_token(engine, lively, rng):
    prompt, at, seed = some(rng, 9), 0, 3
    while not at:  # The end token must follow a letter, which takes some luck.
        seed += 1
        sampling = lettered(seed, frozenset({*b"abc", 255}), ignore_eos=True)
        one = request(prompt, sampling=sampling, max_tokens=24)
        ids = alone(lively, one).token_ids
        at = next((i for i, token in enumerate(ids) if token == 255 and i > 0 and ids[i - 1] != 255), 0)
    before, last = bytes(token for token in ids[:at] if token != 255).decode(), chr(ids[at - 1])
    ending = dataclasses.replace(sampling, stop_token_ids=(255,))
    for own in (sampling, ending):
        for stop, text in (("<|im_end|>", ""), (f"{last}<|im_end|>", before[:-1])):
            (whole,) = run_all(engine, [dataclasses.replace(one, sampling=own, stop=(stop, "zz"))])[0]
            assert (whole.finish_reason, whole.stop_reason) == ("stop", stop)
            if len(stop) > 10:
                assert (whole.text, whole.token_ids) == (text, ids[: at + 1])
            else:
                first = ids.index(255)
                assert (whole.text, whole.token_ids) == (bytes(ids[:first]).decode(), ids[: first + 1])


def test_a_text_is_what_stands_behind_its_prompt(lively, rng):
    tokenizer = unigram()
    letters = frozenset(tokenizer.convert_tokens_to_ids(["▁hello", "▁the"]))
    wordy = Engine(dataclasses.replace(lively, tokenizer=tokenizer), TIGHT)
    texts = []
    for seed in range(4):
        whole = run_one(wordy, request(some(rng, 5), sampling=lettered(seed, letters), max_tokens=6))
        texts.append(whole.text)
        assert whole.text == "".join(tokenizer.convert_ids_to_tokens(whole.token_ids)).replace("▁", " ")
    assert all(text.startswith(" ") for text in texts)


def test_the_models_end_token_ends_a_sample_unless_it_is_ignored(engine, lively, rng):
    one = request(some(rng, 9), sampling=lettered(5), max_tokens=16)
    whole = alone(lively, one)
    end = whole.token_ids[6]
    config = dataclasses.replace(lively.config, eos_token_ids=(255, end))
    engine._admission._model = dataclasses.replace(lively, config=config)
    ignoring = dataclasses.replace(one, sampling=dataclasses.replace(one.sampling, ignore_eos=True))
    (ended,), (ignored,) = run_all(engine, [one, ignoring])
    assert (ended.finish_reason, ended.stop_reason) == ("stop", end)
    assert ended.token_ids == whole.token_ids[: whole.token_ids.index(end) + 1]
    assert ignored.token_ids == whole.token_ids


def test_a_request_can_be_cancelled_at_any_time(lively, adapters, rng):
    other = request(some(rng, 12), max_tokens=14)
    one = request(some(rng, 40), adapters["lora"], max_tokens=8, n=3)
    seen = set()
    for steps in range(14):
        engine = Engine(lively, TIGHT)
        kept, given_up = engine.add(other), engine.add(one)
        wholes = advance(engine, {}, steps)
        seen |= {(s.status, bool(engine._under_way.calls)) for s in engine._live.get(given_up, [])}
        engine.cancel(given_up)
        engine.cancel(given_up)
        engine.cancel(12345)
        drain(engine, wholes)
        ends = [wholes[given_up, index].finish_reason for index in range(3)]
        assert set(ends) <= {"abort", "length"}
        assert ends == ["abort"] * 3 or steps > 7
        for index in range(3):
            got = wholes[given_up, index].token_ids
            assert got == alone(lively, one, index).token_ids[: len(got)]
        assert_as_alone(lively, other, [wholes[kept, 0]])
    busy = {status for status, in_flight in seen if in_flight}
    assert busy >= {Status.FORKING, Status.PREFILLING, Status.RUNNING}
    assert (Status.WAITING, False) in seen


def test_one_that_waits_can_be_cancelled_beside_running_ones(engine, lively, rng):
    running = [request(some(rng, 4), max_tokens=8) for _ in range(6)]
    ids = [engine.add(one) for one in running]
    advance(engine, wholes := {}, 2)
    late = engine.add(request(some(rng, 4)))
    advance(engine, wholes)
    engine.cancel(late)
    drain(engine, wholes)
    assert (wholes[late, 0].finish_reason, wholes[late, 0].token_ids) == ("abort", [])
    for one, number in zip(running, ids, strict=True):
        assert_as_alone(lively, one, [wholes[number, 0]])


def test_a_request_is_given_up_at_its_deadline(lively, rng):
    now = [5.0]
    engine = Engine(lively, TIGHT, clock=lambda: now[0])
    patient, hasty = (engine.add(request(some(rng, 9), max_tokens=20, deadline=d)) for d in (60.0, 3.0))
    wholes = advance(engine, {}, 5)
    now[0] = 8.0
    drain(engine, wholes)
    assert wholes[patient, 0].finish_reason == "length"
    assert (wholes[hasty, 0].finish_reason, wholes[hasty, 0].error) == ("abort", "its deadline passed")
    assert 0 < len(wholes[hasty, 0].token_ids) < 20


def test_a_deadline_at_the_step_that_brings_a_stop_text(lively, rng):
    now = [0.0]
    one = request(some(rng, 9), sampling=lettered(3), max_tokens=18, deadline=5.0)
    text = alone(lively, dataclasses.replace(one, deadline=None)).text
    engine = Engine(lively, TIGHT, clock=lambda: now[0])
    number = engine.add(dataclasses.replace(one, stop=(text[0],)))
    wholes = advance(engine, {}, 1)
    now[0] = 6.0
    drain(engine, wholes)
    assert wholes[number, 0].finish_reason in ("stop", "abort")


def test_urgent_requests_go_first(engine, rng):
    numbers = [engine.add(request(some(rng, 30), max_tokens=2, priority=p)) for p in (3, 2, 1, 0, -1)]
    wholes = drain(engine)
    assert [number for number, _ in wholes] == numbers[::-1]


# What a sample holds.


@pytest.mark.parametrize(
    "changes",
    [
        {"temperature": 0.0, "presence_penalty": 1.5, "repetition_penalty": 1.7},
        {"temperature": 0.8, "frequency_penalty": 1.0, "presence_penalty": -1.0},
        {"temperature": 1.2, "top_k": 20, "repetition_penalty": 0.7, "logit_bias": {5: 6.0, 9: -100, 77: 2.5}},
        {"temperature": 0.0, "logit_bias": {3: 100}, "frequency_penalty": 2.0},
    ],
    ids=lambda changes: "+".join(changes),
)
def test_penalties_bias_and_log_probabilities_are_the_references(changes, engine, lively, adapters, rng):
    prompt = some(rng, 11)
    one = request(prompt, adapters["lora"], sampling=SamplingParams(**changes), seed=3, max_tokens=12, logprobs=3)
    beside = request(prompt, sampling=SamplingParams(seed=9), max_tokens=12)
    (whole,), _ = run_all(engine, [one, beside])
    whole.top_logprobs, whole.sampling_logprobs = whole.tops, [p for o in whole.outputs for p in o.sampling_logprobs]
    assert_is_reference(lively, one, whole)
    assert [(top.token_id, top.logprob) for top in whole.tops] == list(
        zip(whole.token_ids, whole.logprobs, strict=True)
    )
    assert all(len(top.top) == 3 for top in whole.tops)


def test_no_likely_tokens_unless_asked_for(engine, rng):
    prompt = some(rng, 9)
    none, zero, five = run_all(engine, [request(prompt, logprobs=count) for count in (None, 0, 5)])
    assert none[0].tops == []
    assert [top.top for top in zero[0].tops] == [{}] * 6
    assert [len(top.top) for top in five[0].tops] == [5] * 6


@pytest.mark.parametrize("length", [1, 2, 16, 17, 40])
@pytest.mark.parametrize("kind", [None, "lora", "loreft_f3l2", "lora_all"])
def test_log_probabilities_of_the_prompt_are_a_full_forwards(length, kind, lively, adapters, rng):
    adapter = None if kind is None else adapters[kind]
    one = request(some(rng, length), adapter, max_tokens=2, n=2, prompt_logprobs=4)
    beside = request(some(rng, 23), max_tokens=3)
    (whole, second), _ = run_all(Engine(lively, SCORING), [one, beside])
    prompt = one.prompt.token_ids
    mask = reference.adapter_mask(adapter, length)
    wanted = reference.log_softmax(reference.forward(lively.config, lively.params, prompt, adapter, mask))
    assert whole.outputs[0].prompt_logprobs is not None
    assert all(output.prompt_logprobs is None for output in [*whole.outputs[1:], *second.outputs])
    assert whole.prompt_logprobs[0] is None
    assert [top.token_id for top in whole.prompt_logprobs[1:]] == prompt[1:]
    for row, top in zip(wanted, whole.prompt_logprobs[1:], strict=False):
        assert top.logprob == pytest.approx(row[top.token_id], abs=1e-4)
        assert sorted(top.top.values()) == pytest.approx(np.sort(row)[-4:], abs=1e-4)
        assert all(row[token] == pytest.approx(value, abs=1e-4) for token, value in top.top.items())


def test_samples_of_a_prompt_share_its_prefill(engine, lively, adapters, rng):
    one = request(some(rng, 30), adapters["lora"], sampling=SamplingParams(), seed=2**32 - 2, n=4, max_tokens=3)
    plain = request(some(rng, 9), max_tokens=3)
    samples, _ = run_all(engine, [one, plain])
    assert engine.stats.prompt_tokens == 39
    assert len({tuple(whole.token_ids) for whole in samples}) > 1
    for index, whole in enumerate(samples):
        seed = derived_seed(2**32 - 2, index)
        assert whole.token_ids == alone(lively, dataclasses.replace(one, n=1, seed=seed)).token_ids


def test_the_prefix_cache_can_be_switched_off(engine, lively, rng):
    one = request(some(rng, 30), max_tokens=3)
    for each, hits in ((engine, 24), (Engine(lively, SCORING), 0)):
        assert run_one(each, one).token_ids == run_one(each, one).token_ids
        assert each.stats.prefix_hit_tokens == hits


@pytest.mark.parametrize("letters", [range(256), [*b"a\n", *"é".encode(), *"😀".encode()]])
def test_streamed_text_is_the_text_of_all_tokens(letters, engine, lively, rng):
    requests = [
        request(some(rng, 9), sampling=lettered(i, frozenset(letters), temperature=1.5), max_tokens=40)
        for i in range(4)
    ]
    for (whole,) in run_all(engine, requests):
        assert whole.text == lively.tokenizer.decode(whole.token_ids, skip_special_tokens=True)


def test_counters(engine, rng):
    requests = [request(some(rng, 9), max_tokens=5) for _ in range(3)]
    run_all(engine, requests)
    stats = engine.stats
    assert (stats.prompt_tokens, stats.generated_tokens, stats.finished, stats.failed) == (27, 15, 3, 0)
    assert stats.prefill_calls == 1
    stats.finished = 99
    assert engine.stats.finished == 3


def test_requests_without_a_seed_differ_and_another_engine_draws_the_same(lively, rng):
    one = request(some(rng, 8), sampling=SamplingParams(temperature=1.0), seed=None, max_tokens=12)

    def drawn(**options):
        return [samples[0].token_ids for samples in run_all(Engine(lively, TIGHT, **options), [one, one])]

    first, second = drawn()
    assert first != second
    assert drawn() == [first, second]
    assert drawn(seed=1) != [first, second]


def test_a_sleeping_engine_holds_no_device_memory_and_wakes_for_a_request(lively, adapters, rng):
    engine, one = Engine(lively, TIGHT), request(some(rng, 20), adapters["lora"])
    (before,) = run_all(engine, [one])[0]
    loads = engine.stats.adapter_loads
    for _ in range(2):
        engine.sleep()
        assert all(leaf.is_deleted() for leaf in jax.tree.leaves((engine.runner.cache, engine.runner.bank)))
        assert engine.step() == []
    (after,) = run_all(engine, [one])[0]
    assert (after.token_ids, after.logprobs) == (before.token_ids, before.logprobs)
    assert engine.stats.prefix_hit_tokens == 0
    assert engine.stats.adapter_loads == loads + 1
    assert (engine.stats.recompiles, engine.stats.device_failures) == (0, 0)


def test_an_engine_with_requests_does_not_go_to_sleep(lively, rng):
    engine, one = Engine(lively, TIGHT), request(some(rng, 9))
    number = engine.add(one)
    for _ in range(2):
        with pytest.raises(RequestError, match="1 requests are unfinished"):
            engine.sleep()
        wholes = advance(engine, {}, 1)
    assert_as_alone(lively, one, [drain(engine, wholes)[number, 0]])
