"""The options of ``train.sft``, and what it makes of their values."""

import argparse
import dataclasses
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

from preft_jax.adapters.config import KINDS, AdapterConfig
from preft_jax.errors import ConfigError
from preft_jax.models.layer import Remat
from preft_jax.quantize import SCHEMES
from preft_jax.shapes import DTYPES
from train.data.batches import BatchOptions
from train.data.rows import DataOptions
from train.jobs import JobConfig
from train.optimizer import OPTIMIZERS, SCHEDULES, OptimizerConfig
from train.run import declared
from train.run.declared import Asked, Declared, plain_value, read_command
from train.run.reporters import REPORTERS
from train.run.start import OPTIONS as ADAPTER_OPTIONS
from train.trainer import TrainOptions

_FLAG = {"action": argparse.BooleanOptionalAction}

RUN_OPTIONS: dict[str, dict[str, Any]] = {
    "model": {"default": "smollm2-135m", "help": "name, path or Hub id of the base model"},
    "dtype": {"choices": DTYPES, "help": "of the base model (default: float32 on CPU, bfloat16 elsewhere)"},
    "quantization": {"choices": SCHEMES, "default": "none", "help": "of the base model: none or fp8"},
    "mesh": {"help": "devices: fsdp for all, fsdp=N for N (default: one)"},
    "output_dir": {"type": Path, "default": Path("out"), "help": "adapters, metrics and checkpoints"},
    "overwrite_output_dir": {**_FLAG, "default": False, "help": "begin anew where a run has been"},
    "resume": {**_FLAG, "default": False, "help": "go on from the newest checkpoint, with its options"},
    "max_jobs": {"type": int, "default": 0, "help": "of --jobs, trained at a time; others wait (default: all)"},
    "gradient_checkpointing": {
        "choices": get_args(Remat), "default": "none",
        "help": "what is computed again to save memory: none, cheap (all but matrix products) or full (whole layers)",
    },
    "logging_steps": {"type": int, "default": 1, "help": "updates between status lines"},
    "eval_strategy": {
        "choices": ("no", "steps"), "help": "steps: with no --eval-dataset, the dataset's test split is evaluated on",
    },
    "eval_steps": {"type": int, "default": 50, "help": "updates between evaluations; there is one at the end, too"},
    "eval_on_start": {**_FLAG, "default": False, "help": "evaluate each adapter before its first update, as step 0"},
    "eval_generations": {"type": int, "default": 16, "help": "held-out prompts that are answered; 0: none"},
    "save_steps": {"type": int, "default": 100, "help": "updates between checkpoints; 0: only when interrupted"},
    "save_total_limit": {"type": int, "default": 2, "help": "checkpoints that are kept"},
    "report_to": {"default": "", "help": f"{' or '.join(REPORTERS)}, or both with a comma"},
    "publish": {"help": "directory or http(s) address of a server that is to serve the adapter"},
}  # fmt: skip

