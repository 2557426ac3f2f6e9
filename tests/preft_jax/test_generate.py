"""Generation as library users meet it: prompts of every kind, ends of texts, log-probabilities, and what is refused."""

import dataclasses
import itertools

import jax
import numpy as np
import pytest
import reference
from preft_jax.generator import RunShape, request_edit_mask

import preft_jax
from preft_jax import (
    Adapter,
    AdapterConfig,
    AdapterError,
    ConfigError,
    Generator,
    Limits,
    PreftError,
    Request,
    RequestError,
    SamplingParams,
    generate,
    random_adapter,
)
from preft_jax.text.chat import EncodedPrompt

EVERY = (
    None, "lora", "lora_r24", "lora_pattern", "direft", "direft_free", "loreft", "loreft_f3l2", "lora_skip",
    "lora_all", "loreft_all",
)  # fmt: skip
ATOL = 1e-4
"""Float32 rounding of log-probabilities, in programs of other shapes."""

GREEDY = SamplingParams(temperature=0.0)
SHAPE = RunShape(num_tokens=64, max_query_len=64, tile_entries=16, rows=8, row_entries=4, stop_ids=4)
"""The programs that the contracts' tests compile too."""


@pytest.fixture(scope="module")
def kinds(adapters):
    return {None: None, **adapters}


@pytest.fixture(scope="module")
def generator(lively, limits):
    return Generator(lively, limits)


def request(tokens, adapter=None, *, sampling=GREEDY, max_tokens=6, seed=0, spans=()):
    tokens = [int(token) for token in tokens]
    return Request(
        prompt=EncodedPrompt(tokens, spans), adapter=adapter, sampling=sampling, max_tokens=max_tokens, seed=seed
    )


def run(generator, requests):
    done = dict(generator.run(requests, shape=SHAPE))
    return [done[i] for i in range(len(requests))]


# What comes back.


def test_a_completion_is_consistent(generator, lively, rng):
    (done,) = run(generator, [request(rng.integers(0, 256, 9), max_tokens=7)])
    assert len(done.token_ids) == len(done.logprobs) == len(done.sampling_logprobs) == len(done.token_times) == 7
    assert done.finish_reason == "length"
    assert all(isinstance(token, int) for token in done.token_ids)
    assert done.text == lively.tokenizer.decode(done.token_ids, skip_special_tokens=True)
    assert done.sampling_logprobs == [0.0] * 7
    assert all(value < 0 for value in done.logprobs)


def test_one_token(generator, rng):
    """It comes from prefill alone."""
    prompt = rng.integers(0, 256, 9)
    (one,), (more,) = (run(generator, [request(prompt, max_tokens=count)]) for count in (1, 5))
    assert one.token_ids == more.token_ids[:1]
    assert one.finish_reason == "length"


@pytest.mark.parametrize("max_tokens", [2, 4, 5, 9])
def test_every_count_of_tokens_around_the_steps_of_one_call(max_tokens, generator, rng):
    """Four decode steps a call: texts that end within, at and after its end, beside others."""
    prompts = rng.integers(0, 256, (8, 5))
    done = run(generator, [request(p, max_tokens=max_tokens if i else 3) for i, p in enumerate(prompts)])
    assert [len(c.token_ids) for c in done] == [3] + [max_tokens] * 7


def test_the_longest_request_that_the_limits_allow(generator, kinds, lively, rng):
    one = request(rng.integers(0, 256, 90), kinds["lora"], max_tokens=6)
    (done,) = run(generator, [one])
    expected = reference.forced_log_probs(lively, one.adapter, one.prompt.token_ids, done.token_ids)
    np.testing.assert_allclose(done.logprobs, expected, atol=ATOL)


