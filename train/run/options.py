"""``train.sft``'s options: the command line, a YAML file under it, and the jobs of ``--jobs``."""

import argparse
import dataclasses
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

import yaml

from preft_jax.adapters.config import KINDS, AdapterConfig
from preft_jax.errors import ConfigError, reject_unknown
from preft_jax.models.layer import Remat
from preft_jax.shapes import DTYPES
from train.data.batches import BatchOptions
from train.data.rows import DataOptions
from train.jobs import JobConfig
from train.optimizer import OPTIMIZERS, SCHEDULES, OptimizerConfig
from train.run.kept import OPTIONS_FILE, new_run, read_options
from train.run.reporters import REPORTERS
from train.run.start import OPTIONS as ADAPTER_OPTIONS
from train.run.trl import ALIASES, Translation, defaults_note, grouped, knows, takes_flag, translate
from train.trainer import TrainOptions

_FLAG = {"action": argparse.BooleanOptionalAction}

RUN_OPTIONS: dict[str, dict[str, Any]] = {
    "model": {"default": "smollm2-135m", "help": "name, path or Hub id of the base model"},
    "dtype": {"choices": DTYPES, "help": "of the base model (default: float32 on CPU, bfloat16 elsewhere)"},
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
    "adapter_kind": {"choices": KINDS, "default": "lora", "help": "lora, direft, loreft or edits"},
    "rank": {"type": int, "default": 16, "help": "of every edit"},
    "lora_alpha": {"type": float, "help": "LoRA's scale numerator (default: the rank)"},
    "lora_dropout": {"type": float, "default": 0.0, "help": "on LoRA's input"},
    "use_rslora": {**_FLAG, "default": False, "help": "divide alpha by the square root of the rank"},
    "targets": {"default": "", "help": "LoRA's sites, of q,k,v,o,gate,up,down, or q_proj and so on (default: all)"},
    "layers": {"default": "", "help": "layers that are edited, such as 0,1,2 (default: all)"},
    "positions": {"default": "prompt", "help": "prompt, f7+l7, or all (ordinary LoRA: decoding then needs it)"},
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
    mesh: str | None
    output_dir: Path
    overwrite_output_dir: bool
    resume: bool
    logging_steps: int
    eval_steps: int
    eval_on_start: bool
    eval_generations: int
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


def make_parser(description: str, kind: type[argparse.ArgumentParser] = argparse.ArgumentParser) -> Any:
    """Return the command line, a parser of this kind; an option that is not given is absent from what it returns."""
    parser = kind(
        prog="python -m train.sft", description=description, formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS, allow_abbrev=False,
    )  # fmt: skip
    parser.add_argument("--config", type=Path, help="YAML of options; the command line wins")
    parser.add_argument("--jobs", type=Path, help="YAML: a list of jobs, each with a name and options of its own")
    for title, options in (
        ("run", RUN_OPTIONS),
        ("adapter, data and optimizer (each job may have its own)", JOB_OPTIONS),
    ):
        group = parser.add_argument_group(title)
        for name, how in options.items():
            default = how.get("default")
            text = how["help"] + (f" (default: {default})" if default not in (None, "") else "")
            others = [f"--{alias.replace('_', '-')}" for alias, of in ALIASES.items() if of == name]
            keywords = {key: value for key, value in how.items() if key not in ("default", "help")}
            group.add_argument(
                f"--{name.replace('_', '-')}", *others, dest=name, help=text.replace("%", "%%"), **keywords
            )
    return parser


def settings(parser: argparse.ArgumentParser, argv: Sequence[str]) -> Settings:
    """Return what a command line asks for, with its files and, if it resumes, the options of the run so far.

    Raises:
        ConfigError: for a file that cannot be read, an unknown option in it, or values that cannot work.
    """
    try:
        translated = [translate(grouped(argv), RUN_OPTIONS | JOB_OPTIONS)]
    except ConfigError as error:
        parser.error(str(error))
    line = vars(parser.parse_args(translated[0].arguments))
    config = line.pop("config", None)
    jobs_file = line.pop("jobs", None)
    given = (read_mapping(parser, _mapping(config), str(config), told=translated) if config else {}) | line
    jobs = None if jobs_file is None else _jobs(parser, jobs_file)
    changes: tuple[str, ...] = ()
    run = new_run()
    if given.get("resume"):
        saved, run, said = read_options(given.get("output_dir", RUN_OPTIONS["output_dir"]["default"]))
        old_jobs = saved.pop("jobs", None)
        old = read_mapping(parser, saved, OPTIONS_FILE)
        if old_jobs is not None:
            old_jobs = [read_mapping(parser, job, OPTIONS_FILE, JOB_OPTIONS) for job in old_jobs]
        given, jobs = old | given, old_jobs if jobs is None else jobs
        changes = (*said, *_changes(old, old_jobs, given, jobs))
    return _settings(given, jobs, changes, tuple(_notes(translated, given)), run)


def _notes(translated: Sequence[Translation], given: Collection[str]) -> Iterator[str]:
    unneeded = dict.fromkeys(name for one in translated for name in one.unneeded)
    if unneeded:
        yield f"options of TRL that change nothing here: {', '.join(unneeded)}"
    if any(one.marked for one in translated):
        note = defaults_note(given, {name: how.get("default") for name, how in (RUN_OPTIONS | JOB_OPTIONS).items()})
        if note:
            yield note


def _changes(
    old: Mapping[str, Any], old_jobs: Sequence[Mapping[str, Any]] | None,
    new: Mapping[str, Any], new_jobs: Sequence[Mapping[str, Any]] | None,
) -> Iterator[str]:  # fmt: skip
    """Yield what is other in a resumed run than when it was begun: first what its jobs share, then each job's own."""
    for name, text in _different(old, new):
        if new_jobs is None or name in RUN_OPTIONS or any(name not in job for job in new_jobs):
            yield text
    if new_jobs is None:
        return
    before = {job["name"]: job for job in old_jobs or [{"name": old.get("name", JOB_OPTIONS["name"]["default"])}]}
    for job in new_jobs:
        was = before.pop(job["name"], None)
        if was is None:
            yield f"{job['name']}: a new job"
        else:
            own = was.keys() | job.keys()
            yield from (
                f"{job['name']}: {text}" for name, text in _different({**old, **was}, {**new, **job}) if name in own
            )
    yield from (f"{name}: not trained any further" for name in before)


def _different(old: Mapping[str, Any], new: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield options that differ, and how; what was not given has its default."""
    for name, how in (RUN_OPTIONS | JOB_OPTIONS).items():
        was, now = (_plain(given.get(name, how.get("default"))) for given in (old, new))
        if was != now and name not in ("resume", "overwrite_output_dir", "output_dir"):
            yield name, f"{name}: {now} instead of {was}"


def _mapping(path: Path) -> dict[str, Any]:
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"{path} cannot be read as YAML: {error}") from error
    if not isinstance(found, dict):
        raise ConfigError(f"{path} holds a {type(found).__name__}; give options as NAME: VALUE")
    return found


def _jobs(parser: argparse.ArgumentParser, path: Path) -> list[dict[str, Any]]:
    content = _mapping(path)
    reject_unknown(map(str, content), ("jobs",), what=f"field of {path}:", error=ConfigError)
    found = content.get("jobs")
    if not isinstance(found, list) or not found or not all(isinstance(job, dict) for job in found):
        raise ConfigError(f"{path} has no list of jobs; give 'jobs:' and under it one '- name: ...' for each")
    for number, job in enumerate(found, 1):
        if job.get("name") is None:
            raise ConfigError(f"{path}: job {number} has no name; give each its own")
    return [read_mapping(parser, job, f"{path}, job {job['name']!r}", JOB_OPTIONS) for job in found]


def read_mapping(
    parser: argparse.ArgumentParser,
    values: Mapping[str, Any],
    where: str,
    allowed: Mapping[str, Any] = RUN_OPTIONS | JOB_OPTIONS,
    *,
    told: list[Translation] | None = None,
) -> dict[str, Any]:
    """Return a file's options as the command line would have them; ``told`` gets how they were translated.

    Raises:
        ConfigError: for one that is not ``allowed``, or has a value of another type.
    """
    pairs: list[tuple[str, list[str]]] = []
    for key, value in values.items():
        name = str(key).replace("-", "_")
        own = ALIASES.get(name, name)
        if not (knows(own) and told is not None):
            reject_unknown([own], allowed, what=f"option in {where}:", error=ConfigError)
        if value is None:
            continue
        is_flag = own not in allowed or allowed[own].get("action") is not None
        if isinstance(value, bool) and not is_flag and not takes_flag(own, value):
            raise ConfigError(f"{where}: {own} is {value}; it takes a value")
        pairs.append((name, [",".join(map(str, value)) if isinstance(value, list) else str(value)]))
    try:
        found = translate(pairs, allowed)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from error
    if told is not None:
        told.append(found)
    try:
        return vars(parser.parse_args(found.arguments))
    except SystemExit as error:
        raise ConfigError(f"{where} has a value that is not allowed; see above") from error


def _plain(value: Any) -> Any:
    return str(value) if isinstance(value, Path) else value


def _settings(
    given: Mapping[str, Any],
    jobs: list[dict[str, Any]] | None,
    changes: tuple[str, ...],
    notes: tuple[str, ...],
    run: str,
) -> Settings:
    v: dict[str, Any] = {name: how.get("default") for name, how in (RUN_OPTIONS | JOB_OPTIONS).items()} | dict(given)
    for name, least in (("logging_steps", 1), ("eval_steps", 0), ("eval_generations", 0), ("save_steps", 0),
                        ("save_total_limit", 1), ("max_jobs", 0)):  # fmt: skip
        if v[name] < least:
            raise ConfigError(f"{name} is {v[name]}; give at least {least}")
    own = [job_config(v, given)] if jobs is None else [_named(v | job, given.keys() | job.keys()) for job in jobs]
    names = [job.name for job in own]
    repeated = next((name for name in names if names.count(name) > 1), None)
    if repeated is not None:
        raise ConfigError(f"two jobs have the name {repeated!r}; give each its own")
    kept = {name: _plain(value) for name, value in given.items() if name not in ("resume", "overwrite_output_dir")}
    if jobs is not None:
        kept["jobs"] = [{name: _plain(value) for name, value in job.items()} for job in jobs]
    shared = {field.name: v[field.name] for field in dataclasses.fields(Settings) if field.name in RUN_OPTIONS}
    shared["report_to"] = tuple(part.strip() for part in v["report_to"].split(",") if part.strip() not in ("", "none"))
    return Settings(
        **shared, jobs=tuple(own), given=kept, changes=changes, notes=notes, run=run,
        train=TrainOptions(gradient_checkpointing=v["gradient_checkpointing"], max_jobs=v["max_jobs"]),
    )  # fmt: skip


def _named(v: Mapping[str, Any], given: Collection[str]) -> JobConfig:
    """Return ``job_config``; what is wrong in it names it."""
    try:
        return job_config(v, given)
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
        name=v["name"], adapter=adapter, init_from=v["init_from"], asked=asked,
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
        return tuple(part.strip() for part in v[name].split(",") if part.strip())

    try:
        layers = tuple(int(layer) for layer in listed("layers")) or None
    except ValueError as error:
        raise ConfigError(f"layers is {v['layers']!r}; give numbers separated by commas") from error
    fields = {field: v[option] for field, option in ADAPTER_OPTIONS.items()}
    return fields | {"targets": _targets(listed("targets")), "layers": layers}
