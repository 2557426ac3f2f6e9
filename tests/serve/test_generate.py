"""``generate`` as library users meet it: prompts of every kind, seeds, what is refused, and what comes back."""

import dataclasses

import jax
import numpy as np
import pytest
import reference

import preft_jax
from preft_jax import (
    Adapter,
    AdapterConfig,
    AdapterError,
    PreftError,
    RequestError,
    SamplingParams,
    generate,
    random_adapter,
)

ATOL = 1e-4
"""Float32 rounding of log-probabilities, in programs of other shapes."""

GREEDY = SamplingParams(temperature=0.0)


@pytest.fixture(scope="module")
def kinds(adapters):
    return {None: None, **adapters}


TOKENS = 4
"""Generated in each call of ``generate`` here: calls with as many prompts share their programs."""


def one_call(model, prompts, adapters=None, sampling=GREEDY, **options):
    return generate(model, prompts, adapters, sampling, TOKENS, **options)


@pytest.fixture(scope="module")
def hello(lively):
    """Return the completion of a text, alone."""
    return one_call(lively, "Hello")[0]


def test_prompts_of_every_kind(lively, hello):
    ids = lively.tokenizer.encode("Hello")
    for prompts in ("Hello", ["Hello"], ("Hello",), ids, [ids], [np.array(ids)], [tuple(ids)]):
        (done,) = one_call(lively, prompts)
        assert done.token_ids == hello.token_ids


def test_an_array_of_ids_is_one_prompt(lively, hello):
    """As a list of them is."""
    (done,) = one_call(lively, np.array(lively.tokenizer.encode("Hello")))
    assert done.token_ids == hello.token_ids


def test_a_chat_is_rendered_with_the_models_template(lively):
    chat = [{"role": "user", "content": "hi"}]
    text = "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    (expected,) = one_call(lively, text)
    for prompts in (chat, [chat], (tuple(chat),)):
        (done,) = one_call(lively, prompts)
        assert done.token_ids == expected.token_ids


def test_prompts_of_several_kinds_each_with_its_own_adapter_more_than_run_together(lively, kinds):
    prompts = ["Hello", [3, 200, 17], [{"role": "user", "content": "hi"}]]
    names = ("lora", None, "loreft_f3l2")
    done = one_call(lively, prompts, [kinds[name] for name in names], max_num_seqs=2)
    ids = [
        lively.tokenizer.encode("Hello"),
        [3, 200, 17],
        lively.tokenizer.encode("<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"),
    ]
    for tokens, name, ours in zip(ids, names, done, strict=True):
        expected = reference.forced_log_probs(lively, kinds[name], tokens, ours.token_ids)
        np.testing.assert_allclose(ours.logprobs, expected, atol=ATOL)


def test_one_adapter_for_all_prompts(lively, kinds):
    prompts = [[3, 200, 17], [5] * 9]
    done = one_call(lively, prompts, kinds["loreft"])
    for tokens, ours in zip(prompts, done, strict=True):
        expected = reference.forced_log_probs(lively, kinds["loreft"], tokens, ours.token_ids)
        np.testing.assert_allclose(ours.logprobs, expected, atol=ATOL)


def test_seeds(lively):
    """A request's own seed decides; otherwise one from ``seed`` and its index, so that equal prompts differ."""
    free, fixed = SamplingParams(temperature=2.0), SamplingParams(temperature=2.0, seed=1)

    def draws(sampling, **options):
        return [c.token_ids for c in one_call(lively, ["Hello"] * 2, None, sampling, **options)]

    zero, second = draws(free)
    assert zero != second
    assert draws(free) == [zero, second]
    one, third = draws(free, seed=1)
    assert len({tuple(ids) for ids in (zero, second, one, third)}) == 4, "seeds of neighbouring calls coincide"
    assert draws(fixed) == [one, one]
    assert draws([free, fixed], seed=7)[1] == one


def test_no_prompts_are_no_completions(lively):
    assert generate(lively, []) == []
    assert generate(lively, (), adapters=[]) == []


def test_without_a_tokenizer_ids_still_work_and_text_is_refused(lively, hello):
    mute = dataclasses.replace(lively, tokenizer=None)
    (done,) = one_call(mute, [lively.tokenizer.encode("Hello")])
    assert done.token_ids == hello.token_ids
    assert done.text == ""
    with pytest.raises(RequestError, match="no tokenizer"):
        one_call(mute, "Hello")


