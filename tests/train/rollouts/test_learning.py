"""From rewards to what is learned, by hand and in NumPy."""

import dataclasses
import functools

import numpy as np
import pytest
import rollout_cases as cases

from preft_jax import AdapterConfig, ConfigError
from train.losses import LossInputs, find_loss
from train.rollouts.learning import advantages, corrected, group_advantages, learned, loss_of, punishment
from train.rollouts.measures import sample_measures, step_measures
from train.rollouts.options import RolloutOptions
from train.rollouts.statistics import interval

NAN = float("nan")


def test_a_group_is_compared_with_its_mean_or_each_with_the_others(rng):
    rewards = rng.standard_normal(7)
    np.testing.assert_allclose(group_advantages(rewards, "grpo"), rewards - rewards.mean(), atol=1e-12)
    for i, found in enumerate(group_advantages(rewards, "rloo")):
        assert found == pytest.approx(rewards[i] - np.delete(rewards, i).mean())


def test_rewards_that_are_not_there_count_for_nobody(rng):
    rewards = rng.standard_normal(4)
    for algorithm in ("grpo", "rloo"):
        with_gap = group_advantages([rewards[0], NAN, *rewards[1:]], algorithm)
        assert with_gap[1] == 0
        np.testing.assert_allclose(np.delete(with_gap, 1), group_advantages(rewards, algorithm))
        assert group_advantages([NAN, 3.0], algorithm).tolist() == [0, 0], "one alone is compared with nobody"


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_advantages_are_scaled_by_a_deviation(scale, rng):
    rewards = [rng.standard_normal(4), 10 * rng.standard_normal(5)]
    found = advantages(rewards, RolloutOptions(scale_rewards=scale))
    for own, one in zip(rewards, found, strict=True):
        deviation = {"group": own.std(ddof=1), "batch": np.concatenate(rewards).std(ddof=1), "none": 1 - 1e-4}[scale]
        np.testing.assert_allclose(one, (own - own.mean()) / (deviation + 1e-4))


@pytest.mark.parametrize("algorithm", ["grpo", "rloo", "importance_sampling"])
@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_equal_rewards_teach_exactly_nothing(algorithm, scale):
    """Also where their mean is not the reward itself, by rounding."""
    options = RolloutOptions(algorithm=algorithm, scale_rewards=scale)
    (found, _) = advantages([[0.1] * 7, [1.0, 2.0]], options)
    assert found.tolist() == [0] * 7


def test_long_samples_lose_more_and_more(rng):
    options = RolloutOptions(max_completion_length=20, soft_punish_cache=5)
    assert [punishment(n, options) for n in (1, 15, 16, 18, 20)] == pytest.approx([0, 0, 0.2, 0.6, 1])
    assert punishment(20, dataclasses.replace(options, soft_punish_cache=0)) == 0


@pytest.fixture
def job(tiny_text):
    return functools.partial(cases.job, tiny_text, AdapterConfig(rank=2))


def inputs_of(document):
    """Return the tokens that are learned, as a loss is given them."""
    here = document.weights > 0
    fields = (document.weights, document.old_logprobs, document.advantages, document.ref_logprobs)
    return here, LossInputs(*(None if field is None else field[here] for field in fields))


@pytest.mark.parametrize("loss_type", ["dapo", "grpo", "dr_grpo"])
def test_tokens_are_averaged_as_the_loss_type_says(loss_type, job, rng):
    """The weighted mean that the trainer takes, of a loss that is the negative advantage."""
    groups = cases.groups(rng, 3, 4)
    one = job(loss_type=loss_type, scale_rewards="none", num_generations=4)
    found = [given.document for given in learned(one, groups)]
    total = sum(float((document.weights * document.advantages).sum()) for document in found)
    mean = total / sum(float(document.weights.sum()) for document in found)
    samples = [sample for group in groups for sample in group.samples]
    by_hand = [a for group in groups for a in group_advantages([s.reward for s in group.samples], "grpo")]
    sums = [len(sample.token_ids) * a for sample, a in zip(samples, by_hand, strict=True)]
    expected = {
        "dapo": sum(sums) / sum(len(sample.token_ids) for sample in samples),
        "grpo": np.mean(by_hand),
        "dr_grpo": sum(sums) / (len(samples) * cases.COMPLETION),
    }[loss_type]
    assert mean == pytest.approx(expected, abs=1e-6)