def test_times_are_the_clocks_and_never_go_back(lively, limits, rng):
    ticks = itertools.count(100)
    generator = Generator(lively, limits, clock=lambda: float(next(ticks)))
    done = run(generator, [request(p) for p in rng.integers(0, 256, (8, 5))])
    times = [c.token_times for c in done]
    assert all(row == sorted(row) and row[0] >= 100 for row in times)
    assert min(row[1] for row in times) > max(row[0] for row in times)


# Ends of texts.


def long_greedy(generator, rng, count=12):
    """Return a prompt and a greedy text whose first three tokens differ."""
    while True:
        prompt = rng.integers(0, 256, 8)
        (done,) = run(generator, [request(prompt, max_tokens=count)])
        if len(set(done.token_ids[:3])) == 3:
            return prompt, done


@pytest.mark.parametrize("at", [0, 1, 2])
def test_a_stop_token_ends_the_text_and_is_the_last_token(at, generator, lively, rng):
    prompt, whole = long_greedy(generator, rng)
    sampling = SamplingParams(temperature=0.0, stop_token_ids=(256 + 7, whole.token_ids[at]))
    (done,) = run(generator, [request(prompt, sampling=sampling, max_tokens=12)])
    assert done.token_ids == whole.token_ids[: at + 1]
    assert done.finish_reason == "stop"
    assert done.text == lively.tokenizer.decode(whole.token_ids[:at], skip_special_tokens=True)
    assert len(done.logprobs) == at + 1


def test_a_stop_token_at_the_last_step_is_a_stop(generator, rng):
    prompt, whole = long_greedy(generator, rng)
    sampling = SamplingParams(temperature=0.0, stop_token_ids=(whole.token_ids[2],))
    (done,) = run(generator, [request(prompt, sampling=sampling, max_tokens=3)])
    assert (len(done.token_ids), done.finish_reason) == (3, "stop")


def test_many_stop_tokens(generator, rng):
    prompt, whole = long_greedy(generator, rng)
    unused = [token for token in range(256) if token not in whole.token_ids][:9]
    sampling = SamplingParams(temperature=0.0, stop_token_ids=(*unused, whole.token_ids[2]))
    one = request(prompt, sampling=sampling, max_tokens=12)
    ((_, done),) = generator.run([one], shape=SHAPE._replace(stop_ids=16))
    assert done.token_ids == whole.token_ids[:3]


def test_one_text_that_ends_does_not_end_its_neighbours(generator, rng):
    prompt, whole = long_greedy(generator, rng)
    stop = SamplingParams(temperature=0.0, stop_token_ids=(whole.token_ids[1],))
    requests = [request(prompt, sampling=stop if i % 2 else GREEDY, max_tokens=12) for i in range(8)]
    for i, done in enumerate(run(generator, requests)):
        assert done.token_ids == (whole.token_ids[:2] if i % 2 else whole.token_ids)
        assert done.finish_reason == ("stop" if i % 2 else "length")


def test_the_models_end_tokens_end_a_text_unless_they_are_ignored(generator, lively, limits, rng):
    prompt, whole = long_greedy(generator, rng)
    config = dataclasses.replace(lively.config, eos_token_ids=(whole.token_ids[2], whole.token_ids[1]))
    ending = Generator(dataclasses.replace(lively, config=config), limits)
    ignoring = SamplingParams(temperature=0.0, ignore_eos=True)
    both = SamplingParams(temperature=0.0, ignore_eos=True, stop_token_ids=(whole.token_ids[2],))
    ended, ignored, stopped = (
        done.token_ids
        for done in run(ending, [request(prompt, sampling=s, max_tokens=12) for s in (GREEDY, ignoring, both)])
    )
    assert ended == whole.token_ids[:2]
    assert ignored == whole.token_ids
    assert stopped == whole.token_ids[:3]


# Log-probabilities: the contract with training.


