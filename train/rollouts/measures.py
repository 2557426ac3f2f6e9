"""Numbers of a step or an evaluation, by the names that TRL has for them."""

from collections.abc import Sequence

import numpy as np

from train.rollouts.learning import is_learned
from train.rollouts.options import RolloutOptions
from train.rollouts.samples import Group, Sample
from train.rollouts.statistics import Interval, interval


def prompt_rewards(groups: Sequence[Group]) -> list[float]:
    """Return the mean reward of each prompt's samples; NaN where none has a reward."""
    rewards = [[sample.reward for sample in group.samples if sample.error is None] for group in groups]
    return [float(np.mean(own)) if own else float("nan") for own in rewards]


def sample_measures(groups: Sequence[Group]) -> dict[str, float]:
    """Return the numbers of samples: rewards with their 95% interval over prompts, and lengths in tokens."""
    rewarded = [[sample.reward for sample in group.samples if sample.error is None] for group in groups]
    reward, several = interval(prompt_rewards(groups)), [own for own in rewarded if len(own) > 1]
    samples = [sample for group in groups for sample in group.samples]
    lengths = [len(sample.token_ids) for sample in samples] or [0]
    return {
        **_ends("reward", reward),
        "reward_std": float(np.mean([np.std(own, ddof=1) for own in several])) if several else 0.0,
        "frac_reward_zero_std": float(np.mean([min(own) == max(own) for own in several])) if several else 0.0,
        "completions/mean_length": float(np.mean(lengths)),
        "completions/min_length": float(min(lengths)),
        "completions/max_length": float(max(lengths)),
        "completions/clipped_ratio": float(np.mean([sample.is_truncated for sample in samples])) if samples else 0.0,
        "entropy": _entropy(samples),
    }


def step_measures(groups: Sequence[Group], options: RolloutOptions, asked: int) -> dict[str, float]:
    """Return the numbers of a step's samples, with what was dropped of ``asked`` prompts."""
    samples = [sample for group in groups for sample in group.samples]
    return sample_measures(groups) | {
        "samples": float(sum(is_learned(sample, options) for sample in samples)),
        "samples_dropped": float(sum(sample.error is not None for sample in samples)),
        "prompts_left_out": float(asked - len(groups)),
    }


def eval_measures(groups: Sequence[Group]) -> dict[str, float]:
    """Return the numbers of held-out prompts."""
    found = sample_measures(groups)
    kept = ("reward", "reward_low", "reward_high", "completions/mean_length", "completions/clipped_ratio")
    dropped = sum(sample.error is not None for group in groups for sample in group.samples)
    return {f"eval_{name}": found[name] for name in kept} | {"eval_samples_dropped": float(dropped)}


def _ends(name: str, found: Interval) -> dict[str, float]:
    return {name: found.mean, f"{name}_low": found.low, f"{name}_high": found.high}


def _entropy(samples: Sequence[Sample]) -> float:
    """Return an estimate of the entropy of the next token, nats: the mean surprise of the tokens that were drawn."""
    drawn = [logprob for sample in samples for logprob in sample.logprobs]
    return -float(np.mean(drawn)) if drawn else 0.0
