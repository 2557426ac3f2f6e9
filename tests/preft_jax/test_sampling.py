"""Sampling against NumPy: which tokens the filters keep, how often each is drawn, and both log-probabilities."""

import functools

import jax
import numpy as np
import pytest
import reference

from preft_jax import RequestError, SamplingParams
from preft_jax.sampling import sample, sampling_arrays

VOCAB, ROWS = 24, 512


@functools.cache
def program():
    return jax.jit(sample)


def draw(logits, params, seeds, positions):
    """Draw one token a row; always ``ROWS`` rows, so that one program serves every test."""
    rows = len(logits)
    padded = np.zeros((ROWS, VOCAB), np.float32)
    padded[:rows] = logits
    at = np.zeros(ROWS, np.int32)
    at[:rows] = positions
    drawn = program()(padded, at, sampling_arrays(list(params), list(seeds), ROWS))
    return jax.tree.map(lambda array: np.asarray(array)[:rows], drawn)


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


def test_numpy_numbers_are_numbers():
    """A sweep over ``np.linspace`` in float32 must not need a cast at each call."""
    SamplingParams(temperature=np.float32(0.5), top_k=np.int64(4), top_p=np.float32(0.9), seed=np.uint32(7))