@pytest.mark.parametrize("name", EVERY)
def test_logprobs_are_the_trainers_on_the_same_tokens(name, generator, kinds, lively, trained, rng):
    """15 prompt tokens and six drawn at temperature 0.8; the raw log-probability is that of temperature 1."""
    sampling = SamplingParams(temperature=0.8, top_k=40)
    one = request(rng.integers(0, 256, 15), kinds[name], sampling=sampling, seed=3)
    (done,) = run(generator, [one])
    tokens = [*one.prompt.token_ids, *done.token_ids]
    log_probs = trained(lively, one.adapter, tokens, reference.adapter_mask(one.adapter, 15, 6))[14:-1]
    np.testing.assert_allclose(done.logprobs, log_probs[np.arange(6), done.token_ids], atol=ATOL)
    under = [reference.sampling_log_prob(row, sampling, t) for row, t in zip(log_probs, done.token_ids, strict=True)]
    np.testing.assert_allclose(done.sampling_logprobs, under, atol=3 * ATOL)


@pytest.mark.parametrize(
    "sampling",
    [
        SamplingParams(),
        SamplingParams(temperature=1.6),
        SamplingParams(top_p=0.7),
        SamplingParams(min_p=0.1),
        SamplingParams(temperature=0.6, top_k=9, top_p=0.9, min_p=0.05),
        GREEDY,
    ],
    ids=str,
)
def test_sampling_logprobs_are_of_the_distribution_that_was_drawn_from(sampling, generator, kinds, lively, rng):
    """Beside neighbours with other parameters; a token at the edge of the kept set may fall either way by rounding."""
    one = request(rng.integers(0, 256, 9), kinds["direft"], sampling=sampling, seed=8, max_tokens=8)
    others = [request(rng.integers(0, 256, 4), sampling=SamplingParams(top_k=3 + i), seed=i) for i in range(7)]
    done = run(generator, [*others, one])[-1]
    tokens = [*one.prompt.token_ids, *done.token_ids]
    mask = reference.adapter_mask(one.adapter, 9, 8)
    log_probs = reference.log_softmax(reference.forward(lively.config, lively.params, tokens, one.adapter, mask))[8:-1]
    if sampling.temperature == 0:
        assert done.sampling_logprobs == [0.0] * 8
        return
    under = [reference.sampling_log_prob(row, sampling, t) for row, t in zip(log_probs, done.token_ids, strict=True)]
    np.testing.assert_allclose(done.sampling_logprobs, under, atol=3 * ATOL)


# What is refused, and that nothing is lost by it.


def other_base(adapter):
    return Adapter(dataclasses.replace(adapter.config, base_model_digest="e" * 64), adapter.params)


def narrow(lively):
    config = dataclasses.replace(lively.config, hidden_size=32)
    return random_adapter(AdapterConfig(rank=4), config, jax.random.key(0))


def huge(lively):
    return random_adapter(AdapterConfig(rank=1024, targets=("q",)), lively.config, jax.random.key(0))


