"""Losses by name: what a token's loss is, given its log-probability.

A loss is a function ``(logprob_T, inputs) -> (loss_T, metrics)`` of float32 arrays with one value for each token. It is
differentiated with respect to the log-probabilities; their own gradient is made chunk by chunk, so that a loss never
sees logits. Tokens are weighted, summed and divided by the sum of their weights by the trainer, and so are metrics.

    def pessimistic(logprob_T, inputs):
        return -inputs.advantages_T * logprob_T, {"surprise": -logprob_T}

    register_loss("pessimistic", pessimistic, needs=("advantages",))
    trainer.forward_backward({job: rows}, "pessimistic")
"""

import dataclasses
from collections.abc import Mapping
from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp

from kernels.types import Array
from preft_jax.errors import ConfigError, did_you_mean
from train.data.documents import OPTIONAL_FIELDS


class LossInputs(NamedTuple):
    """What a loss knows of each token besides its log-probability, float32 ``[T]``.

    Attributes:
        weights_T: that the trainer multiplies the loss with; 0 where nothing is learned, and the log-probability is 0.
        old_logprobs_T: under the distribution that the token was sampled from; None if the loss does not need it.
        advantages_T: None if the loss does not need it.
        ref_logprobs_T: under a reference policy; None if the loss does not need it.
    """

    weights_T: Array
    old_logprobs_T: Array = None
    advantages_T: Array = None
    ref_logprobs_T: Array = None


POLICY = ("old_logprobs", "advantages")
"""What a document has whose tokens a policy has drawn."""

Metrics = Mapping[str, jax.Array]
"""Values of each token, ``[T]``, by name."""


class LossFunction(Protocol):
    """A loss of each token: ``(loss_T, metrics)``."""

    def __call__(self, logprob_T: jax.Array, inputs: LossInputs, /) -> tuple[jax.Array, Metrics]:
        """Return the unweighted loss of each token."""
        ...


@dataclasses.dataclass(frozen=True)
class Loss:
    """A registered loss: its function, and which of ``OPTIONAL_FIELDS`` every document must have for it."""

    name: str
    function: LossFunction
    needs: tuple[str, ...] = ()


def cross_entropy(logprob_T: jax.Array, inputs: LossInputs) -> tuple[jax.Array, Metrics]:
    """Return ``-log p``: supervised fine-tuning."""
    return -logprob_T, {}


def importance_sampling(logprob_T: jax.Array, inputs: LossInputs, *, beta: float = 0.0) -> tuple[jax.Array, Metrics]:
    """Return ``-r A`` with the ratio ``r = p / p_old``: the policy gradient, corrected for who sampled.

    Its gradient is ``-r A d log p``: REINFORCE (Williams, 1992) where ``p`` is ``p_old``. ``beta`` is as in ``grpo``.
    """
    ratio_T, metrics = _ratio(logprob_T, inputs)
    return _near_reference(-ratio_T * inputs.advantages_T, metrics, logprob_T, inputs, beta)


def ppo(
    logprob_T: jax.Array, inputs: LossInputs, *, clip_low: float = 0.2, clip_high: float = 0.2
) -> tuple[jax.Array, Metrics]:
    """Return ``-min(r A, clip(r, 1 - clip_low, 1 + clip_high) A)`` with ``r = p / p_old``.

    Schulman et al., arXiv 1707.06347, equation 7; a higher ``clip_high`` is DAPO's (Yu et al., arXiv 2503.14476). For
    others than 0.2: ``register_loss("dapo", functools.partial(ppo, clip_high=0.28), needs=POLICY)``.
    """
    ratio_T, metrics = _ratio(logprob_T, inputs)
    clipped_T = jnp.clip(ratio_T, 1 - clip_low, 1 + clip_high)
    gain_T, clipped_gain_T = ratio_T * inputs.advantages_T, clipped_T * inputs.advantages_T
    is_clipped_T = (clipped_gain_T < gain_T).astype(jnp.float32)
    return -jnp.minimum(gain_T, clipped_gain_T), {**metrics, "clip_fraction": is_clipped_T}


