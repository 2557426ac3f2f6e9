"""Logits that are no distribution or nearly none, and lists of the most likely tokens."""

import jax
import numpy as np
import pytest
import reference
from sampling_draws import BIAS, VOCAB, adjusted, draw, random_texts

from preft_jax import RequestError, SamplingParams
from preft_jax.sampling.device import INVALID, top_logprobs
from preft_jax.sampling.parameters import MAX_LOGPROBS


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