@pytest.mark.parametrize(
    ("arguments", "options", "error", "text"),
    [
        (("",), {}, RequestError, "empty"),
        ((["Hello", ""],), {}, RequestError, "empty"),
        (([[1, 2], []],), {}, RequestError, "empty"),
        (([[1, 256]],), {}, RequestError, "token id 256.*0 to 255"),
        (([[1, -2]],), {}, RequestError, "token id -2"),
        (([[1, "a"]],), {}, RequestError, "'a'"),
        (([None],), {}, RequestError, "the prompt is None"),
        ((None,), {}, RequestError, "NoneType"),
        ((7,), {}, RequestError, "int"),
        ((b"Hello",), {}, RequestError, "bytes"),
        (({"role": "user", "content": "hi"},), {}, RequestError, "dict"),
        (([{"role": "user"}],), {}, RequestError, "content"),
        (([{"role": "robot", "content": "hi"}],), {}, RequestError, "robot"),
        (("Hello",), {"max_tokens": 0}, RequestError, "max_tokens is 0"),
        (("Hello",), {"max_tokens": 5000}, RequestError, "5005 tokens.*1024 positions"),
        (("Hello",), {"max_tokens": "8"}, RequestError, "max_tokens is '8'"),
        (("Hello",), {"max_num_seqs": 0}, PreftError, "max_num_seqs is 0"),
        ((["a", "b"], [None]), {}, RequestError, "adapters has 1 entries for 2 prompts"),
        ((["a", "b"], None, [GREEDY] * 3), {}, RequestError, "sampling has 3 entries for 2 prompts"),
        (("Hello", "lora"), {}, PreftError, "'lora'"),
        (("Hello", None, None), {}, RequestError, "sampling is None"),
        (("Hello", None, {"temperature": 0}), {}, RequestError, "sampling is {'temperature': 0}"),
    ],
    ids=str,
)
def test_calls_that_cannot_work_are_refused_by_name(arguments, options, error, text, lively):
    with pytest.raises(error, match=f"(?s){text}"):
        generate(lively, *arguments, **options)


def test_an_adapter_that_lacks_a_leaf_is_refused_by_its_name(lively, kinds):
    params = {
        "layers": [{site: dict(leaves) for site, leaves in sites.items()} for sites in kinds["lora"].params["layers"]]
    }
    del params["layers"][1]["q"]["lora_b"]
    with pytest.raises(AdapterError, match=r"missing layers\.1\.q\.lora_b"):
        generate(lively, "Hello", Adapter(kinds["lora"].config, params))


def test_an_adapter_of_another_base_is_refused(lively, kinds):
    other = Adapter(dataclasses.replace(kinds["lora"].config, base_model_digest="e" * 64), kinds["lora"].params)
    with pytest.raises(AdapterError, match="eeeeeeeeeeee"):
        generate(lively, ["a", "b"], [None, other])
    right = dataclasses.replace(kinds["lora"].config, base_model_digest=lively.digest)
    assert one_call(lively, "Hello", Adapter(right, kinds["lora"].params))


def test_the_real_tiny_model_answers(tiny):
    """As in the README: by name, with text in and text out."""
    adapter = preft_jax.init_adapter(AdapterConfig(), tiny.config, jax.random.key(0))
    base, still = generate(tiny, ["Hello", "Hello"], [None, adapter], GREEDY, max_tokens=TOKENS)
    assert base.token_ids == still.token_ids
    np.testing.assert_allclose(base.logprobs, still.logprobs, atol=1e-5)


def assert_consistent(model, done):
    assert len(done.token_ids) == len(done.logprobs) == len(done.sampling_logprobs)
    assert all(isinstance(token, int) for token in done.token_ids)
    assert all(value < 0 for value in done.logprobs)
    written = done.token_ids[: len(done.token_ids) - (done.finish_reason == "stop")]
    assert done.text == model.tokenizer.decode(written, skip_special_tokens=True)


def test_a_completion_is_consistent_however_it_ends(lively, hello, kinds):
    """A stop token is the last token and no part of the text; what overflows has an error and no tokens."""
    assert_consistent(lively, hello)
    assert (hello.finish_reason, hello.error, len(hello.token_ids)) == ("length", None, TOKENS)
    assert hello.sampling_logprobs == [0.0] * TOKENS
    end = hello.token_ids[-1]
    stopping = SamplingParams(temperature=0.0, stop_token_ids=(end,))
    (stopped,) = one_call(lively, "Hello", None, stopping)
    assert_consistent(lively, stopped)
    assert (stopped.finish_reason, stopped.error) == ("stop", None)
    assert stopped.token_ids == hello.token_ids[: hello.token_ids.index(end) + 1]
    params = jax.tree.map(lambda leaf: np.full_like(leaf, 1e19), kinds["lora"].params)
    fine, failed = one_call(lively, ["Hello", "Hello"], [None, Adapter(kinds["lora"].config, params)])
    assert fine.token_ids == hello.token_ids
    assert_consistent(lively, failed)
    assert (failed.finish_reason, failed.token_ids) == ("error", [])
    assert failed.error


@pytest.mark.slow
def test_a_real_model_serves_a_mixed_batch_as_it_was_trained(smollm2, trained):
    """SmolLM2-135M in float32: thirty layers, real text, four requests at once; training's log-probabilities."""
    texts = ["The capital of France is", "def add(a, b):", "Once upon a time", "2 + 2 ="]
    configs = (
        None,
        AdapterConfig(rank=16),
        AdapterConfig(kind="loreft", rank=8),
        AdapterConfig(rank=8, positions="all"),
    )
    made = [
        None if config is None else random_adapter(config, smollm2.config, jax.random.key(i), strength=0.5)
        for i, config in enumerate(configs)
    ]
    done = generate(smollm2, texts, made, GREEDY, max_tokens=8)
    for text, adapter, ours in zip(texts, made, done, strict=True):
        prompt = smollm2.tokenizer.encode(text)
        tokens = [*prompt, *ours.token_ids]
        mask = reference.adapter_mask(adapter, len(prompt), len(ours.token_ids))
        log_probs = trained(smollm2, adapter, tokens, mask)[len(prompt) - 1 : -1]
        expected = log_probs[np.arange(len(ours.token_ids)), ours.token_ids]
        np.testing.assert_allclose(ours.logprobs, expected, atol=1e-3)
        assert [int(row.argmax()) for row in log_probs] == ours.token_ids