REFUSED = {
    "no tokens": (lambda k, m: request([]), RequestError, "prompt is empty"),
    "no room": (lambda k, m: request([1] * 91), RequestError, "91 tokens and max_tokens is 6.*max_model_len 96"),
    "max_tokens 0": (lambda k, m: request([1], max_tokens=0), RequestError, "max_tokens is 0"),
    "max_tokens -1": (lambda k, m: request([1], max_tokens=-1), RequestError, "max_tokens is -1"),
    "max_tokens 2.5": (lambda k, m: request([1], max_tokens=2.5), RequestError, "max_tokens is 2.5"),
    "id 256": (lambda k, m: request([1, 256]), RequestError, "0 to 255"),
    "id -1": (lambda k, m: request([1, -1]), RequestError, "0 to 255"),
    "seed -1": (lambda k, m: request([1], seed=-1), RequestError, "seed is -1"),
    "seed 2**32": (lambda k, m: request([1], seed=2**32), RequestError, f"seed is {2**32}"),
    "another base": (lambda k, m: request([1], other_base(k["lora"])), AdapterError, "eeeeeeeeeeee.*000000000000"),
    "another width": (lambda k, m: request([1], narrow(m)), AdapterError, r"layers\.0\.q\.lora_a has shape \[4, 32\]"),
    "spans unknown": (lambda k, m: request([1, 2], k["lora_skip"], spans=None), RequestError, "assistant_turns 'edit'"),
    "span outside": (lambda k, m: request([1, 2], k["lora_skip"], spans=((1, 3),)), RequestError, r"\(1, 3\)"),
    "too wide for the bank": (lambda k, m: request([1], huge(m)), AdapterError, "64 rank pages at 'q'.*63.*bank_pages"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_bad_request_is_refused_before_any_work_and_the_generator_goes_on(name, kinds, lively, limits, rng):
    """It stands in the second batch: the first must not have run in vain."""
    make, error, text = REFUSED[name]
    ticks = itertools.count()

    def clock():
        assert next(ticks) < 1000, "generation does not end"
        return 0.0

    generator = Generator(lively, limits, clock=clock)
    good = [request(p, kinds["loreft"]) for p in rng.integers(0, 256, (8, 5))]
    before = run(generator, good)
    started = next(ticks)
    with pytest.raises(error, match=f"(?s){text}"):
        next(generator.run([*good, make(kinds, lively)], shape=SHAPE))
    assert next(ticks) == started + 1, "work was done"
    after = run(generator, good)
    assert [c.logprobs for c in after] == [c.logprobs for c in before]


def test_a_base_only_run_refuses_adapters(generator, kinds):
    with pytest.raises(RequestError, match="base_only"):
        next(generator.run([request([1], kinds["lora"])], base_only=True))


def test_a_base_only_run_is_the_base_model(generator, lively, rng):
    """Another prefill program, which knows no adapters."""
    one = request(rng.integers(0, 256, 9))
    ((_, done),) = generator.run([one], shape=SHAPE, base_only=True)
    expected = reference.forced_log_probs(lively, None, one.prompt.token_ids, done.token_ids)
    np.testing.assert_allclose(done.logprobs, expected, atol=ATOL)


@pytest.mark.parametrize(
    "shape",
    [
        SHAPE._replace(num_tokens=32, max_query_len=32),
        SHAPE._replace(max_query_len=16),
        SHAPE._replace(rows=1),
        SHAPE._replace(stop_ids=0),
    ],
    ids=["tokens", "query", "rows", "stop ids"],
)
def test_a_shape_that_is_too_small_is_refused(shape, lively, limits, rng):
    """It would leave out tokens, rows or end tokens."""
    stop = SamplingParams(stop_token_ids=(3,))
    requests = [request(rng.integers(0, 256, 40), sampling=stop) for _ in range(2)]
    with pytest.raises(PreftError):
        next(Generator(lively, limits).run(requests, shape=shape))


def test_a_failed_device_call_loses_its_own_batch_only(generator, kinds, rng):
    """It has consumed the donated cache."""
    good = [request(p, kinds["lora"]) for p in rng.integers(0, 256, (8, 5))]
    before = run(generator, good)
    plain = generator.programs

    def failing(params, cache, *rest, **options):
        plain.decode(params, cache, *rest, **options)
        raise RuntimeError("device lost")

    generator.programs = plain._replace(decode=failing)
    try:
        with pytest.raises(RuntimeError, match="device lost"):
            run(generator, good)
    finally:
        generator.programs = plain
    assert [c.logprobs for c in run(generator, good)] == [c.logprobs for c in before]


def test_a_run_that_is_abandoned_leaves_the_generator_usable(generator, kinds, rng):
    good = [request(p, kinds["lora"]) for p in rng.integers(0, 256, (8, 5))]
    before = run(generator, good)
    abandoned = generator.run([*good, *good], shape=SHAPE)
    next(abandoned)
    abandoned.close()
    assert [c.logprobs for c in run(generator, good)] == [c.logprobs for c in before]


def test_adapters_that_do_not_fit_together_leave_the_bank_as_it_was(kinds, lively, limits, rng):
    generator = Generator(lively, dataclasses.replace(limits, bank_pages=4))
    good = [request(p, kinds["loreft"]) for p in rng.integers(0, 256, (8, 5))]
    before = run(generator, good)
    bank = jax.tree.map(np.asarray, generator.bank)
    with pytest.raises(AdapterError, match=r"rank pages.*the bank has 3.*bank_pages"):
        generator.load_adapters([kinds["direft"], kinds["lora_pattern"], kinds["lora_r24"]])
    assert all(
        np.array_equal(ours, held)
        for ours, held in zip(jax.tree.leaves(generator.bank), jax.tree.leaves(bank), strict=True)
    )
    assert [c.logprobs for c in run(generator, good)] == [c.logprobs for c in before]


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"max_num_seqs": 0}, "max_num_seqs is 0"),
        ({"max_model_len": -1}, "max_model_len is -1"),
        ({"page_size": 1.5}, "page_size is 1.5"),
        ({"bank_pages": 0}, "bank_pages is 0"),
        ({"prefill_tokens": 48, "tile": 32}, "prefill_tokens 48.*tile 32"),
    ],
)
def test_limits_that_cannot_work_are_refused_by_name(fields, text):
    with pytest.raises(ConfigError, match=text):
        Limits(**fields)