JOB_OPTIONS: dict[str, dict[str, Any]] = {
    "name": {"default": "adapter", "help": "of the adapter"},
    "dataset": {"help": "JSONL, JSON, CSV, parquet, a folder, or a name of the Hub (default: a small task)"},
    "eval_dataset": {"help": "held out; as --dataset"},
    "dataset_config": {"help": "configuration of a dataset that has several"},
    "dataset_train_split": {"help": "split of a dataset that has several (default: train)"},
    "dataset_test_split": {"help": "split of what is held out (default: test)"},
    "adapter_kind": {"choices": KINDS, "default": "lora", "help": "lora, direft, loreft, prefix or edits"},
    "rank": {"type": int, "default": 16, "help": "of every edit; of a prefix, its positions"},
    "prefix_text": {"help": "what a new prefix begins as (default: a text for any task)"},
    "lora_alpha": {"type": float, "help": "LoRA's scale numerator (default: the rank)"},
    "lora_dropout": {"type": float, "default": 0.0, "help": "on LoRA's input"},
    "use_rslora": {**_FLAG, "default": False, "help": "divide alpha by the square root of the rank"},
    "targets": {"default": "", "help": "LoRA's sites, of q,k,v,o,gate,up,down, or q_proj and so on (default: all)"},
    "layers": {"default": "", "help": "layers that are edited, such as 0,1,2 (default: all)"},
    "positions": {"default": "prompt", "help": "prompt, f7+l7, l64, or all (ordinary LoRA: decoding then needs it)"},
    "alora_invocation_tokens": {"help": "ids of a marker in the prompt; edits begin at its last place"},
    "share_weights": {**_FLAG, "default": True, "help": "ReFT at f7+l7: one set of weights for first and last"},
    "orthonormal": {**_FLAG, "default": True, "help": "DiReFT: keep the rows of R orthonormal"},
    "assistant_turns": {"choices": ("edit", "skip"), "default": "edit", "help": "earlier answers of a chat"},
    "init_from": {"type": Path, "help": "directory of an adapter to start from; it keeps its kind, rank and so on"},
    "num_train_epochs": {"type": float, "default": 3.0, "help": "passes over the data"},
    "max_steps": {"type": int, "default": -1, "help": "updates; overrides num_train_epochs"},
    "per_device_train_batch_size": {"type": int, "default": 8, "help": "rows of a micro-batch on each device"},
    "gradient_accumulation_steps": {"type": int, "default": 1, "help": "micro-batches of an update"},
    "max_length": {"type": int, "default": 1024, "help": "most tokens of an example, or of a packed row"},
    "truncate": {**_FLAG, "default": False, "help": "cut longer examples instead of refusing them"},
    "packing": {**_FLAG, "default": False, "help": "several examples in a row, none of which sees another"},
    "completion_only_loss": {**_FLAG, "default": True, "help": "learn answers only"},
    "shuffle": {**_FLAG, "default": True, "help": "another order each epoch"},
    "seed": {"type": int, "default": 0, "help": "of initialisation, order and dropout"},
    "optim": {"choices": OPTIMIZERS, "default": "adamw", "help": "of optax"},
    "learning_rate": {"type": float, "default": 1e-3, "help": "the schedule's highest"},
    "lr_scheduler_type": {"choices": SCHEDULES, "default": "linear", "help": "after warm-up"},
    "warmup_ratio": {"type": float, "default": 0.03, "help": "part of all updates"},
    "warmup_steps": {"type": int, "default": 0, "help": "overrides warmup_ratio"},
    "weight_decay": {"type": float, "default": 0.0, "help": "decoupled"},
    "adam_beta1": {"type": float, "default": 0.9, "help": "of adamw and lion; momentum of sgd"},
    "adam_beta2": {"type": float, "default": 0.999, "help": "of adamw and lion"},
    "adam_epsilon": {"type": float, "default": 1e-8, "help": "of adamw"},
    "max_grad_norm": {"type": float, "default": 1.0, "help": "0: no clipping"},
    "lora_plus_ratio": {"type": float, "default": 1.0, "help": "LoRA+: learning rate of B over that of A"},
}  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """A run: what all jobs share, and the jobs.

    Attributes:
        given: every option's value as it was given or inherited, by name; ``jobs`` has those of each job.
        changes: of a resumed run, what is other than when it was begun, for people.
        notes: what of a command of TRL is other here, for people.
        run: what its checkpoints are known by.
    """

    model: str
    dtype: str | None
    output_dir: Path
    overwrite_output_dir: bool
    resume: bool
    logging_steps: int
    eval_steps: int
    eval_on_start: bool
    save_steps: int
    save_total_limit: int
    report_to: tuple[str, ...]
    publish: str | None
    train: TrainOptions
    jobs: tuple[JobConfig, ...]
    given: Mapping[str, Any]
    changes: tuple[str, ...]
    notes: tuple[str, ...]
    run: str
    mesh: str | None = None
    eval_generations: int = 0
    quantization: str = "none"


DECLARED = Declared("train.sft", RUN_OPTIONS, JOB_OPTIONS, "adapter, data and optimizer")
"""The options of ``train.sft``."""

_LEAST = {
    "logging_steps": 1, "eval_steps": 0, "eval_generations": 0, "save_steps": 0, "save_total_limit": 1, "max_jobs": 0,
}  # fmt: skip


def make_parser(description: str, kind: type[argparse.ArgumentParser] = argparse.ArgumentParser) -> Any:
    """Return the command line, a parser of this kind; an option that is not given is absent from what it returns."""
    return declared.make_parser(DECLARED, description, kind)


def settings(parser: argparse.ArgumentParser, argv: Sequence[str]) -> Settings:
    """Return what a command line asks for, with its files and, if it resumes, the options of the run so far.

    Raises:
        ConfigError: for a file that cannot be read, an unknown option in it, or values that cannot work.
    """
    return make_settings(Settings, DECLARED, read_command(DECLARED, parser, argv), job_config)


