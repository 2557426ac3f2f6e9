"""Fine-tuning for the programs: the service that runs jobs, found by name, and jobs that the operator gives at start.

jobs:
- {name: lamps, training_file: lamps.jsonl, hyperparameters: {n_epochs: 3, rank: 16}}
- {name: tickets, training_file: tickets.jsonl, validation_file: held-out.jsonl, suffix: helpdesk, priority: 1}
"""

import importlib
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import yaml

from preft_jax.device.memory import Budget
from preft_jax.errors import ConfigError, reject_unknown, shown
from preft_jax.loading import Model
from serve.engine.background import Work
from serve.jobs import FineTuning, JobRecord, JobSpec
from serve.store.host import AdapterStore

GIVEN = "operator:"
"""Begins what stands for the training file of a job that the operator gave; its name follows. No upload's id does."""

_FIELDS = (
    "name", "training_file", "validation_file", "suffix", "seed", "hyperparameters", "metadata", "priority",
)  # fmt: skip
_NAME = re.compile(r"[A-Za-z0-9._-]{1,64}")


class TrainingWork(Work, Protocol):
    """Training as background work; ``memory`` is the budget of which it leases what it holds on the device."""

    memory: Budget | None


class Service(FineTuning, Protocol):
    """What runs jobs in the process of an engine.

    Attributes:
        training: the engine's background work.
        wake: is called when there is such work again.
    """

    training: TrainingWork
    wake: Callable[[], object]


def make_service(
    model: Model, store: AdapterStore, directory: Path, *, name: str, max_jobs: int, max_open_jobs: int
) -> Service:
    """Return the service of ``train.service``, which is loaded only where there is fine-tuning.

    Args:
        model: the base model, as the engine has it.
        store: through which finished adapters are served.
        directory: of the jobs; those in it go on.
        name: of the base model.
        max_jobs: that are trained at a time.
        max_open_jobs: of one owner that have not ended.

    Raises:
        ConfigError: if the directory or a limit cannot be used.
    """
    service = importlib.import_module("train.service.service")
    allowed = importlib.import_module("train.service.options").ServiceOptions(
        max_jobs=max_jobs, max_open_jobs_per_owner=max_open_jobs
    )
    return service.Service(model, store, directory, name=name, options=allowed)


def read_jobs(path: Path) -> dict[str, JobSpec]:
    """Read a file of jobs; paths in it are relative to its directory.

    Returns:
        The jobs by name.

    Raises:
        ConfigError: if it cannot be read, has other fields, or names a file that is not there.
    """
    try:
        read = yaml.safe_load(path.read_text("utf-8"))
    except (OSError, ValueError, yaml.YAMLError, RecursionError) as error:
        raise ConfigError(f"--finetune {path} cannot be read: {error}") from None
    jobs = read.get("jobs") if isinstance(read, dict) and set(read) == {"jobs"} else None
    if not isinstance(jobs, list) or not jobs:
        raise ConfigError(f"--finetune {path} holds {shown(read)}; give 'jobs:' with a list of jobs")
    found: dict[str, JobSpec] = {}
    for number, job in enumerate(jobs, 1):
        where = f"--finetune {path}, job {number}"
        if not isinstance(job, dict):
            raise ConfigError(f"{where} is {shown(job)}; give a mapping with name and training_file")
        name, spec = _read_job(job, path.parent, where)
        if name in found:
            raise ConfigError(f"{where} has the name {name!r}, which another has; give each its own")
        found[name] = spec
    return found


def start_jobs(service: FineTuning, jobs: Mapping[str, JobSpec]) -> list[tuple[str, JobRecord, bool]]:
    """Create the jobs that were not created at an earlier start, whatever became of them.

    Returns:
        Of each job its name, its record, and whether it is new.

    Raises:
        ConfigError, LimitError: if one cannot be created; it says which.
    """
    known = {record.spec.training_file: record for record in service.list() if record.owner is None}
    found = []
    for name, spec in jobs.items():
        record = known.get(spec.training_file)
        if record is None:
            try:
                found.append((name, service.create(spec, owner=None), True))
            except ConfigError as error:
                raise ConfigError(f"the fine-tuning job {name!r}: {error}") from None
        else:
            found.append((name, record, False))
    return found


def _read_job(job: Mapping[Any, Any], folder: Path, where: str) -> tuple[str, JobSpec]:
    reject_unknown(map(str, job), _FIELDS, what=f"field of {where}:", error=ConfigError)
    for field, kinds, wanted in (
        ("name", str, "a text"),
        ("training_file", str, "a path"),
        ("validation_file", str | None, "a path"),
        ("suffix", str | None, "a text"),
        ("seed", int | None, "a whole number"),
        ("priority", int | None, "a whole number"),
        ("hyperparameters", dict | None, "a mapping"),
        ("metadata", dict | None, "a mapping of texts"),
    ):
        value = job.get(field)
        if not isinstance(value, kinds) or isinstance(value, bool):
            raise ConfigError(f"{where}: {field} is {shown(value)}; give {wanted}")
    name = job["name"]
    if not _NAME.fullmatch(name):
        raise ConfigError(f"{where}: name is {shown(name)}; give 1 to 64 letters, digits and . _ -")
    training, validation = (
        _path(job.get(field), folder, where, field) for field in ("training_file", "validation_file")
    )
    assert training is not None
    return name, JobSpec(
        training_file=GIVEN + name,
        training_path=training,
        validation_file=None if validation is None else f"{GIVEN}{name} (validation)",
        validation_path=validation,
        suffix=job.get("suffix") or name,
        seed=job.get("seed"),
        hyperparameters=job.get("hyperparameters") or {},
        metadata=job.get("metadata") or {},
        priority=job.get("priority") or 0,
    )


def _path(given: str | None, folder: Path, where: str, field: str) -> Path | None:
    if given is None:
        return None
    path = (folder / given).resolve()
    if not path.is_file():
        raise ConfigError(f"{where}: {field} is {shown(given)}, and there is no file {path}")
    return path