def test_limits_longer_than_the_model_are_refused(lively):
    with pytest.raises(ConfigError, match=r"2048.*1024 positions"):
        Generator(lively, Limits(max_model_len=2048))


def test_request_masks_of_the_base_model_are_all_false():
    mask = request_edit_mask(request([1, 2, 3]))
    assert mask.shape == (3, 2)
    assert not mask.any()


# The one call.

TOKENS = 4
"""Generated in each call of ``generate`` here, which makes programs of its own for the requests it gets."""


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


def test_prompts_of_several_kinds_each_with_its_own_adapter_in_more_than_one_batch(lively, kinds):
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
    """A request's own seed decides; otherwise ``seed`` plus its index, so that equal prompts differ."""
    free, fixed = SamplingParams(temperature=2.0), SamplingParams(temperature=2.0, seed=1)

    def draws(sampling, **options):
        return [c.token_ids for c in one_call(lively, ["Hello"] * 2, None, sampling, **options)]

    zero, one = draws(free)
    assert zero != one
    assert draws(free) == [zero, one]
    assert draws(free, seed=1)[0] == one
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
        (([None],), {}, RequestError, "NoneType"),
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


def test_the_seed_of_the_sampling_parameters_wins(lively, hello):
    prompt = EncodedPrompt(lively.tokenizer.encode("Hello"), ())
    assert Request(prompt=prompt, seed=3).draw_seed == 3
    assert Request(prompt=prompt, seed=3, sampling=SamplingParams(seed=9)).draw_seed == 9


def test_an_adapter_of_another_base_is_refused(lively, kinds):
    with pytest.raises(AdapterError, match="eeeeeeeeeeee"):
        generate(lively, ["a", "b"], [None, other_base(kinds["lora"])])
    right = dataclasses.replace(kinds["lora"].config, base_model_digest=lively.digest)
    assert one_call(lively, "Hello", Adapter(right, kinds["lora"].params))


def test_the_real_tiny_model_answers(tiny):
    """As in the README: by name, with text in and text out."""
    adapter = preft_jax.init_adapter(AdapterConfig(), tiny.config, jax.random.key(0))
    base, still = generate(tiny, ["Hello", "Hello"], [None, adapter], GREEDY, max_tokens=TOKENS)
    assert base.token_ids == still.token_ids
    np.testing.assert_allclose(base.logprobs, still.logprobs, atol=1e-5)