def test_what_is_dropped_or_masked_is_not_learned_and_is_counted(job, rng):
    groups = cases.groups(rng, 2, 3)
    for group in groups:
        for sample in group.samples:
            sample.is_truncated = False
    groups[0].samples[1].error, groups[0].samples[1].reward = "it took longer than 1 s", NAN
    groups[1].samples[0].is_truncated = True
    for masks, count in ((False, 5), (True, 4)):
        one = job(num_generations=3, mask_truncated_completions=masks)
        given = learned(one, groups)
        assert len(given) == count
        lengths = [len(found.document) for found in given]
        assert lengths == sorted(lengths, reverse=True)
        measures = step_measures(groups, one.options, asked=3)
        assert (measures["samples"], measures["samples_dropped"], measures["prompts_left_out"]) == (count, 1, 1)
        assert measures["completions/clipped_ratio"] == pytest.approx(1 / 6)
    rest = [sample.reward for sample in (groups[0].samples[0], groups[0].samples[2])]
    assert sample_measures(groups)["reward"] == pytest.approx(
        np.mean([np.mean(rest), np.mean([sample.reward for sample in groups[1].samples])])
    )


@pytest.mark.parametrize("cap", [0.0, 1.5])
def test_tokens_that_another_policy_drew_are_weighed(cap, job, rng):
    """By the truncated ratio; a loss that is linear in the advantage, weighed after it was clipped, is the same."""
    (given, *_) = learned(job(), cases.groups(rng))
    trainer = (given.sampler_logprobs + rng.uniform(-1, 1, len(given.sampler_logprobs))).astype(np.float32)
    document = corrected(given, trainer, None, cap)
    weight = np.minimum(np.exp(trainer - given.sampler_logprobs), cap) if cap else 1.0
    np.testing.assert_allclose(document.advantages, given.document.advantages * weight, rtol=1e-5)
    np.testing.assert_array_equal(document.old_logprobs, trainer)
    logprobs = trainer + rng.uniform(-0.5, 0.5, len(trainer)).astype(np.float32)
    here, inputs = inputs_of(document)
    name = loss_of("grpo", 0.2, 0.28, 0.0)
    loss_T, _ = find_loss(name).function(logprobs[here], inputs)
    plain = corrected(given, trainer, None, 0.0)
    plain_T, _ = find_loss(name).function(logprobs[here], inputs_of(plain)[1])
    np.testing.assert_allclose(loss_T, plain_T * (weight[here] if cap else 1.0), rtol=1e-5)


def test_the_divergence_from_the_base_model_is_k3(rng):
    p, ref = np.log(rng.uniform(0.1, 0.9, (2, 30))).astype(np.float32)
    ones = np.ones(30, np.float32)
    inputs = LossInputs(ones, p, ones, ref)
    for algorithm in ("grpo", "rloo", "importance_sampling"):
        plain, near = (find_loss(loss_of(algorithm, 0.2, 0.3, beta)) for beta in (0.0, 0.5))
        assert "ref_logprobs" in near.needs
        assert "ref_logprobs" not in plain.needs
        difference = near.function(p, inputs)[0] - plain.function(p, inputs)[0]
        ratio = np.exp(ref.astype(np.float64) - p)
        np.testing.assert_allclose(difference, 0.5 * (ratio - 1 - np.log(ratio)), atol=1e-5)


def test_intervals_are_students():
    found = interval([1.0, 2.0, NAN, 3.0, 4.0])
    half = 3.182446 * np.std([1, 2, 3, 4], ddof=1) / 2
    assert found == pytest.approx((2.5, 2.5 - half, 2.5 + half), abs=1e-5)
    assert interval([2.0])[0] == 2
    assert np.isnan(interval([2.0])[1])
    assert np.isnan(interval([])[0])


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"algorithm": "gpro"}, r"algorithm is 'gpro' \(did you mean 'grpo'\?\)"),
        ({"num_generations": 1}, "num_generations is 1; give a number from 2"),
        ({"temperature": 0.0}, "temperature is 0.0; give a finite number above 0"),
        ({"loss_type": "dr_grpo", "beta": 0.1}, "dr_grpo has no KL divergence"),
        ({"algorithm": "rloo", "num_iterations": 2}, "give num_iterations 1"),
        ({"soft_punish_cache": 300}, "soft_punish_cache is 300"),
        ({"beta": NAN}, "beta is nan"),
    ],
)
def test_options_that_cannot_work_are_refused(options, told):
    with pytest.raises(ConfigError, match=told):
        RolloutOptions(**options)
