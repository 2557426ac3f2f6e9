"""Biases and penalties against NumPy, alone and beside filters; rows of one batch do nothing to each other."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from sampling_draws import (
    BIAS,
    FEATURES,
    FILTERS,
    ROWS,
    SMALL_BIAS,
    VOCAB,
    adjusted,
    draw,
    history_of,
    program,
    random_texts,
)

from preft_jax import SamplingParams
from preft_jax.sampling.arrays import sampling_arrays
from preft_jax.sampling.device import sample
from preft_jax.sampling.logits import add_bias, penalise


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
