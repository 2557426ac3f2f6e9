"""Sampling against NumPy: which tokens the filters keep, how often each is drawn, and both log-probabilities; what
biases and penalties do to the logits before.
"""

import copy
import dataclasses
import functools
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference

from preft_jax import RequestError, SamplingParams
from preft_jax.sampling.arrays import sampling_arrays
from preft_jax.sampling.device import INVALID, History, sample, top_logprobs
from preft_jax.sampling.logits import add_bias, penalise
from preft_jax.sampling.parameters import MAX_BIAS, MAX_LOGPROBS

VOCAB, ROWS, SPAN = 24, 512, 20


@functools.cache
def program():
    return jax.jit(sample)


def draw(logits, params, seeds, positions, texts=None):
    """Draw one token a row; always ``ROWS`` rows, so that one program (two, with ``texts``) serves every test."""
    rows = len(logits)
    padded = np.zeros((ROWS, VOCAB), np.float32)
    padded[:rows] = logits
    at = np.zeros(ROWS, np.int32)
    at[:rows] = positions
    history = () if texts is None else (history_of(texts),)
    drawn = program()(padded, at, sampling_arrays(list(params), list(seeds), ROWS), *history)
    return jax.tree.map(lambda array: np.asarray(array)[:rows], drawn)


def history_of(texts, rows=ROWS, span=SPAN):
    """Pack pairs of prompt and generated ids; behind each text stand ids that must not count."""
    token = np.tile(np.arange(span, dtype=np.int32) % 7, (rows, 1))
    prompt_len, length = np.zeros(rows, np.int32), np.zeros(rows, np.int32)
    for row, (prompt, generated) in enumerate(texts):
        prompt_len[row], length[row] = len(prompt), len(prompt) + len(generated)
        token[row, : length[row]] = [*prompt, *generated]
    return History(token, prompt_len, length)


def draws_of(row, params, count=ROWS, first_position=0):
    """Draw ``count`` tokens from one row of logits, at consecutive positions of one request."""
    return draw(np.tile(row, (count, 1)), [params] * count, [17] * count, np.arange(count) + first_position)


FILTERS = [
    SamplingParams(),
    SamplingParams(temperature=0.5),
    SamplingParams(temperature=2.0, top_k=7),
    SamplingParams(top_k=1),
    SamplingParams(top_k=VOCAB + 5),
    SamplingParams(top_p=0.6),
    SamplingParams(top_p=1e-6),
    SamplingParams(min_p=0.2),
    SamplingParams(min_p=1.0),
    SamplingParams(temperature=1.5, top_k=10, top_p=0.8, min_p=0.15),
    SamplingParams(temperature=0.7, top_k=5, top_p=0.5),
    SamplingParams(top_p=0.9, min_p=0.01),
]


@pytest.mark.parametrize("params", FILTERS, ids=str)
def test_draws_come_from_the_kept_set_in_its_proportions(params, rng):
    """Chi-square over 2048 draws; the bound is passed by chance about once in 1e5, and the seed is fixed."""
    row = (1.5 * rng.standard_normal(VOCAB)).astype(np.float32)
    tokens = np.concatenate([draws_of(row, params, first_position=ROWS * i).token_B for i in range(4)])
    allowed = reference.kept_tokens(row, params)
    assert set(tokens) <= set(allowed)
    probs = np.exp(reference.log_softmax(reference.f64(row)[allowed] / params.temperature))
    counts = np.array([(tokens == token).sum() for token in allowed])
    expected = probs * len(tokens)
    chi2, freedom = ((counts - expected) ** 2 / expected).sum(), len(allowed) - 1
    assert chi2 <= freedom + 4.3 * np.sqrt(2 * freedom) + 14 * (freedom > 0)


@pytest.mark.parametrize("params", FILTERS, ids=str)
def test_both_log_probabilities(params, rng):
    """Raw: of the whole vocabulary at temperature 1. Sampling: of the kept tokens at the request's temperature."""
    rows = (2 * rng.standard_normal((40, VOCAB))).astype(np.float32)
    drawn = draw(rows, [params] * 40, range(40), range(40))
    for i, row in enumerate(reference.f64(rows)):
        token = drawn.token_B[i]
        assert drawn.logprob_B[i] == pytest.approx(reference.log_softmax(row)[token], abs=1e-5)
        under = reference.sampling_log_prob(row, params, token)
        assert drawn.sampling_logprob_B[i] == pytest.approx(under, abs=2e-5)


def test_temperature_zero_is_the_most_likely_token_with_certainty(rng):
    rows = rng.standard_normal((9, VOCAB)).astype(np.float32)
    drawn = draw(rows, [SamplingParams(temperature=0.0, top_k=3, top_p=0.5)] * 9, range(9), range(9))
    np.testing.assert_array_equal(drawn.token_B, rows.argmax(axis=1))
    np.testing.assert_array_equal(drawn.sampling_logprob_B, 0)
    np.testing.assert_allclose(drawn.logprob_B, reference.log_softmax(reference.f64(rows)).max(axis=1), atol=1e-5)


