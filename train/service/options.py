"""What a service of fine-tuning allows, and what the hyperparameters of a job come to.

A job's hyperparameters are OpenAI's three, options of ``train.sft`` by their names there, and how often a job is
evaluated and keeps a checkpoint:

    {"n_epochs": 2, "adapter_kind": "loreft", "rank": 8, "eval_steps": 50}

What is wrong with a job is told in these names, where ``train.sft`` tells it in its flags (``in_fields``).
"""

import argparse
import dataclasses
import math
import re
from collections.abc import Mapping
from typing import Any, NamedTuple, NoReturn

from preft_jax.adapters.config import adapter_shapes
from preft_jax.config import ModelConfig
from preft_jax.errors import ConfigError, reject_unknown, shown
from serve.jobs import JobSpec
from train.jobs import JobConfig
from train.run.declared import read_mapping
from train.run.options import JOB_OPTIONS, RUN_OPTIONS, job_config, make_parser

OPENAI = {
    "n_epochs": "num_train_epochs", "batch_size": "per_device_train_batch_size",
    "learning_rate_multiplier": "learning_rate",
}  # fmt: skip
"""OpenAI's name -> the option of ``train.sft``. ``"auto"`` is the option's default, which the multiplier multiplies."""

_RATE: float = JOB_OPTIONS["learning_rate"]["default"]

_NOT_ASKED = ("name", "dataset", "eval_dataset", "dataset_config", "dataset_train_split", "dataset_test_split",
              "init_from", "seed", "eval_strategy")  # fmt: skip
"""Options that a job's other fields say, or that name files of the machine."""

_STEPS = {"eval_steps": 50, "save_steps": 0, "save_total_limit": 3}
"""Options of a run that a job has too, and their defaults here."""

ALLOWED = sorted({*OPENAI, *JOB_OPTIONS, *_STEPS} - set(_NOT_ASKED))
"""Names of hyperparameters."""

_FLAG = re.compile(r"--([a-z][a-z0-9_-]*[a-z0-9])")

_LONGEST_SUFFIX = 64


@dataclasses.dataclass(frozen=True, kw_only=True)
class ServiceOptions:
    """What a service allows. All of it is per server, or per job where it says so.

    Attributes:
        max_jobs: that are trained at a time; others wait.
        max_open_jobs: that have not ended, in all.
        max_open_jobs_per_owner: the same of one owner.
        max_rows: of a job's training file, and of its validation file.
        max_tokens: of a job's examples.
        max_steps: updates of a job.
        max_epochs: passes over a job's data.
        max_batch_size: rows of a job's micro-batch.
        max_length: tokens of a job's longest example or packed row; None: as many as the model has positions.
        checkpoint_steps: updates after which a job's state is written to disk: a crash costs a job no more than these.
        checkpoint_seconds: the same in seconds, as long as an update takes about as long as the one before.
    """

    max_jobs: int = 4
    max_open_jobs: int = 128
    max_open_jobs_per_owner: int = 16
    max_rows: int = 100_000
    max_tokens: int = 50_000_000
    max_steps: int = 100_000
    max_epochs: float = 50.0
    max_batch_size: int = 64
    max_length: int | None = None
    checkpoint_steps: int = 50
    checkpoint_seconds: float = 60.0

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if value is not None and not 1 <= value < math.inf:
                raise ConfigError(f"{field.name} is {shown(value)}; give at least 1")


class Plan(NamedTuple):
    """What a job's hyperparameters come to.

    Attributes:
        config: of training.
        eval_steps: updates between evaluations on the validation file; 0: at the end only.
        save_steps: updates between checkpoints that are served; 0: none is.
        save_total_limit: checkpoints that stay, the latest ones.
        hyperparameters: as they were given, with numbers in place of ``"auto"``.
    """

    config: JobConfig
    eval_steps: int
    save_steps: int
    save_total_limit: int
    hyperparameters: dict[str, Any]


def make_plan(name: str, spec: JobSpec, model: ModelConfig, options: ServiceOptions) -> Plan:
    """Return what a job is to do.

    Args:
        name: of the job.
        spec: what is asked for, with a seed.
        model: of the base model.
        options: what is allowed.

    Raises:
        ConfigError: if a hyperparameter is unknown, has a value that cannot work, or is out of bounds.
    """
    try:
        return _plan(name, spec, model, options)
    except ConfigError as error:
        raise ConfigError(in_fields(str(error))) from error


def _plan(name: str, spec: JobSpec, model: ModelConfig, options: ServiceOptions) -> Plan:
    asked = {str(name): value for name, value in spec.hyperparameters.items() if value is not None}
    reject_unknown(asked, ALLOWED, what="hyperparameter", error=ConfigError)
    hyperparameters, given = _resolved(asked)
    longest = min(options.max_length or model.max_position_embeddings, model.max_position_embeddings)
    defaults = {"max_length": min(JOB_OPTIONS["max_length"]["default"], longest), **_STEPS}
    allowed = JOB_OPTIONS | {name: RUN_OPTIONS[name] for name in _STEPS}
    read = read_mapping(make_parser("", _Parser), defaults | given, "hyperparameters", allowed)
    steps = {name: _number(name, read.pop(name), int(name == "save_total_limit")) for name in _STEPS}
    own = {**read, "name": name, "seed": spec.seed, "dataset": str(spec.training_path)}
    config = job_config({key: how.get("default") for key, how in allowed.items()} | {"eval_strategy": None} | own, own)
    _check_bounds(config, options, min(longest, model.max_position_embeddings - config.adapter.prefix_length))
    adapter_shapes(config.adapter, model)  # It says why an adapter does not fit the model.
    return Plan(config, **steps, hyperparameters=hyperparameters)