def grpo(
    logprob_T: jax.Array,
    inputs: LossInputs,
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.28,
    beta: float = 0.0,
) -> tuple[jax.Array, Metrics]:
    """Return ``ppo``'s loss and, if ``beta`` is not 0, ``beta`` times the KL divergence from a reference policy.

    Shao et al., arXiv 2402.03300, equation 3: GRPO, whose advantages are those of a group of samples of one prompt. The
    higher ``clip_high`` is DAPO's. The estimate of the divergence is k3 (see ``k3``), token by token.
    """
    loss_T, metrics = ppo(logprob_T, inputs, clip_low=clip_low, clip_high=clip_high)
    return _near_reference(loss_T, metrics, logprob_T, inputs, beta)


def rloo(logprob_T: jax.Array, inputs: LossInputs, *, beta: float = 0.0) -> tuple[jax.Array, Metrics]:
    """Return ``-A log p``: REINFORCE, whose advantages are over the mean reward of the group's other samples.

    Ahmadian et al., arXiv 2402.14740. On policy: nothing corrects for another policy that has drawn the tokens, unless
    the advantages do. ``beta`` is as in ``grpo``.
    """
    return _near_reference(-logprob_T * inputs.advantages_T, {}, logprob_T, inputs, beta)


def k3(logprob_T: jax.Array, ref_logprob_T: jax.Array) -> jax.Array:
    """Return ``exp(d) - 1 - d`` with ``d = log p_ref - log p``: an estimate of KL(p || p_ref) from tokens drawn from p.

    Schulman (http://joschu.net/blog/kl-approx.html): unbiased, and never negative.
    """
    difference_T = ref_logprob_T - logprob_T
    return jnp.exp(difference_T) - 1 - difference_T


def _near_reference(
    loss_T: jax.Array, metrics: Metrics, logprob_T: jax.Array, inputs: LossInputs, beta: float
) -> tuple[jax.Array, Metrics]:
    if not beta:
        return loss_T, metrics
    kl_T = k3(logprob_T, inputs.ref_logprobs_T)
    return loss_T + beta * kl_T, {**metrics, "kl": kl_T}


def _ratio(logprob_T: jax.Array, inputs: LossInputs) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Return ``p / p_old``, and it as a metric beside the estimate ``r - 1 - log r`` of KL(p_old || p).

    The estimate is Schulman's k3 (http://joschu.net/blog/kl-approx.html): unbiased, and never negative.
    """
    log_ratio_T = logprob_T - inputs.old_logprobs_T
    ratio_T = jnp.exp(log_ratio_T)
    return ratio_T, {"ratio": ratio_T, "approx_kl": ratio_T - 1 - log_ratio_T}


_LOSSES: dict[str, Loss] = {}


def register_loss(name: str, function: LossFunction, needs: tuple[str, ...] = (), *, replace: bool = False) -> None:
    """Let a name stand for a loss.

    Args:
        name: by which ``Trainer.forward_backward`` takes it.
        function: pure; see the module.
        needs: which of ``OPTIONAL_FIELDS`` every document must have; others are None in its inputs.
        replace: let a name that is taken stand for it.

    Raises:
        ConfigError: if the name is taken, or no document has what is needed.
    """
    if name in _LOSSES and not replace:
        raise ConfigError(f"there is a loss {name!r} already; choose another name, or give replace=True")
    for field in needs:
        if field not in OPTIONAL_FIELDS:
            raise ConfigError(
                f"the loss {name!r} needs {field!r}{did_you_mean(field, OPTIONAL_FIELDS)}; a document may have: "
                f"{', '.join(OPTIONAL_FIELDS)}"
            )
    _LOSSES[name] = Loss(name, function, tuple(needs))


def find_loss(name: str) -> Loss:
    """Return a registered loss.

    Raises:
        ConfigError: if the name is none of one.
    """
    if name not in _LOSSES:
        raise ConfigError(
            f"loss is {name!r}{did_you_mean(name, tuple(_LOSSES))}; allowed: {', '.join(_LOSSES)}, and what "
            "register_loss adds"
        )
    return _LOSSES[name]


register_loss("cross_entropy", cross_entropy)
register_loss("importance_sampling", importance_sampling, needs=POLICY)
register_loss("ppo", ppo, needs=POLICY)
register_loss("grpo", grpo, needs=POLICY)
register_loss("rloo", rloo, needs=("advantages",))
CROSS_ENTROPY = find_loss("cross_entropy")