@pytest.mark.parametrize("temperature", [1e-3, 1e-6, 1e-30, 1e-37, 2e-38, 1e-44])
def test_a_tiny_temperature_is_nearly_greedy_and_finite(temperature, rng):
    rows = (20 * rng.standard_normal((9, VOCAB))).astype(np.float32)
    drawn = draw(rows, [SamplingParams(temperature=temperature)] * 9, range(9), range(9))
    np.testing.assert_array_equal(drawn.token_B, rows.argmax(axis=1))
    np.testing.assert_allclose(drawn.sampling_logprob_B, 0, atol=1e-6)
    filtered = draw(rows, [SamplingParams(temperature=temperature, top_p=0.9)] * 9, range(9), range(9))
    np.testing.assert_array_equal(filtered.token_B, rows.argmax(axis=1))
    np.testing.assert_allclose(filtered.sampling_logprob_B, 0, atol=1e-6)


def test_ties_keep_the_lower_token_id():
    row = np.zeros(VOCAB, np.float32)
    row[[5, 9, 20]] = 3.0
    assert set(draws_of(row, SamplingParams(top_k=2)).token_B) == {5, 9}
    assert set(draws_of(row, SamplingParams(temperature=0.0)).token_B) == {5}


@pytest.mark.parametrize(("top_p", "tokens"), [(0.2, {2}), (0.5, {2, 3}), (0.6, {2, 3, 5}), (1.0, {2, 3, 5, 7})])
def test_the_nucleus_is_the_smallest_set_that_reaches_top_p(top_p, tokens):
    """Four tokens of exactly a quarter each, and no others."""
    row = np.full(VOCAB, -200.0, np.float32)
    row[[2, 3, 5, 7]] = 1.0
    assert set(draws_of(row, SamplingParams(top_p=top_p)).token_B) == tokens


def test_a_key_is_the_seed_and_the_position_and_nothing_else(rng):
    """Any order of the rows, and any neighbours: the same draws."""
    rows = rng.standard_normal((30, VOCAB)).astype(np.float32)
    seeds, positions = rng.integers(0, 2**32, 30), rng.integers(0, 900, 30)
    params = [FILTERS[i % len(FILTERS)] for i in range(30)]
    together = draw(rows, params, seeds, positions)
    order = rng.permutation(30)
    shuffled = draw(rows[order], [params[i] for i in order], seeds[order], positions[order])
    for ours, other in zip(together, shuffled, strict=True):
        np.testing.assert_array_equal(ours[order], other)
    for i in range(0, 30, 5):
        alone = draw(rows[i : i + 1], [params[i]], [seeds[i]], [positions[i]])
        assert alone.token_B[0] == together.token_B[i]
        assert alone.sampling_logprob_B[0] == pytest.approx(together.sampling_logprob_B[i], abs=1e-5)


def test_another_seed_or_position_draws_anew():
    row = np.zeros(VOCAB, np.float32)
    many = [SamplingParams()] * 200
    rows = np.tile(row, (200, 1))
    assert len(set(draw(rows, many, range(200), [3] * 200).token_B)) > VOCAB // 2
    assert len(set(draw(rows, many, [3] * 200, range(200)).token_B)) > VOCAB // 2
    assert len(set(draw(rows, many, [3] * 200, [3] * 200).token_B)) == 1
    assert len(set(draw(rows, many, [2**32 - 1] * 200, range(200)).token_B)) > VOCAB // 2


def test_a_filtered_row_does_not_change_its_neighbours(rng):
    """Filters sort the whole batch; a row that has none draws the same token, with or without such a neighbour."""
    rows = (2 * rng.standard_normal((40, VOCAB))).astype(np.float32)
    plain = [SamplingParams(temperature=0.9)] * 40
    mixed = [params if i % 4 else SamplingParams(top_k=2, top_p=0.5) for i, params in enumerate(plain)]
    first, second = draw(rows, plain, range(40), range(40)), draw(rows, mixed, range(40), range(40))
    untouched = np.arange(40) % 4 > 0
    np.testing.assert_array_equal(first.token_B[untouched], second.token_B[untouched])
    np.testing.assert_array_equal(first.logprob_B[untouched], second.logprob_B[untouched])
    np.testing.assert_allclose(
        first.sampling_logprob_B[untouched], second.sampling_logprob_B[untouched], atol=1e-5
    )  # fmt: skip
    assert (first.token_B != second.token_B)[~untouched].any()


