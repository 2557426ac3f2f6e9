"""Tasks: prompts by their place in a stream, prompts that are held out, and the name of what rewards answers."""

import contextlib
import dataclasses
import hashlib
import json
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from preft_jax.errors import ConfigError
from preft_jax.loading import Model
from train.data.errors import DataError
from train.data.files import open_rows
from train.rollouts import builtin, gym
from train.rollouts.options import RolloutConfig

_GYM = "reasoning_gym:"

_HELD_OUT = 2**29
"""Seeds of held-out questions are so much higher: of one task that many questions are asked before one repeats."""


@dataclasses.dataclass(frozen=True)
class Prompt:
    """One prompt of a task.

    Attributes:
        prompt: text, or chat messages.
        row: what the reward is given besides, by name.
    """

    prompt: Any
    row: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Task:
    """A task.

    Attributes:
        name: for people.
        reward: ``module:function`` of what rewards its answers.
        at: the prompt at a place of the stream, from 0 on; the same for the same seed.
        held_out: prompts that are not in the stream.
        digest: SHA-256 (hex) of what the stream depends on.
    """

    name: str
    reward: str
    at: Callable[[int], Prompt]
    held_out: tuple[Prompt, ...]
    digest: str


def make_task(config: RolloutConfig, model: Model) -> Task:
    """Return the task of a job.

    Raises:
        ConfigError: if there is no such task, or a package is not there.
        DataError: if a dataset is bad.
    """
    options, seed = config.rollouts, config.batches.seed
    if options.task == "builtin":
        task = _builtin(config)
    elif options.task.startswith(_GYM):
        task = _of_gym([name.strip() for name in options.task.removeprefix(_GYM).split(",")], config)
    else:
        task = _of_dataset(config)
    has_template = model.tokenizer is not None and bool(model.tokenizer.chat_template)
    if options.system_prompt is not None and not has_template:
        raise ConfigError("system_prompt needs a chat template, and this model's tokenizer has none; leave it out")
    as_chat = options.system_prompt is not None or (has_template and options.task.startswith(_GYM))

    def rendered(one: Prompt) -> Prompt:
        if not (as_chat and isinstance(one.prompt, str)):
            return one
        system = [] if options.system_prompt is None else [{"role": "system", "content": options.system_prompt}]
        return dataclasses.replace(one, prompt=[*system, {"role": "user", "content": one.prompt}])

    parts = json.dumps([task.digest, options.task, options.system_prompt, as_chat, seed, config.batches.shuffle])
    return dataclasses.replace(
        task,
        at=lambda place: rendered(task.at(place)),
        held_out=tuple(map(rendered, task.held_out)),
        digest=hashlib.sha256(parts.encode()).hexdigest(),
    )


def _builtin(config: RolloutConfig) -> Task:
    seed, count = config.batches.seed, config.rollouts.num_eval_prompts

    def made(place: int, *, held_out: bool) -> Prompt:
        return Prompt(*builtin.prompt(seed, place, held_out=held_out))

    return Task(
        builtin.NAME, f"{builtin.__name__}:reward", lambda place: made(place, held_out=False),
        tuple(made(i, held_out=True) for i in range(count)), builtin.NAME,
    )  # fmt: skip


def _of_gym(names: Sequence[str], config: RolloutConfig) -> Task:
    for name in names:
        gym.dataset(name, config.batches.seed)  # It is told before anything is trained.

    def made(place: int, seed: int) -> Prompt:
        name, index = names[place % len(names)], place // len(names)
        return Prompt(gym.dataset(name, seed)[index]["question"], {"name": name, "seed": seed, "index": index})

    seed = config.batches.seed
    held_out = tuple(made(i, seed + _HELD_OUT) for i in range(config.rollouts.num_eval_prompts))
    return Task(
        f"reasoning_gym: {', '.join(names)}", f"{gym.__name__}:reward", lambda place: made(place, seed), held_out, ""
    )


def _of_dataset(config: RolloutConfig) -> Task:
    assert config.dataset is not None
    prompts = _prompts(config.dataset, config.dataset_train_split, "train", config.dataset_config)
    held_out: list[Prompt] = []
    if config.eval_dataset is not None:
        held_out = _prompts(config.eval_dataset, config.dataset_test_split, "test", config.dataset_config)
    seed, shuffle = config.batches.seed, config.batches.shuffle

    def at(place: int) -> Prompt:
        epoch, index = divmod(place, len(prompts))
        order = np.random.default_rng([seed, epoch]).permutation(len(prompts)) if shuffle else range(len(prompts))
        return prompts[order[index]]

    digest = hashlib.sha256(
        json.dumps([dataclasses.asdict(one) for one in prompts], default=str, sort_keys=True).encode()
    ).hexdigest()
    name = f"{config.rollouts.task} on {len(prompts)} prompts"
    return Task(name, config.rollouts.task, at, tuple(held_out[: config.rollouts.num_eval_prompts]), digest)


def _prompts(dataset: str, split: str | None, default: str, config: str | None) -> list[Prompt]:
    """Return the prompts of a dataset's rows."""
    rows = open_rows(dataset, split=split, default=default, config=config)
    found = []
    with contextlib.closing(rows.numbered) as numbered:
        for number, row in numbered:
            prompt = row.get("prompt")
            if not isinstance(prompt, str | list) or not prompt:
                raise DataError(
                    f"{dataset}, row {number}: it has no prompt; give each row a column prompt, of a text or chat "
                    "messages"
                )
            others = {name: value for name, value in row.items() if name not in ("prompt", "completion")}
            found.append(Prompt(prompt, others))
    if not found:
        raise DataError(f"{dataset} has no rows; give some prompts")
    return found
