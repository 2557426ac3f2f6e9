"""What a step learns, against a transcription in float64: advantages, ratios, clips, divergence, averages, weights."""

import jax
import numpy as np
import pytest
import reference
import rollout_cases as cases

from preft_jax.adapters.adapter import Adapter
from train.rollouts.learning import group_advantages, learned
from train.rollouts.update import learn
from train.trainer import Trainer

STEP = 1e-5
"""Of central differences in float64."""
RTOL = 3e-3
"""Float32 rounding of a gradient whose parts cancel, and of parameters that an update has moved."""

RATE = 0.05
"""Of SGD. So large that the second update meets ratios which are clipped."""

CASES = {
    "dapo": {"beta": 0.3, "temperature": 0.7},
    "grpo": {"loss_type": "grpo", "scale_rewards": "batch", "epsilon": 0.02, "epsilon_high": 0.05},
    "rloo": {"algorithm": "rloo", "scale_rewards": "none", "beta": 0.2},
    "is": {"algorithm": "importance_sampling", "scale_rewards": "none", "loss_type": "dr_grpo"},
}


def logprobs(model, adapter, group, sample, temperature):
    """Return float64 log-probabilities of a sample's tokens."""
    tokens, first = [*group.encoded.token_ids, *sample.token_ids], len(group.encoded.token_ids)
    mask = None if adapter is None else reference.adapter_mask(adapter, first, len(sample.token_ids))
    logits = reference.forward(model.config, model.params, tokens, adapter, mask)[first - 1 : -1]
    return reference.log_softmax(logits / temperature)[np.arange(len(sample.token_ids)), sample.token_ids]


def objective(model, adapter, old, groups, options):
    """Return the loss of a step as its papers have it, given the adapter before its first update."""
    rewards = [np.array([sample.reward for sample in group.samples]) for group in groups]
    everywhere = np.concatenate(rewards).std(ddof=1)
    sums, lengths = [], []
    for group, own in zip(groups, rewards, strict=True):
        deviation = {"group": own.std(ddof=1) + 1e-4, "batch": everywhere + 1e-4, "none": 1.0}[options.scale_rewards]
        for sample, advantage in zip(group.samples, group_advantages(own, options.algorithm) / deviation, strict=True):
            now, before = (logprobs(model, one, group, sample, options.temperature) for one in (adapter, old))
            ratio, weight = np.exp(now - before), np.minimum(np.exp(before - np.array(sample.logprobs)), 2.0)
            gain = ratio * advantage
            if options.algorithm == "grpo":
                clipped = np.clip(ratio, 1 - options.epsilon, 1 + options.epsilon_high)
                gain = np.minimum(gain, clipped * advantage)
            elif options.algorithm == "rloo":
                gain = now * advantage
            loss = -weight * gain
            if options.beta:
                difference = logprobs(model, None, group, sample, options.temperature) - now
                loss = loss + options.beta * (np.exp(difference) - 1 - difference)
            sums.append(loss.sum())
            lengths.append(len(sample.token_ids))
    if options.loss_type == "grpo":
        return np.mean(np.array(sums) / lengths)
    return sum(sums) / (sum(lengths) if options.loss_type == "dapo" else len(sums) * options.max_completion_length)


def moved(adapter, direction, by):
    params = jax.tree.map(lambda leaf, d: np.asarray(leaf, np.float64) + by * d, adapter.params, direction)
    return Adapter(adapter.config, params)


@pytest.fixture(scope="module")
def small(lively):
    return cases.one_layer(lively)


def start(small, rng, iterations):
    """Return a trainer and jobs, one for each case, that start from adapters which already do something."""
    sgd = {"optim": "sgd", "adam_beta1": 0.0, "learning_rate": RATE}
    jobs = [
        cases.job(small, name=name, optimizer=sgd, num_generations=3,
                  num_iterations=1 if options.get("algorithm") == "rloo" else iterations, **options)
        for name, options in CASES.items()
    ]  # fmt: skip
    for job in jobs:
        params = jax.tree.map(
            lambda leaf: (np.asarray(leaf) + 0.05 * rng.standard_normal(leaf.shape)).astype(np.float32),
            job.initial.params,
        )
        job.initial = Adapter(job.initial.config, params)
    trainer = Trainer(small, jobs)
    trainer.admit()
    return trainer, jobs


def slope_along(before, after):
    """Return the unit direction in which an adapter was moved, and the gradient's length."""
    step = jax.tree.map(lambda a, b: (np.asarray(b, np.float64) - a) / -RATE, before.params, after.params)
    norm = np.sqrt(sum((leaf**2).sum() for leaf in jax.tree.leaves(step)))
    return jax.tree.map(lambda leaf: leaf / norm, step), norm


def test_updates_are_those_of_the_losses_as_their_papers_have_them(small):
    """Of the first update, and of a second on the same samples, whose ratios are not 1."""
    groups = {name: cases.groups(np.random.default_rng(i), 2, 3) for i, name in enumerate(CASES)}
    adapters = {}
    for iterations in (1, 2):
        trainer, jobs = start(small, np.random.default_rng(7), iterations)
        given = {job: learned(job, groups[job.name]) for job in jobs}
        adapters[0] = {job.name: trainer.adapter_of(job) for job in jobs}
        updates = learn(trainer, given)
        adapters[iterations] = {job.name: trainer.adapter_of(job) for job in jobs}
        clipped = {job.name: updates[job].results[-1].metrics.get("clip_fraction", 0.0) for job in jobs}
    assert clipped["grpo"] > 0.05, "the second update has something to clip"
    for job in jobs:
        for first, second in ((0, 1), (1, 2)):
            old, now, after = (adapters[i][job.name] for i in (0, first, second))
            if job.options.algorithm == "rloo" and second == 2:
                continue
            direction, norm = slope_along(now, after)
            ahead, behind = (
                objective(small, moved(now, direction, by), old, groups[job.name], job.options) for by in (STEP, -STEP)
            )
            assert norm > 1e-3
            assert (ahead - behind) / (2 * STEP) == pytest.approx(norm, rel=RTOL), (job.name, second)