def test_a_filter_that_keeps_the_drawn_token_does_not_change_the_draw(rng):
    rows = (2 * rng.standard_normal((200, VOCAB))).astype(np.float32)
    free = draw(rows, [SamplingParams()] * 200, range(200), range(200)).token_B
    params = SamplingParams(top_k=8)
    filtered = draw(rows, [params] * 200, range(200), range(200)).token_B
    same = [free[i] in reference.kept_tokens(rows[i], params) for i in range(200)]
    np.testing.assert_array_equal(free[same], filtered[same])
    assert 100 < sum(same) < 200


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"temperature": -0.1}, "temperature is -0.1"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"temperature": float("inf")}, "temperature is inf"),
        ({"temperature": "1"}, "temperature is '1'"),
        ({"temperature": None}, "temperature is None"),
        ({"top_k": -2}, "top_k is -2"),
        ({"top_k": 1.5}, "top_k is 1.5"),
        ({"top_k": 2**31}, f"top_k is {2**31}"),
        ({"top_p": 0.0}, "top_p is 0.0"),
        ({"top_p": 1.1}, "top_p is 1.1"),
        ({"top_p": float("nan")}, "top_p is nan"),
        ({"min_p": -0.1}, "min_p is -0.1"),
        ({"min_p": 1.5}, "min_p is 1.5"),
        ({"presence_penalty": 2.01}, "presence_penalty is 2.01"),
        ({"presence_penalty": float("nan")}, "presence_penalty is nan"),
        ({"frequency_penalty": -2.5}, "frequency_penalty is -2.5"),
        ({"frequency_penalty": "1"}, "frequency_penalty is '1'"),
        ({"repetition_penalty": 0}, "repetition_penalty is 0"),
        ({"repetition_penalty": -1.0}, "repetition_penalty is -1.0"),
        ({"repetition_penalty": 10.5}, "repetition_penalty is 10.5"),
        ({"repetition_penalty": float("inf")}, "repetition_penalty is inf"),
        ({"repetition_penalty": None}, "repetition_penalty is None"),
        ({"logit_bias": 3}, "logit_bias is 3"),
        ({"logit_bias": "ab"}, "logit_bias is 'ab'"),
        ({"logit_bias": [5, 6]}, r"logit_bias is \[5, 6\]"),
        ({"logit_bias": [(1, 2.0, 3.0)]}, "logit_bias is"),
        ({"logit_bias": {"7": 1.0}}, "logit_bias names the token '7'"),
        ({"logit_bias": {7.0: 1.0}}, "logit_bias names the token 7.0"),
        ({"logit_bias": {-1: 1.0}}, "logit_bias names the token -1"),
        ({"logit_bias": {2**31: 1.0}}, f"logit_bias names the token {2**31}"),
        ({"logit_bias": {4: 1.0, 7: 100.5}}, "logit_bias gives token 7 the bias 100.5"),
        ({"logit_bias": {7: -101}}, "logit_bias gives token 7 the bias -101"),
        ({"logit_bias": {7: float("nan")}}, "logit_bias gives token 7 the bias nan"),
        ({"logit_bias": {7: float("-inf")}}, "logit_bias gives token 7 the bias -inf"),
        ({"logit_bias": {7: None}}, "logit_bias gives token 7 the bias None"),
        ({"logit_bias": [(7, 1.0), (7, 2.0)]}, "logit_bias names a token more than once"),
        ({"logit_bias": dict.fromkeys(range(MAX_BIAS + 1), 1.0)}, "logit_bias has 301 entries"),
        ({"seed": -1}, "seed is -1"),
        ({"seed": 2**32}, f"seed is {2**32}"),
        ({"seed": 1.0}, "seed is 1.0"),
        ({"stop_token_ids": (2**31,)}, "stop_token_ids"),
        ({"stop_token_ids": ("a",)}, "stop_token_ids"),
        ({"stop_token_ids": 3}, "stop_token_ids"),
    ],
    ids=str,
)
def test_parameters_that_cannot_work_are_refused_by_name(fields, text):
    with pytest.raises(RequestError, match=text):
        SamplingParams(**fields)


def test_the_limits_of_each_parameter_are_allowed():
    SamplingParams(temperature=0, top_k=0, top_p=1, min_p=1, seed=0)
    SamplingParams(temperature=100.0, top_k=-1, top_p=1e-9, min_p=0, seed=2**32 - 1)
    SamplingParams(presence_penalty=2, frequency_penalty=-2, repetition_penalty=10)
    SamplingParams(presence_penalty=-2, frequency_penalty=2, repetition_penalty=1e-9)
    SamplingParams(logit_bias={0: -100, 2**31 - 1: 100} | dict.fromkeys(range(1, MAX_BIAS - 1), 0.0))


def test_numpy_numbers_are_numbers():
    """A sweep over ``np.linspace`` in float32 must not need a cast at each call."""
    SamplingParams(temperature=np.float32(0.5), top_k=np.int64(4), top_p=np.float32(0.9), seed=np.uint32(7))
    SamplingParams(presence_penalty=np.float32(0.5), repetition_penalty=np.float64(2))
    assert SamplingParams(logit_bias={np.int32(3): np.float32(1.5)}) == SamplingParams(logit_bias={3: 1.5})


def test_a_bias_is_kept_frozen():
    """Whatever order it came in, whatever happens to the mapping later; and copies are the same."""
    given = {9: 1.0, 4: -2.0}
    params = SamplingParams(logit_bias=given)
    given[4] = 50.0
    assert params.logit_bias == ((4, -2.0), (9, 1.0))
    same = SamplingParams(logit_bias={4: -2.0, 9: 1.0})
    sampling_arrays([params], [0], 1)
    for other in (same, dataclasses.replace(params), copy.deepcopy(params), pickle.loads(pickle.dumps(params))):
        assert params == other
        assert hash(params) == hash(other)
    assert dataclasses.replace(params, logit_bias=None).logit_bias is None
    assert SamplingParams(logit_bias={}) == SamplingParams()


