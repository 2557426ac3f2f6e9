"""The optimizer of one adapter: optax's, with every number an array, so that many adapters share one program."""

import dataclasses
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from preft_jax.errors import ConfigError, did_you_mean
from train.flat import Flat

OPTIMIZERS = ("adamw", "lion", "sgd")

SCHEDULES = ("linear", "cosine", "constant", "constant_with_warmup")


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """How an adapter is updated; names are those of transformers' ``TrainingArguments``.

    Attributes:
        optim: ``adamw`` (Loshchilov and Hutter, arXiv 1711.05101), ``lion`` (Chen et al., arXiv 2302.06675) or ``sgd``.
        learning_rate: the schedule's highest.
        lr_scheduler_type: ``linear`` or ``cosine`` to zero, ``constant``, or ``constant_with_warmup``.
        warmup_ratio: part of all steps in which the rate rises from zero; ``warmup_steps`` overrides it if not 0.
        warmup_steps: see there.
        weight_decay: decoupled; of adamw and lion.
        adam_beta1: of adamw and lion; sgd's momentum.
        adam_beta2: of adamw and lion.
        adam_epsilon: of adamw.
        max_grad_norm: gradients with a larger global norm are scaled down to it; 0 leaves them as they are.
        lora_plus_ratio: learning rate of LoRA's B over that of A (Hayou et al., arXiv 2402.12354).
    """

    optim: str = "adamw"
    learning_rate: float = 1e-3
    lr_scheduler_type: str = "linear"
    warmup_ratio: float = 0.03
    warmup_steps: int = 0
    weight_decay: float = 0.0
    adam_beta1: float = 0.9
    adam_beta2: float = 0.999
    adam_epsilon: float = 1e-8
    max_grad_norm: float = 1.0
    lora_plus_ratio: float = 1.0

    def __post_init__(self) -> None:
        for name, value, allowed in (
            ("optim", self.optim, OPTIMIZERS),
            ("lr_scheduler_type", self.lr_scheduler_type, SCHEDULES),
        ):
            if value not in allowed:
                raise ConfigError(
                    f"{name} is {value!r}{did_you_mean(str(value), allowed)}; allowed: {', '.join(allowed)}"
                )
        for name, least, most in (
            ("learning_rate", 0.0, math.inf), ("warmup_ratio", 0.0, 1.0), ("warmup_steps", 0, math.inf),
            ("weight_decay", 0.0, math.inf), ("adam_beta1", 0.0, 1.0), ("adam_beta2", 0.0, 1.0),
            ("adam_epsilon", 0.0, math.inf), ("max_grad_norm", 0.0, math.inf), ("lora_plus_ratio", 0.0, math.inf),
        ):  # fmt: skip
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not least <= value <= most:
                raise ConfigError(f"{name} is {value!r}; give a number from {least} to {most}")
            if name in ("adam_beta1", "adam_beta2") and value == 1:
                raise ConfigError(f"{name} is 1; give less: a mean that never moves")
            if not math.isfinite(value):
                raise ConfigError(f"{name} is {value!r}; give a finite number")

    def learning_rates(self, total_steps: int) -> np.ndarray:
        """Return the learning rate of each of ``total_steps`` updates, float32.

        They are those of transformers, where warm-up begins at zero: the first update moves nothing. A run of one
        update would then learn nothing at all, so it has no warm-up.
        """
        top, warmup = self.learning_rate, self.warmup_steps or math.ceil(self.warmup_ratio * total_steps)
        if total_steps == 1:
            warmup = 0
        if self.lr_scheduler_type == "constant":
            warmup, after = 0, optax.constant_schedule(top)
        elif self.lr_scheduler_type == "constant_with_warmup":
            after = optax.constant_schedule(top)
        elif self.lr_scheduler_type == "linear":
            after = optax.linear_schedule(top, 0.0, max(1, total_steps - warmup))
        else:
            after = optax.cosine_decay_schedule(top, max(1, total_steps - warmup))
        schedule = optax.join_schedules([optax.linear_schedule(0.0, top, max(1, warmup)), after], [warmup])
        return np.asarray(jax.vmap(schedule)(jnp.arange(total_steps, dtype=jnp.float32)), np.float32)


class Numbers(NamedTuple):
    """What an update depends on besides the gradient, float32 scalars, or ``[n]`` for adapters side by side."""

    learning_rate: Any
    beta1: Any
    beta2: Any
    epsilon: Any
    weight_decay: Any
    max_grad_norm: Any
    lora_plus_ratio: Any


def numbers(config: OptimizerConfig, learning_rate: float) -> Numbers:
    """Return an adapter's numbers for one update."""
    norm = config.max_grad_norm or np.inf
    own = (config.adam_beta1, config.adam_beta2, config.adam_epsilon, config.weight_decay, norm, config.lora_plus_ratio)
    return Numbers(*(np.float32(x) for x in (learning_rate, *own)))


def transformation(optim: str, n: Numbers) -> optax.GradientTransformation:
    """Return the optimizer; its state does not depend on the numbers."""
    if optim == "adamw":
        scale, decay = _adam(n), optax.add_decayed_weights(n.weight_decay)
    elif optim == "lion":
        scale, decay = optax.scale_by_lion(n.beta1, n.beta2), optax.add_decayed_weights(n.weight_decay)
    else:
        scale, decay = optax.trace(n.beta1), optax.identity()
    faster = optax.stateless(lambda updates, params: _scale_b(updates, n.lora_plus_ratio))
    return optax.chain(
        optax.clip_by_global_norm(n.max_grad_norm), scale, decay, faster, optax.scale_by_learning_rate(n.learning_rate)
    )


def _adam(n: Numbers) -> optax.GradientTransformation:
    """Return ``optax.scale_by_adam``. It raises a float32 decay to an int32 count: a promotion of its own."""
    adam = optax.scale_by_adam(n.beta1, n.beta2, n.epsilon)

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        with jax.numpy_dtype_promotion("standard"):
            return adam.update(updates, state, params)

    return optax.GradientTransformation(adam.init, update)


def _scale_b(updates: Any, ratio: Any) -> Any:
    """Scale LoRA's B, which stands last in flat parameters."""
    assert isinstance(updates, Flat)
    return updates.scaled_last(ratio)


def init_state(optim: str, params: Any) -> Any:
    """Return the state of an adapter that was never updated."""
    zero = Numbers(*[np.float32(0)] * len(Numbers._fields))
    return transformation(optim, zero).init(params)
