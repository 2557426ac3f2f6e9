"""The options of ``train.rl``, and what it makes of their values: names are TRL's where it has one."""

import argparse
import dataclasses
import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from preft_jax.errors import ConfigError, did_you_mean
from serve.engine.request import MAX_SAMPLES
from train.jobs import JobConfig
from train.rollouts import builtin
from train.run import declared
from train.run.declared import Declared, read_command
from train.run.options import JOB_OPTIONS, RUN_OPTIONS, Settings, job_config, make_settings

ALGORITHMS = ("grpo", "rloo", "importance_sampling")
LOSS_TYPES = ("dapo", "grpo", "dr_grpo")
SCALES = ("group", "batch", "none")


@dataclasses.dataclass(frozen=True, kw_only=True)
class RolloutOptions:
    """What an adapter is rewarded for, how samples are drawn, and how it learns from them.

    Attributes:
        task: ``builtin``, ``reasoning_gym:NAME[,NAME...]``, or a reward's ``module:function`` over a dataset's prompts.
        system_prompt: system message before each prompt that is one text; makes a chat of it.
        num_generations: samples of a prompt: a group.
        max_prompt_length: tokens; longer prompts are left out.
        max_completion_length: tokens of a sample, at most.
        temperature: at which tokens are drawn, and of the log-probabilities that are learned.
        algorithm: the loss and what a sample's reward is compared with; see ``learning``.
        loss_type: how the losses of tokens are averaged; see ``learning.token_weights``.
        scale_rewards: what advantages are divided by: the standard deviation of the group's rewards, or that of the
            batch's, or nothing.
        beta: of the KL divergence from the base model.
        epsilon: ratios below one minus this are clipped.
        epsilon_high: ratios above one plus this are clipped.
        num_iterations: updates on the samples of a step.
        importance_sampling_cap: of the ratio of the trainer's and the sampler's probability of a token, with which its
            loss is weighed; 0: it is not weighed.
        mask_truncated_completions: learn nothing from samples that were cut off at ``max_completion_length``.
        soft_punish_cache: the last tokens before ``max_completion_length`` over which the reward falls by up to 1.
        reward_timeout: seconds for one reward.
        num_eval_prompts: held-out prompts.
        num_generations_eval: samples of each of them.
    """

    task: str = "builtin"
    system_prompt: str | None = None
    num_generations: int = 8
    max_prompt_length: int = 256
    max_completion_length: int = 256
    temperature: float = 1.0
    algorithm: str = "grpo"
    loss_type: str = "dapo"
    scale_rewards: str = "group"
    beta: float = 0.0
    epsilon: float = 0.2
    epsilon_high: float = 0.28
    num_iterations: int = 1
    importance_sampling_cap: float = 2.0
    mask_truncated_completions: bool = False
    soft_punish_cache: int = 0
    reward_timeout: float = 10.0
    num_eval_prompts: int = 32
    num_generations_eval: int = 4

    def __post_init__(self) -> None:
        for name, allowed in (("algorithm", ALGORITHMS), ("loss_type", LOSS_TYPES), ("scale_rewards", SCALES)):
            value = getattr(self, name)
            if value not in allowed:
                raise ConfigError(f"{name} is {value!r}{did_you_mean(value, allowed)}; allowed: {', '.join(allowed)}")
        for name, least, most in (
            ("num_generations", 2, MAX_SAMPLES), ("max_prompt_length", 1, math.inf),
            ("max_completion_length", 1, math.inf), ("num_iterations", 1, math.inf), ("num_eval_prompts", 0, math.inf),
            ("soft_punish_cache", 0, self.max_completion_length), ("num_generations_eval", 1, MAX_SAMPLES),
            ("beta", 0.0, math.inf), ("epsilon", 0.0, 1.0), ("epsilon_high", 0.0, math.inf),
            ("importance_sampling_cap", 0.0, math.inf),
        ):  # fmt: skip
            value = getattr(self, name)
            if not (math.isfinite(value) and least <= value <= most):
                raise ConfigError(f"{name} is {value}; give a number from {least} to {most}")
        for name in ("temperature", "reward_timeout"):
            if not 0 < getattr(self, name) < math.inf:
                raise ConfigError(f"{name} is {getattr(self, name)}; give a finite number above 0")
        if self.loss_type == "dr_grpo" and self.beta:
            raise ConfigError("loss_type dr_grpo has no KL divergence; give beta 0, or another loss_type")
        if self.algorithm == "rloo" and self.num_iterations > 1:
            raise ConfigError(
                "algorithm rloo learns from samples of the adapter as it is; give num_iterations 1, or algorithm grpo"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class RolloutConfig(JobConfig):
    """What one adapter is rewarded for, and how it learns; ``max_steps`` counts updates.

    Attributes:
        rollouts: see there.
        steps: batches of samples that are learned from.
    """

    rollouts: RolloutOptions = RolloutOptions()
    steps: int = 100

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.steps < 1:
            raise ConfigError(f"max_steps is {self.steps}; give at least 1")
        if self.samples % self.rollouts.num_generations:
            raise ConfigError(
                f"a step has {self.samples} samples (per_device_train_batch_size {self.batches.batch_size} times "
                f"gradient_accumulation_steps {self.gradient_accumulation_steps}), which is no multiple of "
                f"num_generations {self.rollouts.num_generations}; change one of them"
            )

    @property
    def samples(self) -> int:
        """Samples of a step."""
        return self.batches.batch_size * self.gradient_accumulation_steps

    @property
    def prompts(self) -> int:
        """Prompts of a step."""
        return self.samples // self.rollouts.num_generations


@dataclasses.dataclass(frozen=True, kw_only=True)
class RolloutSettings(Settings):
    """A run of ``train.rl``.

    Attributes:
        max_num_seqs: samples that are generated at a time.
        max_staleness: steps that are learned between the adapter that draws samples and the one that learns from them.
    """

    max_num_seqs: int = 32
    max_staleness: int = 0


_FLAG = {"action": argparse.BooleanOptionalAction}

_NOT_OF_A_RUN = ("mesh", "eval_strategy", "eval_generations")
_NOT_OF_A_JOB = ("num_train_epochs", "max_length", "truncate", "packing", "completion_only_loss")

_RUN: dict[str, dict[str, Any]] = {
    **{name: how for name, how in RUN_OPTIONS.items() if name not in _NOT_OF_A_RUN},
    "eval_steps": {"type": int, "default": 20, "help": "steps between evaluations; there is one at the end, too"},
    "eval_on_start": {**_FLAG, "default": True, "help": "evaluate each adapter before its first step, as step 0"},
    "save_steps": {"type": int, "default": 20, "help": "steps between checkpoints; 0: only when interrupted"},
    "logging_steps": {"type": int, "default": 1, "help": "steps between status lines and transcripts"},
    "max_num_seqs": {"type": int, "default": 32, "help": "samples that are generated at a time"},
    "max_staleness": {
        "type": int,
        "default": 0,
        "help": "steps by which samples are drawn ahead, beside training; 0: none",
    },
}

_ROLLOUTS: dict[str, dict[str, Any]] = {
    "task": {
        "default": "builtin",
        "help": "builtin, reasoning_gym:NAME[,NAME...], or module:function(prompt, completion, **row) -> float",
    },
    "system_prompt": {"help": "system message before each prompt that is one text"},
    "num_generations": {"type": int, "default": 8, "help": "samples of a prompt"},
    "max_prompt_length": {"type": int, "default": 256, "help": "tokens; longer ones are left out"},
    "max_completion_length": {"type": int, "default": 256, "help": "tokens of a sample"},
    "temperature": {"type": float, "default": 1.0, "help": "of samples"},
    "algorithm": {"choices": ALGORITHMS, "default": "grpo", "help": "grpo, rloo or importance_sampling"},
    "loss_type": {
        "choices": LOSS_TYPES, "default": "dapo",
        "help": "dapo: mean over tokens; grpo: over samples, of means over tokens; dr_grpo: sum over a constant",
    },
    "scale_rewards": {
        "choices": SCALES, "help": "what advantages are divided by (default: group; none for rloo and dr_grpo)",
    },
    "beta": {"type": float, "default": 0.0, "help": "of the KL divergence from the base model"},
    "epsilon": {"type": float, "default": 0.2, "help": "clips ratios below 1 - epsilon"},
    "epsilon_high": {"type": float, "default": 0.28, "help": "clips ratios above 1 + epsilon_high"},
    "num_iterations": {"type": int, "default": 1, "help": "updates on the samples of a step"},
    "importance_sampling_cap": {
        "type": float, "default": 2.0, "help": "of the ratio of trainer's and sampler's probabilities; 0: no weights",
    },
    "mask_truncated_completions": {**_FLAG, "default": False, "help": "learn nothing from samples that were cut off"},
    "soft_punish_cache": {
        "type": int, "default": 0, "help": "last tokens of max_completion_length over which rewards fall by up to 1",
    },
    "reward_timeout": {"type": float, "default": 10.0, "help": "seconds for one reward"},
    "num_eval_prompts": {"type": int, "default": 32, "help": "held-out prompts; 0: none"},
    "num_generations_eval": {"type": int, "default": 4, "help": "samples of each held-out prompt"},
}  # fmt: skip

_JOB: dict[str, dict[str, Any]] = {
    **{name: how for name, how in JOB_OPTIONS.items() if name not in _NOT_OF_A_JOB},
    **_ROLLOUTS,
    "dataset": {"help": "prompts of a task module:function: rows with a column prompt; a file or a name of the Hub"},
    "eval_dataset": {"help": "held-out prompts of such a task; as --dataset"},
    "max_steps": {"type": int, "default": 100, "help": "batches of samples that are learned from"},
    "per_device_train_batch_size": {"type": int, "default": 8, "help": "samples of a micro-batch"},
    "gradient_accumulation_steps": {"type": int, "default": 4, "help": "micro-batches of an update"},
    "learning_rate": {"type": float, "default": 2e-4, "help": "the schedule's highest"},
    "lr_scheduler_type": {**JOB_OPTIONS["lr_scheduler_type"], "default": "constant"},
    "seed": {"type": int, "default": 0, "help": "of initialisation, prompts and samples"},
}  # fmt: skip

_TRL = {"learning_rate": "1e-06", "lr_scheduler_type": "linear", "lora_alpha": "32", "epsilon_high": "that of epsilon"}

DECLARED = Declared("train.rl", _RUN, _JOB, "task, samples, adapter and optimizer", _TRL)
"""The options of ``train.rl``."""


def make_parser(description: str) -> argparse.ArgumentParser:
    """Return the command line; an option that is not given is absent from what it returns."""
    return declared.make_parser(DECLARED, description)


def settings(parser: argparse.ArgumentParser, argv: Sequence[str]) -> RolloutSettings:
    """Return what a command line asks for, as ``train.run.options.settings`` does for ``train.sft``.

    Raises:
        ConfigError: for a file that cannot be read, an unknown option in it, or values that cannot work.
    """
    found = make_settings(RolloutSettings, DECLARED, read_command(DECLARED, parser, argv), rollout_config)
    for name, least in (("max_num_seqs", 1), ("max_staleness", 0)):
        if getattr(found, name) < least:
            raise ConfigError(f"{name} is {getattr(found, name)}; give at least {least}")
    for job in found.jobs if found.max_staleness else ():
        if isinstance(job, RolloutConfig) and not job.rollouts.importance_sampling_cap:
            raise ConfigError(
                f"max_staleness is {found.max_staleness} and importance_sampling_cap is 0: nothing corrects for what "
                "older adapters drew; give a cap above 0, or max_staleness 0"
            )
    return found


def rollout_config(v: Mapping[str, Any], given: Collection[str]) -> RolloutConfig:
    """Return the job of all options' values; ``given`` names those that are not defaults.

    Raises:
        ConfigError: if one cannot work.
    """
    if v["task"] == "builtin":
        v = {**v, **{name: value for name, value in builtin.DEFAULTS.items() if name not in given}}
    own = {field.name: v[field.name] for field in dataclasses.fields(RolloutOptions)}
    if own["scale_rewards"] is None:
        plain = own["algorithm"] == "rloo" or own["loss_type"] == "dr_grpo"
        own["scale_rewards"] = "none" if plain else "group"
    rollouts = RolloutOptions(**own)
    if v["max_steps"] < 1:
        raise ConfigError(f"max_steps is {v['max_steps']}; give at least 1")
    if ":" not in rollouts.task and rollouts.task != "builtin":
        raise ConfigError(f"task is {rollouts.task!r}; give builtin, reasoning_gym:NAME, or a reward's module:function")
    own_prompts = rollouts.task != "builtin" and not rollouts.task.startswith("reasoning_gym:")
    if own_prompts != (v["dataset"] is not None):
        raise ConfigError(
            "the task has prompts of its own; leave dataset out"
            if not own_prompts
            else f"the reward {rollouts.task} needs prompts; give a dataset whose rows have a column prompt"
        )
    filled = {name: how.get("default") for name, how in JOB_OPTIONS.items()} | dict(v)
    length = rollouts.max_prompt_length + rollouts.max_completion_length
    updates = v["max_steps"] * rollouts.num_iterations
    base = job_config(filled | {"max_length": length, "max_steps": updates, "eval_strategy": None}, given)
    fields = {field.name: getattr(base, field.name) for field in dataclasses.fields(JobConfig)}
    return RolloutConfig(**fields, rollouts=rollouts, steps=v["max_steps"])