def make_settings[SettingsT: Settings](
    kind: type[SettingsT],
    options: Declared,
    asked: Asked,
    make_job: Callable[[Mapping[str, Any], Collection[str]], JobConfig],
) -> SettingsT:
    """Return the settings that were asked for.

    Args:
        kind: of the settings; its fields of a run's options have their names.
        options: options of the program.
        asked: those that were given.
        make_job: makes a job of all options' values, given the names of those that are not defaults.

    Raises:
        ConfigError: for values that cannot work.
    """
    given, jobs = asked.given, asked.jobs
    v = options.defaults | given
    for name, least in _LEAST.items():
        if name in v and v[name] < least:
            raise ConfigError(f"{name} is {v[name]}; give at least {least}")
    if jobs is None:
        own = [make_job(v, given)]
    else:
        own = [_named(v | job, given.keys() | job.keys(), make_job) for job in jobs]
    names = [job.name for job in own]
    repeated = next((name for name in names if names.count(name) > 1), None)
    if repeated is not None:
        raise ConfigError(f"two jobs have the name {repeated!r}; give each its own")
    kept = {name: plain_value(value) for name, value in given.items() if name not in ("resume", "overwrite_output_dir")}
    if jobs is not None:
        kept["jobs"] = [{name: plain_value(value) for name, value in job.items()} for job in jobs]
    shared = {field.name: v[field.name] for field in dataclasses.fields(kind) if field.name in options.run}
    shared["report_to"] = tuple(part.strip() for part in v["report_to"].split(",") if part.strip() not in ("", "none"))
    return kind(
        **shared, jobs=tuple(own), given=kept, changes=asked.changes, notes=asked.notes, run=asked.run,
        train=TrainOptions(gradient_checkpointing=v["gradient_checkpointing"], max_jobs=v["max_jobs"]),
    )  # fmt: skip


def _named(
    v: Mapping[str, Any],
    given: Collection[str],
    make_job: Callable[[Mapping[str, Any], Collection[str]], JobConfig],
) -> JobConfig:
    """Return a job; what is wrong in it names it."""
    try:
        return make_job(v, given)
    except ConfigError as error:
        raise ConfigError(f"job {v['name']!r}: {error}") from error


def _targets(names: Sequence[str]) -> tuple[str, ...]:
    """Return sites; PEFT's names of linears are allowed."""
    return () if list(names) == ["all-linear"] else tuple(name.removesuffix("_proj") for name in names)


def job_config(v: Mapping[str, Any], given: Collection[str]) -> JobConfig:
    """Return the job of all options' values; ``given`` names those that are not defaults.

    Raises:
        ConfigError: if one cannot work.
    """
    eval_dataset = v["eval_dataset"]
    if v["dataset"] is None and eval_dataset is not None:
        raise ConfigError("eval_dataset is given without dataset; give both, or neither for the built-in task")
    if v["max_length"] < 2:
        raise ConfigError(f"max_length is {v['max_length']}; give at least 2")
    test_split = v["dataset_test_split"]
    if v["eval_strategy"] == "no":
        eval_dataset = None
    elif v["eval_strategy"] == "steps" and eval_dataset is None:
        # Of the dataset that is trained on, another part is evaluated on: so there must be one.
        eval_dataset, test_split = v["dataset"], test_split or "test"
    fields = _adapter_fields(v)
    if v["init_from"] is None:
        adapter, asked = AdapterConfig(**fields), {}
        if adapter.kind != "lora" and adapter.dropout:
            raise ConfigError(f"lora_dropout is LoRA's; this adapter is {adapter.kind!r}")
    else:
        adapter = AdapterConfig()
        asked = {field: value for field, value in fields.items() if ADAPTER_OPTIONS[field] in given}
    return JobConfig(
        name=v["name"], adapter=adapter, init_from=v["init_from"], asked=asked, prefix_text=v["prefix_text"],
        dataset=v["dataset"], eval_dataset=eval_dataset,
        dataset_config=v["dataset_config"], dataset_train_split=v["dataset_train_split"], dataset_test_split=test_split,
        optimizer=OptimizerConfig(**{f.name: v[f.name] for f in dataclasses.fields(OptimizerConfig)}),
        data=DataOptions(
            max_length=v["max_length"], completion_only_loss=v["completion_only_loss"], truncate=v["truncate"]
        ),
        batches=BatchOptions(
            batch_size=v["per_device_train_batch_size"], max_length=v["max_length"], packing=v["packing"],
            shuffle=v["shuffle"], seed=v["seed"],
        ),
        num_train_epochs=v["num_train_epochs"], max_steps=v["max_steps"],
        gradient_accumulation_steps=v["gradient_accumulation_steps"],
    )  # fmt: skip


def _adapter_fields(v: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values that are ``AdapterConfig``'s, by its names."""

    def listed(name: str) -> tuple[str, ...]:
        return tuple((v[name] or "").replace(",", " ").split())

    def numbers(name: str) -> tuple[int, ...] | None:
        try:
            return tuple(map(int, listed(name))) or None
        except ValueError as error:
            raise ConfigError(f"{name} is {v[name]!r}; give numbers separated by commas") from error

    fields = {field: v[option] for field, option in ADAPTER_OPTIONS.items()}
    return (
        fields
        | {"targets": _targets(listed("targets")), "layers": numbers("layers")}
        | {"alora_invocation_tokens": numbers("alora_invocation_tokens")}
    )
