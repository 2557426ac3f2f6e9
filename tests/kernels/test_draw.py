"""Drawing tokens without branches: the tokens and log-probabilities of ``sampling.sample``, by every implementation."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels import api
from preft_jax.sampling.arrays import sampling_arrays
from preft_jax.sampling.device import INVALID, sample, sample_plain
from preft_jax.sampling.parameters import SamplingParams, is_plain

ROWS, VOCAB = 9, 5003


def arrays(rng, temperatures):
    params = [SamplingParams(temperature=t) for t in temperatures]
    return sampling_arrays(params, rng.integers(0, 2**32, len(params), np.uint32).tolist(), len(params))


def draw(implementation, logits, index, s, position, alive=None):
    alive = np.ones(len(index), bool) if alive is None else alive
    args = map(jnp.asarray, (logits, index, s.temperature_B, s.seed_B, position, alive))
    return draw_program(implementation, *args)


@functools.partial(jax.jit, static_argnums=0)
def draw_program(implementation, *args):
    return api.draw(*args, implementation=implementation)


sample_program = jax.jit(sample)


def test_it_draws_what_sample_draws(implementation, rng):
    """Rows share logits, are greedy or not, and have any temperature."""
    logits = (rng.standard_normal((ROWS, VOCAB)) * 4).astype(np.float32)
    index = rng.integers(0, ROWS, 24).astype(np.int32)
    s = arrays(rng, rng.choice([0.0, 1e-30, 0.3, 1.0, 1.0, 5.0], 24))
    position = rng.integers(1, 100_000, 24).astype(np.int32)
    found = draw(implementation, logits, index, s, position)
    wanted = sample_program(jnp.asarray(logits)[index], jnp.asarray(position), s)
    np.testing.assert_array_equal(found.token_B, wanted.token_B)
    np.testing.assert_allclose(found.logprob_B, wanted.logprob_B, atol=2e-5)
    np.testing.assert_allclose(found.sampling_logprob_B, wanted.sampling_logprob_B, atol=2e-5)
    assert len(set(np.asarray(found.token_B).tolist())) > 3


def test_tokens_come_as_often_as_they_should(implementation, rng):
    logits = np.log(np.array([[0.5, 0.25, 0.125, 0.125]], np.float32))
    logits = np.pad(logits, ((0, 0), (0, 60)), constant_values=-np.inf)
    count = 4000
    s = arrays(rng, np.full(count, 0.5))
    found = draw(implementation, logits, np.zeros(count, np.int32), s, np.full(count, 7, np.int32))
    share = np.bincount(found.token_B, minlength=64)[:4] / count
    wanted = np.array([16, 4, 1, 1]) / 22
    np.testing.assert_allclose(share, wanted, atol=5 * 0.5 / count**0.5)
    np.testing.assert_allclose(found.sampling_logprob_B, np.log(wanted)[np.asarray(found.token_B)], atol=1e-5)


def test_of_equals_the_first_is_taken(implementation, rng):
    logits = np.zeros((2, VOCAB), np.float32)
    logits[0, [4100, 17, 3000]] = 3
    s = arrays(rng, [0.0, 0.0])
    found = draw(implementation, logits, np.arange(2, dtype=np.int32), s, np.ones(2, np.int32))
    np.testing.assert_array_equal(found.token_B, [17, 0])


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_rows_that_are_no_distribution_draw_nothing_and_leave_others_alone(
    temperature, implementation, rng, monkeypatch
):
    logits = rng.standard_normal((5, VOCAB)).astype(np.float32)
    logits[0, 4500], logits[1, 9], logits[2] = np.nan, np.inf, -np.inf
    logits[3, :4096] = -np.inf  # Forbidden tokens are no reason.
    s = arrays(rng, [temperature] * 5)
    index, position = np.arange(5, dtype=np.int32), jnp.arange(5, dtype=jnp.int32)
    real = api.draw
    monkeypatch.setattr(api, "draw", lambda *args: real(*args, implementation=implementation))
    plain_program = jax.jit(lambda *args: sample_plain(*args))
    found = plain_program(jnp.asarray(logits), index, position, np.ones(5, bool), s.plain)
    wanted = sample_program(jnp.asarray(logits), position, s)
    np.testing.assert_array_equal(found.token_B, wanted.token_B)
    assert np.asarray(found.token_B)[:3].tolist() == [INVALID] * 3
    assert min(np.asarray(found.token_B)[3:]) >= 0
    for one, other in zip(found[1:], wanted[1:], strict=True):
        np.testing.assert_allclose(one, other, atol=2e-5)


def test_rows_that_do_not_count_do_not_matter(implementation, rng):
    logits = rng.standard_normal((3, VOCAB)).astype(np.float32)
    s = arrays(rng, [1.0, 1.0, 0.0])
    index, position = np.arange(3, dtype=np.int32), np.full(3, 5, np.int32)
    whole = draw(implementation, logits, index, s, position)
    logits[1] = np.nan
    part = draw(implementation, logits, index, s, position, np.array([True, False, True]))
    for one, other in zip(whole, part, strict=True):
        np.testing.assert_array_equal(np.asarray(one)[[0, 2]], np.asarray(other)[[0, 2]])


@pytest.mark.parametrize(
    ("params", "plain"),
    [
        ({}, True),
        ({"temperature": 0.0, "top_k": 3}, True),
        ({"temperature": 0.7, "seed": 3, "stop_token_ids": (1,), "ignore_eos": True}, True),
        ({"top_k": 3}, False),
        ({"top_p": 0.9}, False),
        ({"min_p": 0.1}, False),
        ({"presence_penalty": 0.5}, False),
        ({"frequency_penalty": -0.5}, False),
        ({"repetition_penalty": 1.1}, False),
        ({"temperature": 0.0, "logit_bias": {3: 1.0}}, False),
    ],
)
def test_what_is_plain(params, plain):
    assert is_plain(SamplingParams(**params)) == plain


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("logits_RV", np.zeros((2, 8), np.float16)),
        ("index_B", np.zeros(3, np.float32)),
        ("temperature_B", np.zeros(2, np.float32)),
        ("seed_B", np.zeros(3, np.float32)),
        ("position_B", np.zeros((3, 1), np.int32)),
        ("alive_B", np.zeros(3, np.int32)),
    ],
)
def test_wrong_arguments_are_named(name, wrong):
    args = {
        "logits_RV": np.zeros((2, 8), np.float32), "index_B": np.zeros(3, np.int32),
        "temperature_B": np.zeros(3, np.float32), "seed_B": np.zeros(3, np.uint32),
        "position_B": np.zeros(3, np.int32), "alive_B": np.ones(3, bool),
    }  # fmt: skip
    with pytest.raises(ValueError, match=name):
        api.draw(*(args | {name: wrong}).values())
