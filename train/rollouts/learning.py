"""From rewards to what is learned: advantages, weights of tokens, and documents for the trainer.

Advantages of a group of G samples of one prompt, with rewards r_1, ..., r_G of those that have one:

- ``grpo`` and ``importance_sampling``: A_i = (r_i - mean(r)) / s (Shao et al., arXiv 2402.03300);
- ``rloo``: A_i = r_i - mean of the others' (Ahmadian et al., arXiv 2402.14740), over s;

with s the standard deviation of the group's rewards, or that of the batch's, and 0.0001, or s = 1 (Dr. GRPO: Liu et
al., arXiv 2503.20783). They are exactly 0 where all rewards of a group are equal.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from preft_jax.adapters.config import AdapterConfig
from preft_jax.shapes import NUM_GROUPS
from train.data.documents import Document, sampled_document
from train.losses import POLICY, grpo, importance_sampling, register_loss, rloo
from train.rollouts.options import RolloutOptions
from train.rollouts.samples import Group, RolloutJob, Sample

_LEAST_DEVIATION = 1e-4


class Learned(NamedTuple):
    """A document to learn, and the log-probabilities under which the sampler drew its answer, float32 ``[S]``."""

    document: Document
    sampler_logprobs: np.ndarray


def group_advantages(rewards: Sequence[float], algorithm: str) -> np.ndarray:
    """Return the advantage of each sample of a group before it is scaled, float64; 0 where the reward is NaN."""
    given = np.asarray(rewards, np.float64)
    kept = given[~np.isnan(given)]
    if len(kept) < 2 or kept.min() == kept.max():
        return np.zeros(len(given))
    factor = len(kept) / (len(kept) - 1) if algorithm == "rloo" else 1.0
    return np.where(np.isnan(given), 0.0, factor * (given - kept.mean()))


def advantages(groups: Sequence[Sequence[float]], options: RolloutOptions) -> list[np.ndarray]:
    """Return the advantages of the samples of each group, float64, from their rewards; NaN is a reward that is not."""
    found = [group_advantages(group, options.algorithm) for group in groups]
    if options.scale_rewards == "none":
        return found
    whole = _deviation([reward for group in groups for reward in group])
    deviations = [_deviation(group) if options.scale_rewards == "group" else whole for group in groups]
    return [own / (deviation + _LEAST_DEVIATION) for own, deviation in zip(found, deviations, strict=True)]


def _deviation(rewards: Sequence[float]) -> float:
    kept = np.asarray(rewards, np.float64)
    kept = kept[~np.isnan(kept)]
    return float(kept.std(ddof=1)) if len(kept) > 1 else 0.0


def punishment(num_tokens: int, options: RolloutOptions) -> float:
    """Return what a sample's reward loses for its length, from 0 to 1.

    Yu et al., arXiv 2503.14476, equation 13: nothing up to the last ``soft_punish_cache`` tokens, then more with each.
    """
    if not options.soft_punish_cache:
        return 0.0
    over = num_tokens - (options.max_completion_length - options.soft_punish_cache)
    return min(max(over / options.soft_punish_cache, 0.0), 1.0)


def is_learned(sample: Sample, options: RolloutOptions) -> bool:
    """Whether something is learned from a sample: it has a reward, and is not cut off where such ones are masked."""
    return sample.error is None and not (sample.is_truncated and options.mask_truncated_completions)


def learned(job: RolloutJob, groups: Sequence[Group]) -> list[Learned]:
    """Return what a job learns from groups whose samples have their rewards; longest documents first.

    Samples without a reward are left out. Those that are masked count in the mean of their group.
    """
    options, config = job.options, job.initial.config
    scaled = advantages([[sample.reward for sample in group.samples] for group in groups], options)
    chosen = [
        (group, sample, float(advantage))
        for group, own in zip(groups, scaled, strict=True)
        for sample, advantage in zip(group.samples, own, strict=True)
        if is_learned(sample, options)
    ]
    factor = 1.0
    if options.loss_type == "dr_grpo" and chosen:
        # The trainer divides by the tokens there are, and this loss by the most that there could be.
        factor = sum(len(sample.token_ids) for _, sample, _ in chosen) / (len(chosen) * options.max_completion_length)
    made = [_learned(group, sample, factor * advantage, config, options) for group, sample, advantage in chosen]
    return sorted(made, key=lambda one: -len(one.document))


def token_weight(num_tokens: int, loss_type: str) -> float:
    """Return the weight of each token of a sample; the trainer divides the weighted sum by the sum of the weights.

    ``dapo``: each token counts the same (Yu et al., arXiv 2503.14476). ``grpo``: each sample does (Shao et al., arXiv
    2402.03300). ``dr_grpo``: each token, over a constant (Liu et al., arXiv 2503.20783).
    """
    return 1 / num_tokens if loss_type == "grpo" else 1.0


def _learned(group: Group, sample: Sample, advantage: float, config: AdapterConfig, options: RolloutOptions) -> Learned:
    document = sampled_document(
        group.encoded, sample.token_ids, config, logprobs=sample.logprobs, advantage=advantage,
        weight=token_weight(len(sample.token_ids), options.loss_type),
    )  # fmt: skip
    assert document.old_logprobs is not None
    return Learned(dataclasses.replace(document, temperature=options.temperature), document.old_logprobs)


def nothing(job: RolloutJob) -> Document:
    """Return a document that teaches nothing: for an update without samples, which only moves the job's clock."""
    zeros = np.zeros(2, np.float32)
    return Document(
        token_ids=np.zeros(2, np.int32), edit_mask=np.zeros((2, NUM_GROUPS), bool), weights=zeros, old_logprobs=zeros,
        advantages=zeros, ref_logprobs=zeros, temperature=job.options.temperature,
    )  # fmt: skip


def corrected(one: Learned, trainer_logprobs: np.ndarray, ref_logprobs: np.ndarray | None, cap: float) -> Document:
    """Return a document that is learned from the trainer's own policy, weighed where another one has drawn it.

    Args:
        one: as it was sampled.
        trainer_logprobs: of its tokens under the adapter that is to be updated, float32 ``[S]``.
        ref_logprobs: of its tokens under the base model, or None.
        cap: of the truncated importance weight min(p_trainer / p_sampler, cap) (Yao et al., "Your efficient RL
            framework secretly brings you off-policy RL training"); 0: the weight is 1.
    """
    document = one.document
    advantages = document.advantages
    if cap and advantages is not None:
        advantages = advantages * importance(trainer_logprobs - one.sampler_logprobs, cap)
    return dataclasses.replace(
        document, old_logprobs=trainer_logprobs, advantages=advantages, ref_logprobs=ref_logprobs
    )


def importance(log_ratio: np.ndarray, cap: float) -> np.ndarray:
    """Return ``min(exp(log_ratio), cap)``, float32."""
    return np.minimum(np.exp(log_ratio), np.float32(cap)).astype(np.float32)


@functools.cache
def loss_of(algorithm: str, epsilon: float, epsilon_high: float, beta: float) -> str:
    """Return the name of a loss with these numbers, registering it; jobs of one loss share micro-batches."""
    function, needs = {
        "grpo": (functools.partial(grpo, clip_low=epsilon, clip_high=epsilon_high, beta=beta), POLICY),
        "rloo": (functools.partial(rloo, beta=beta), ("advantages",)),
        "importance_sampling": (functools.partial(importance_sampling, beta=beta), POLICY),
    }[algorithm]
    name = f"{algorithm}({epsilon:g}, {epsilon_high:g}, {beta:g})"
    register_loss(name, function, needs=(*needs, "ref_logprobs") if beta else needs, replace=True)
    return name
