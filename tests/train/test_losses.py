"""Losses by name: their formulae, their slopes, and what a loss of one's own is given."""

import functools

import jax
import numpy as np
import pytest

from preft_jax.errors import ConfigError
from train import losses
from train.losses import LossInputs, find_loss, register_loss


@pytest.fixture
def known(monkeypatch):
    """Forget afterwards what a test registers."""
    monkeypatch.setattr(losses, "_LOSSES", dict(losses._LOSSES))


@pytest.fixture
def tokens(rng):
    """Return log-probabilities and inputs of tokens whose ratios lie on both sides of what PPO clips."""
    new, old = np.log(rng.uniform(0.1, 0.9, (2, 60))).astype(np.float32)
    return new, LossInputs(np.ones(60, np.float32), old, rng.standard_normal(60).astype(np.float32))


def slopes(function, logprob_T, inputs):
    return np.asarray(jax.grad(lambda logprob_T: function(logprob_T, inputs)[0].sum())(logprob_T))


def test_cross_entropy_is_the_negative_logprob(tokens):
    logprob_T, inputs = tokens
    loss_T, metrics = find_loss("cross_entropy").function(logprob_T, LossInputs(inputs.weights_T))
    np.testing.assert_array_equal(loss_T, -logprob_T)
    assert metrics == {}


def test_importance_sampling_is_the_policy_gradient_of_tokens_that_another_policy_drew(tokens):
    logprob_T, inputs = tokens
    ratio_T = np.exp(logprob_T.astype(np.float64) - inputs.old_logprobs_T)
    loss_T, metrics = losses.importance_sampling(logprob_T, inputs)
    np.testing.assert_allclose(loss_T, -ratio_T * inputs.advantages_T, rtol=1e-5)
    np.testing.assert_allclose(
        slopes(losses.importance_sampling, logprob_T, inputs), -ratio_T * inputs.advantages_T, rtol=1e-5
    )
    np.testing.assert_allclose(metrics["ratio"], ratio_T, rtol=1e-5)
    np.testing.assert_allclose(metrics["approx_kl"], ratio_T - 1 - np.log(ratio_T), atol=1e-5)
    on_policy = inputs._replace(old_logprobs_T=logprob_T)
    np.testing.assert_array_equal(slopes(losses.importance_sampling, logprob_T, on_policy), -inputs.advantages_T)


@pytest.mark.parametrize("clip", [{}, {"clip_low": 0.1, "clip_high": 0.3}])
def test_ppo_gains_nothing_beyond_its_clip(clip, tokens):
    logprob_T, inputs = tokens
    low, high = 1 - clip.get("clip_low", 0.2), 1 + clip.get("clip_high", 0.2)
    ratio_T = np.exp(logprob_T.astype(np.float64) - inputs.old_logprobs_T)
    better = inputs.advantages_T > 0
    is_clipped = np.where(better, ratio_T > high, ratio_T < low)
    assert 0 < is_clipped[better].sum() < better.sum()
    assert 0 < is_clipped[~better].sum() < (~better).sum()
    function = functools.partial(losses.ppo, **clip)
    loss_T, metrics = function(logprob_T, inputs)
    gain_T = np.where(is_clipped, np.where(better, high, low), ratio_T) * inputs.advantages_T
    np.testing.assert_allclose(loss_T, -gain_T, rtol=1e-5)
    np.testing.assert_array_equal(metrics["clip_fraction"], is_clipped)
    np.testing.assert_allclose(slopes(function, logprob_T, inputs), np.where(is_clipped, 0.0, -gain_T), rtol=1e-5)


def test_names_that_are_wrong_are_refused(known):
    with pytest.raises(ConfigError, match=r"loss is 'pop' \(did you mean 'ppo'\?\); allowed: cross_entropy"):
        find_loss("pop")
    with pytest.raises(ConfigError, match="there is a loss 'ppo' already"):
        register_loss("ppo", losses.ppo)
    with pytest.raises(ConfigError, match=r"'mine' needs 'advantage' \(did you mean 'advantages'\?\)"):
        register_loss("mine", losses.ppo, needs=("advantage",))
    register_loss("ppo", losses.importance_sampling, replace=True)
    assert find_loss("ppo").function is losses.importance_sampling
