"""Sampling against NumPy: which tokens the filters keep, how often each is drawn, and both log-probabilities."""

import numpy as np
import pytest
import reference
from sampling_draws import FILTERS, ROWS, VOCAB, draw, draws_of

from preft_jax import SamplingParams


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