# Biases and penalties.


def adjusted(row, params, text=((), ())):
    """Return one row's float64 logits with its bias and penalties, token by token as vLLM's documentation says."""
    out = reference.f64(row).copy()
    inside = range(len(out))
    prompt, generated = ([token for token in part if token in inside] for part in text)
    for token, bias in params.logit_bias or ():
        if token in inside:
            out[token] += bias
    for token in {*prompt, *generated}:
        out[token] = (
            out[token] / params.repetition_penalty if out[token] > 0 else out[token] * params.repetition_penalty
        )
    for token in generated:
        out[token] -= params.frequency_penalty
    for token in set(generated):
        out[token] -= params.presence_penalty
    return out


def random_texts(rng, count, vocab=VOCAB, span=SPAN):
    """Texts of every length up to ``span``, from few enough tokens that many occur more than once."""
    texts = []
    for _ in range(count):
        prompt_len, length = np.sort(rng.integers(0, span + 1, 2))
        tokens = rng.integers(0, vocab // 2, length).tolist()
        texts.append((tokens[:prompt_len], tokens[prompt_len:]))
    return texts


BIAS = {1: 3.0, 2: -3.0, 5: 100.0, 7: -100.0, 11: 0.5, 23: 1.25}
SMALL_BIAS = {0: 1.0, 3: -0.75, 8: 2.0, 22: 0.5}
FEATURES = [
    SamplingParams(presence_penalty=1.5),
    SamplingParams(presence_penalty=-2.0),
    SamplingParams(frequency_penalty=0.7),
    SamplingParams(frequency_penalty=-0.4),
    SamplingParams(repetition_penalty=1.8),
    SamplingParams(repetition_penalty=0.6),
    SamplingParams(repetition_penalty=10.0),
    SamplingParams(logit_bias=BIAS),
    SamplingParams(logit_bias=SMALL_BIAS),
    SamplingParams(presence_penalty=0.3, frequency_penalty=0.4, repetition_penalty=1.3),
    SamplingParams(logit_bias=SMALL_BIAS, presence_penalty=-0.5, frequency_penalty=0.2, repetition_penalty=1.4),
    SamplingParams(temperature=0.6, logit_bias=SMALL_BIAS, repetition_penalty=1.2),
    SamplingParams(top_k=6, logit_bias=SMALL_BIAS, frequency_penalty=0.9),
    SamplingParams(top_p=0.7, presence_penalty=1.0, repetition_penalty=1.5),
    SamplingParams(min_p=0.1, logit_bias=SMALL_BIAS, presence_penalty=0.4),
    SamplingParams(
        temperature=1.4,
        top_k=12,
        top_p=0.9,
        min_p=0.02,
        logit_bias=SMALL_BIAS,
        presence_penalty=0.3,
        frequency_penalty=-0.2,
        repetition_penalty=1.1,
    ),
]


@pytest.mark.parametrize("params", FEATURES, ids=range(len(FEATURES)))
def test_log_probabilities_under_biases_and_penalties(params, rng):
    """Sampling: of the adjusted logits. Raw: of the logits as they came. Float32 sums of 24 terms: 2e-5."""
    count = 120
    rows = (2 * rng.standard_normal((count, VOCAB))).astype(np.float32)
    texts = random_texts(rng, count)
    drawn = draw(rows, [params] * count, range(count), range(count), texts)
    for i, row in enumerate(rows):
        token, under = drawn.token_B[i], adjusted(row, params, texts[i])
        assert drawn.logprob_B[i] == pytest.approx(reference.log_softmax(reference.f64(row))[token], abs=1e-5)
        assert drawn.sampling_logprob_B[i] == pytest.approx(
            reference.sampling_log_prob(under, params, token), abs=2e-5
        )  # fmt: skip


@pytest.mark.parametrize("params", FEATURES, ids=range(len(FEATURES)))
def test_greedy_rows_take_the_best_of_the_adjusted_logits(params, rng):
    count = 120
    greedy = dataclasses.replace(params, temperature=0.0)
    rows = (2 * rng.standard_normal((count, VOCAB))).astype(np.float32)
    texts = random_texts(rng, count)
    drawn = draw(rows, [greedy] * count, range(count), range(count), texts)
    best = [adjusted(row, greedy, text).argmax() for row, text in zip(rows, texts, strict=True)]
    np.testing.assert_array_equal(drawn.token_B, best)
    np.testing.assert_array_equal(drawn.sampling_logprob_B, 0)
    raw = [reference.log_softmax(row)[token] for row, token in zip(reference.f64(rows), best, strict=True)]
    np.testing.assert_allclose(drawn.logprob_B, raw, atol=1e-5)
    assert (best != rows.argmax(axis=1)).any()


@pytest.mark.parametrize("params", FEATURES, ids=range(len(FEATURES)))
def test_every_adjusted_logit(params, rng):
    """All of them, not only the drawn ones: three float32 roundings of numbers up to about 100."""
    count = 40
    rows = (3 * rng.standard_normal((count, VOCAB))).astype(np.float32)
    texts = random_texts(rng, count)
    s = sampling_arrays([params] * count, range(count), count)
    logits = add_bias(jnp.asarray(rows), s.bias_token_BM, s.bias_BM)
    logits = penalise(logits, history_of(texts, count), s.repetition_B, s.frequency_B, s.presence_B)
    expected = [adjusted(row, params, text) for row, text in zip(rows, texts, strict=True)]
    np.testing.assert_allclose(logits, expected, rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("params", FEATURES, ids=range(len(FEATURES)))
def test_draws_under_biases_and_penalties_follow_the_reference(params, rng):
    """Chi-square over 2048 draws, as above; tokens that fewer than 5 draws are expected of are counted as one."""
    row = (1.5 * rng.standard_normal(VOCAB)).astype(np.float32)
    text = ([3, 8, 8, 12, 20], [3, 4, 4, 4, 15, 22])
    tokens = []
    for i in range(4):
        drawn = draw(np.tile(row, (ROWS, 1)), [params] * ROWS, [23] * ROWS, np.arange(ROWS) + ROWS * i, [text] * ROWS)
        tokens.extend(drawn.token_B)
    under = adjusted(row, params, text)
    expected = len(tokens) * np.exp([reference.sampling_log_prob(under, params, token) for token in range(VOCAB)])
    counts = np.bincount(tokens, minlength=VOCAB)
    assert not counts[expected == 0].any()
    often = expected >= 5
    counts = np.append(counts[often], counts[~often].sum())
    expected = np.append(expected[often], expected[~often].sum())
    if expected[-1] < 5:
        counts, expected = counts[:-1], expected[:-1]
    freedom = len(counts) - 1
    assert ((counts - expected) ** 2 / expected).sum() <= freedom + 4.3 * np.sqrt(2 * freedom) + 14 * (freedom > 0)


def test_presence_and_frequency_count_what_was_generated_and_repetition_the_prompt_too():
    """Token 1 is in the prompt, 2 was generated once, 3 three times, 4 is in both; 5 and 6 are in neither."""
    text = ([1, 1, 4], [2, 3, 3, 3, 4])
    row = np.full(VOCAB, -1.0, np.float32)
    row[:12] = 2.0

    def change(**fields):
        s = sampling_arrays([SamplingParams(**fields)], [0], 1)
        logits = penalise(row[None], history_of([text], 1), s.repetition_B, s.frequency_B, s.presence_B)
        return np.asarray(logits)[0, :7].tolist()

    assert change(presence_penalty=0.5) == [2, 2, 1.5, 1.5, 1.5, 2, 2]
    assert change(frequency_penalty=0.5) == [2, 2, 1.5, 0.5, 1.5, 2, 2]
    assert change(repetition_penalty=2.0) == [2, 1, 1, 1, 1, 2, 2]
    assert change(repetition_penalty=2.0, frequency_penalty=0.5, presence_penalty=0.25) == [
        2, 1, 0.25, -0.75, 0.25, 2, 2
    ]  # fmt: skip
    row[:12] = -2.0
    assert change(repetition_penalty=2.0) == [-2, -4, -4, -4, -4, -2, -2]


def test_the_bias_comes_before_the_repetition_penalty():
    """As in vLLM: a bias may turn the sign that says whether to divide or to multiply."""
    row = np.full(VOCAB, -30.0, np.float32)
    row[[3, 4]] = [-1.0, 1.5]
    params = SamplingParams(logit_bias={3: 5.0}, repetition_penalty=2.0)
    drawn = draw(row[None], [params], [0], [0], [([3], [])])
    logits = np.array([2.0, 1.5])
    under = dict(zip([3, 4], reference.log_softmax(logits), strict=True))
    assert drawn.sampling_logprob_B[0] == pytest.approx(under[drawn.token_B[0]], abs=1e-5)


def test_penalties_need_a_history_and_biases_do_not(rng):
    count = 60
    rows = (2 * rng.standard_normal((count, VOCAB))).astype(np.float32)
    bias = SamplingParams(logit_bias=SMALL_BIAS, seed=1)
    both = dataclasses.replace(bias, presence_penalty=1.0, frequency_penalty=1.0, repetition_penalty=3.0)
    expected = draw(rows, [bias] * count, range(count), range(count))
    for ours, other in zip(draw(rows, [both] * count, range(count), range(count)), expected, strict=True):
        np.testing.assert_array_equal(ours, other)
    assert (expected.token_B != draw(rows, [SamplingParams()] * count, range(count), range(count)).token_B).any()
    texts = random_texts(rng, count)
    assert (expected.token_B != draw(rows, [both] * count, range(count), range(count), texts).token_B).any()


def test_ids_outside_the_vocabulary_do_nothing(rng):
    """Neither in a text nor in a bias, not even those that an index would count from the end or clamp to it."""
    count = 60
    rows = rng.standard_normal((count, VOCAB)).astype(np.float32)
    texts = [([3, 5], [3, 9])] * count
    strays = [([-1, 3, VOCAB, 5, -VOCAB], [2**31 - 1, -2, 3, 9, VOCAB + 3, -(2**31)])] * count
    params = SamplingParams(presence_penalty=1.0, frequency_penalty=0.5, repetition_penalty=2.0, logit_bias={5: 2.0})
    stray_bias = dict.fromkeys([VOCAB, VOCAB + 1, 2 * VOCAB - 1, 2**31 - 1], 100.0)
    stray = dataclasses.replace(params, logit_bias={5: 2.0} | stray_bias)
    expected = draw(rows, [params] * count, range(count), range(count), texts)
    drawn = draw(rows, [stray] * count, range(count), range(count), strays)
    assert 0 <= drawn.token_B.min() <= drawn.token_B.max() < VOCAB
    for ours, other in zip(drawn, expected, strict=True):
        np.testing.assert_array_equal(ours, other)
    tokens = np.tile(np.int32([-1, -VOCAB, VOCAB, -(2**31)]), (count, 1))
    np.testing.assert_array_equal(add_bias(jnp.asarray(rows), tokens, np.full_like(tokens, 5, np.float32)), rows)


@pytest.mark.parametrize("token", [0, VOCAB - 1])
def test_one_bias_on_the_first_or_the_last_token(token, rng):
    rows = rng.standard_normal((9, VOCAB)).astype(np.float32)
    params = [SamplingParams()] * 9
    params[4] = SamplingParams(logit_bias={token: 100.0})
    drawn = draw(rows, params, range(9), range(9))
    assert drawn.token_B[4] == token
    plain = draw(rows, [SamplingParams()] * 9, range(9), range(9))
    np.testing.assert_array_equal(np.delete(drawn.token_B, 4), np.delete(plain.token_B, 4))


def test_no_bias_and_no_penalty_brings_back_a_forbidden_token(rng):
    rows = rng.standard_normal((100, VOCAB)).astype(np.float32)
    rows[:, VOCAB // 2 :] = -np.inf
    bias = dict.fromkeys(range(VOCAB // 2, VOCAB), 100.0)
    params = SamplingParams(logit_bias=bias, repetition_penalty=0.01, presence_penalty=-2.0, frequency_penalty=-2.0)
    texts = [(list(range(10, 15)), list(range(12, 20)))] * 100
    for temperature in (0.0, 1.0, 1e-30):
        for top_p in (1.0, 0.9):
            some = dataclasses.replace(params, temperature=temperature, top_p=top_p)
            drawn = draw(rows, [some] * 100, range(100), range(100), texts)
            assert 0 <= drawn.token_B.min() <= drawn.token_B.max() < VOCAB // 2
            assert np.isfinite(drawn.logprob_B).all()
            assert np.isfinite(drawn.sampling_logprob_B).all()


@pytest.mark.parametrize("repetition", [1e-6, 1e-20, 1e-44, 1e-300])
@pytest.mark.parametrize("temperature", [1.0, 1e-30])
def test_a_tiny_repetition_penalty_is_finite(repetition, temperature, rng):
    """It multiplies positive logits so far that the largest one of the text takes all."""
    rows = (5 * rng.standard_normal((30, VOCAB))).astype(np.float32)
    rows[:, 3] = 1.0
    rows[:, 4] = 0.5
    params = SamplingParams(repetition_penalty=repetition, temperature=temperature)
    drawn = draw(rows, [params] * 30, range(30), range(30), [([4], [3])] * 30)
    np.testing.assert_array_equal(drawn.token_B, 3)
    np.testing.assert_allclose(drawn.sampling_logprob_B, 0, atol=1e-6)


def test_users_of_a_feature_do_not_change_their_neighbours(rng):
    """Rows that ask for nothing get the same bits whether or not others are biased, penalised, filtered or greedy."""
    count = 64
    rows = (2 * rng.standard_normal((count, VOCAB))).astype(np.float32)
    texts = random_texts(rng, count)
    plain = [SamplingParams(temperature=0.9)] * count
    others = [
        *FEATURES,
        *FILTERS[1:],
        SamplingParams(temperature=0.0),
        SamplingParams(temperature=0.0, logit_bias=BIAS),
    ]
    mixed = [others[i // 2 % len(others)] if i % 2 else params for i, params in enumerate(plain)]
    everyone = draw(rows, plain, range(count), range(count), texts)
    some = draw(rows, mixed, range(count), range(count), texts)
    without = draw(rows, plain, range(count), range(count))
    for ours, other, third in zip(everyone, some, without, strict=True):
        np.testing.assert_array_equal(ours[::2], other[::2])
        np.testing.assert_array_equal(ours, third)
    for i in range(1, count, 2):
        params, under = mixed[i], adjusted(rows[i], mixed[i], texts[i])
        if params.temperature:
            under = reference.sampling_log_prob(under, params, some.token_B[i])
            assert some.sampling_logprob_B[i] == pytest.approx(under, abs=2e-5)
        else:
            assert some.token_B[i] == under.argmax()


def test_a_row_alone_is_the_row_in_company_bit_for_bit(rng):
    """At a vocabulary that no vector length divides, for each feature in turn, at another row of the batch."""
    vocab, count, span = 1237, 24, 40
    rows = (3 * rng.standard_normal((count, vocab))).astype(np.float32)
    texts = random_texts(rng, count, 200, span)
    kinds = [*FEATURES, *FILTERS, SamplingParams(temperature=0.0), SamplingParams(temperature=0.0, logit_bias=BIAS)]
    params = [kinds[i] for i in rng.permutation(len(kinds))[:count]]
    seeds, positions = rng.integers(0, 2**32, count), rng.integers(0, 900, count).astype(np.int32)
    together = program()(rows, positions, sampling_arrays(params, seeds, count), history_of(texts, count, span))
    for i in range(count):
        at = (i + 5) % count
        logits, position, text = np.zeros_like(rows), np.zeros_like(positions), [((), ())] * count
        logits[at], position[at], text[at] = rows[i], positions[i], texts[i]
        s = sampling_arrays([SamplingParams(temperature=0.0)] * at + [params[i]], [0] * at + [seeds[i]], count)
        alone = program()(logits, position, s, history_of(text, count, span))
        for ours, other in zip(alone, together, strict=True):
            assert ours[at] == other[i], params[i]


def test_features_switch_on_and_off_without_a_new_program(rng):
    jitted = jax.jit(lambda *args: sample(*args))  # its own cache, not that of the other tests
    rows = rng.standard_normal((8, VOCAB)).astype(np.float32)
    history = history_of(random_texts(rng, 8), 8)
    for params in [*FEATURES, *FILTERS, SamplingParams(temperature=0.0)]:
        for users in (0, 1, 8):
            s = sampling_arrays([params] * users + [SamplingParams()] * (8 - users), range(8), 8)
            jitted(rows, np.arange(8, dtype=np.int32), s, history)
    assert jitted._cache_size() == 1


# Logits that are no distribution.


def spoiled(row, how):
    row = row.copy()
    if how == "nan beside the best":
        row[(row.argmax() + 3) % VOCAB] = np.nan
    elif how == "nan for the best":
        row[row.argmax()] = np.nan
    elif how == "+inf":
        row[7] = np.inf
    elif how == "two +inf":
        row[[7, 9]] = np.inf
    elif how == "+inf and -inf":
        row[[7, 9]] = np.inf, -np.inf
    elif how == "all -inf":
        row[:] = -np.inf
    elif how == "all nan":
        row[:] = np.nan
    return row


SPOILED = ["nan beside the best", "nan for the best", "+inf", "two +inf", "+inf and -inf", "all -inf", "all nan"]
KINDS = [
    SamplingParams(temperature=0.0),
    SamplingParams(),
    SamplingParams(top_k=3, top_p=0.9),
    SamplingParams(min_p=0.3),
    SamplingParams(temperature=0.0, logit_bias=BIAS, repetition_penalty=1.5),
    SamplingParams(logit_bias={7: -100.0}, presence_penalty=1.0),
]


@pytest.mark.parametrize("params", KINDS, ids=range(len(KINDS)))
@pytest.mark.parametrize("how", SPOILED)
def test_a_row_that_is_no_distribution_is_marked_and_no_other_row_notices(how, params, rng):
    rows = (2 * rng.standard_normal((20, VOCAB))).astype(np.float32)
    rows[:, 7] = -1.0
    many, texts = [params] * 20, random_texts(rng, 20)
    before = draw(rows, many, range(20), range(20), texts)
    bad = np.arange(20) % 3 == 1
    rows[bad] = [spoiled(row, how) for row in rows[bad]]
    after = draw(rows, many, range(20), range(20), texts)
    np.testing.assert_array_equal(after.token_B[bad], INVALID)
    assert INVALID == -2
    for ours, other in zip(after, before, strict=True):
        np.testing.assert_array_equal(ours[~bad], other[~bad])
    assert np.isnan(after.logprob_B[bad]).all()
    assert np.isnan(after.sampling_logprob_B[bad]).all()
    assert np.isfinite(after.logprob_B[~bad]).all()


@pytest.mark.parametrize("params", KINDS, ids=range(len(KINDS)))
def test_some_forbidden_tokens_are_fine(params, rng):
    """As long as one is left, even if it is the only one."""
    rows = (2 * rng.standard_normal((40, VOCAB))).astype(np.float32)
    for i, row in enumerate(rows):
        row[rng.permutation(VOCAB)[: 1 + i % (VOCAB - 1)]] = -np.inf
    texts = random_texts(rng, 40)
    drawn = draw(rows, [params] * 40, range(40), range(40), texts)
    for i, row in enumerate(rows):
        token = drawn.token_B[i]
        left = np.isfinite(row)
        assert left[token]
        shrunk = np.where(left, reference.f64(row), -1e9)
        assert drawn.logprob_B[i] == pytest.approx(reference.log_softmax(shrunk)[token], abs=1e-5)
        under = np.where(left, adjusted(shrunk, params, texts[i]), -1e9)
        if params.temperature:
            under = reference.sampling_log_prob(under, params, token)
            assert drawn.sampling_logprob_B[i] == pytest.approx(under, abs=2e-5)
        else:
            assert token == under.argmax()


# The arrays of a batch.


def test_a_batch_of_parameters_as_arrays():
    """Each field in its type; unused biases are -1 and 0; the rows behind are greedy and ask for nothing."""
    s = sampling_arrays(
        [SamplingParams(temperature=0.5, top_k=4, top_p=0.75, min_p=0.25), FEATURES[10]], [2**32 - 1, 3], 4
    )
    for name, array in s._asdict().items():
        assert isinstance(array, np.ndarray)
        kind = {"top_k_B": np.int32, "seed_B": np.uint32, "bias_token_BM": np.int32}.get(name, np.float32)
        assert array.dtype == kind
        assert array.shape == ((4, MAX_BIAS) if name.endswith("M") else (4,))
    np.testing.assert_array_equal(s.temperature_B, [0.5, 1, 0, 0])
    np.testing.assert_array_equal(s.top_k_B, [4, -1, -1, -1])
    np.testing.assert_array_equal(s.top_p_B, [0.75, 1, 1, 1])
    np.testing.assert_array_equal(s.min_p_B, [0.25, 0, 0, 0])
    np.testing.assert_array_equal(s.seed_B, [2**32 - 1, 3, 0, 0])
    np.testing.assert_array_equal(s.presence_B, np.float32([0, -0.5, 0, 0]))
    np.testing.assert_array_equal(s.frequency_B, np.float32([0, 0.2, 0, 0]))
    np.testing.assert_array_equal(s.repetition_B, np.float32([1, 1.4, 1, 1]))
    np.testing.assert_array_equal(s.bias_token_BM[1, :4], list(SMALL_BIAS))
    np.testing.assert_array_equal(s.bias_BM[1, :4], list(SMALL_BIAS.values()))
    assert (s.bias_token_BM >= 0).sum() == np.count_nonzero(s.bias_BM) == 4


# The most likely tokens.


def test_the_most_likely_tokens(rng):
    rows = (2 * rng.standard_normal((30, VOCAB))).astype(np.float32)
    token, logprob = jax.jit(top_logprobs, static_argnums=1)(rows, 6)
    assert (token.dtype, logprob.dtype, token.shape, logprob.shape) == (np.int32, np.float32, (30, 6), (30, 6))
    order = np.argsort(-rows, axis=1, kind="stable")[:, :6]
    np.testing.assert_array_equal(token, order)
    expected = np.take_along_axis(reference.log_softmax(reference.f64(rows)), order, axis=1)
    np.testing.assert_allclose(logprob, expected, atol=1e-5)
    greedy = draw(rows, [SamplingParams(temperature=0.0)] * 30, range(30), range(30))
    np.testing.assert_array_equal(token[:, 0], greedy.token_B)
    np.testing.assert_allclose(logprob[:, 0], greedy.logprob_B, atol=1e-6)


def test_equally_likely_tokens_are_listed_by_id(rng):
    rows = rng.integers(0, 3, (30, VOCAB)).astype(np.float32)
    rows[:, ::5] = -np.inf
    token, logprob = top_logprobs(rows, MAX_LOGPROBS)
    np.testing.assert_array_equal(token, np.argsort(-rows, axis=1, kind="stable")[:, :MAX_LOGPROBS])
    np.testing.assert_array_equal(np.isneginf(logprob), np.isneginf(np.take_along_axis(rows, np.asarray(token), 1)))


@pytest.mark.parametrize("how", SPOILED)
def test_a_row_that_is_no_distribution_has_no_most_likely_tokens(how, rng):
    rows = rng.standard_normal((2, VOCAB)).astype(np.float32)
    token, logprob = top_logprobs(np.stack([spoiled(rows[0], how), rows[1]]), 4)
    np.testing.assert_array_equal(token[0], INVALID)
    assert np.isnan(logprob[0]).all()
    alone_token, alone_logprob = top_logprobs(rows[[1, 1]], 4)
    np.testing.assert_array_equal(token[1], alone_token[1])
    np.testing.assert_array_equal(logprob[1], alone_logprob[1])


@pytest.mark.parametrize("count", [0, -1, MAX_LOGPROBS + 1, 2.0, None])
def test_a_count_of_most_likely_tokens_that_cannot_work_is_refused(count):
    with pytest.raises(RequestError, match=f"count is {count}; allowed: an integer from 1 to {MAX_LOGPROBS}"):
        top_logprobs(np.zeros((2, VOCAB), np.float32), count)
    with pytest.raises(RequestError, match="allowed: an integer from 1 to 5"):
        top_logprobs(np.zeros((2, 5), np.float32), 6)