def in_fields(message: str) -> str:
    """Return what ``train.sft`` says of its options as who sends jobs reads it: their fields in place of flags."""

    def field(flag: re.Match[str]) -> str:
        name = flag[1].replace("-", "_")
        return f"hyperparameters.{name}" if name in ALLOWED else flag[0]

    return _FLAG.sub(field, message)


def check_spec(spec: JobSpec) -> None:
    """Raise ``ConfigError`` for a suffix, a seed or metadata that are not allowed."""
    suffix = spec.suffix
    if suffix is not None and (
        not isinstance(suffix, str)
        or not 1 <= len(suffix) <= _LONGEST_SUFFIX
        or not all(c.isascii() and (c.isalnum() or c in "-_.") for c in suffix)
    ):
        raise ConfigError(
            f"suffix is {shown(suffix)}; give 1 to {_LONGEST_SUFFIX} letters, digits, hyphens, dots and underscores"
        )
    if spec.seed is not None and (type(spec.seed) is not int or not 0 <= spec.seed < 2**32):
        raise ConfigError(f"seed is {shown(spec.seed)}; give an integer from 0 to {2**32 - 1}")
    if type(spec.priority) is not int:
        raise ConfigError(f"priority is {shown(spec.priority)}; give an integer")
    if len(spec.metadata) > 16:
        raise ConfigError(f"metadata has {len(spec.metadata)} pairs; give up to 16")
    for key, value in spec.metadata.items():
        if not (isinstance(key, str) and isinstance(value, str) and len(key) <= 64 and len(value) <= 512):
            raise ConfigError(
                f"metadata has the pair {shown(key)}: {shown(value)}; give texts, up to 64 characters as a key and up "
                "to 512 as a value"
            )


def check_steps(config: JobConfig, total_steps: int, options: ServiceOptions) -> None:
    """Raise ``ConfigError`` if a job has more updates than are allowed."""
    if total_steps > options.max_steps:
        raise ConfigError(
            f"the job has {total_steps} updates; allowed: up to {options.max_steps}; lower n_epochs or max_steps, or "
            f"raise batch_size, which is {config.batches.batch_size}"
        )


def _resolved(asked: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return hyperparameters with numbers in place of ``"auto"``, and options of ``train.sft`` with their values."""
    hyperparameters, given = dict(asked), {name: value for name, value in asked.items() if name not in OPENAI}
    for name, option in OPENAI.items():
        value = asked.get(name, "auto")
        unit = _RATE if option == "learning_rate" else 1
        if value == "auto":
            value = given.get(option, JOB_OPTIONS[option]["default"])
            if not isinstance(value, bool) and isinstance(value, int | float):
                value = value / unit if name == "learning_rate_multiplier" else value
                hyperparameters[name] = int(value) if float(value).is_integer() else value
            continue
        if option in given:
            raise ConfigError(f"{name} and {option} are given, which say the same; leave one out")
        least = int(name == "batch_size")
        if _number(name, value, least, whole=name == "batch_size") == 0:
            raise ConfigError(f"{name} is 0; give a number above 0, or 'auto'")
        given[option] = value * unit
    return hyperparameters, given


def _number(name: str, value: Any, least: int, *, whole: bool = False) -> Any:
    kinds = (int,) if whole else (int, float)
    if isinstance(value, bool) or not isinstance(value, kinds) or not least <= value < math.inf:
        raise ConfigError(f"{name} is {shown(value)}; give {'an integer' if whole else 'a number'} of at least {least}")
    return value


def _check_bounds(config: JobConfig, options: ServiceOptions, longest: int) -> None:
    if config.max_steps <= 0 and config.num_train_epochs > options.max_epochs:
        raise ConfigError(f"n_epochs is {config.num_train_epochs:g}; allowed: up to {options.max_epochs:g}")
    check_steps(config, max(0, config.max_steps), options)
    rows = config.batches.batch_size * config.gradient_accumulation_steps
    for name, value in (("batch_size", config.batches.batch_size), ("the rows of an update", rows)):
        most = options.max_batch_size * (1 if name == "batch_size" else 64)
        if value > most:
            raise ConfigError(f"{name} is {value}; allowed: up to {most}")
    if config.batches.max_length > longest:
        raise ConfigError(f"max_length is {config.batches.max_length}; allowed: up to {longest} with this model")


class _Parser(argparse.ArgumentParser):
    """``train.sft``'s command line, whose errors are raised and not printed."""

    def error(self, message: str) -> NoReturn:
        """Raise a ``ConfigError``."""
        named = re.match(r"argument --([\w-]+)[^:]*: (.*)", message, re.DOTALL)
        raise ConfigError(f"hyperparameter {named[1].replace('-', '_')}: {named[2]}" if named else message)
