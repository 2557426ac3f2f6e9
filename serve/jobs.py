"""Fine-tuning jobs as a server sees them: what is asked for, how it stands, and who runs it.

The names are those of OpenAI's ``/v1/fine_tuning/jobs``. ``train.service`` runs jobs; this file knows no training.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

Status = Literal["validating_files", "queued", "running", "paused", "succeeded", "failed", "cancelled"]

OPEN: frozenset[Status] = frozenset({"validating_files", "queued", "running", "paused"})
"""Statuses of jobs that may still change."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class JobSpec:
    """What a job is asked to do.

    Attributes:
        training_file: id of the uploaded file; for those who asked.
        training_path: where its rows are. It may go once the job has begun.
        validation_file: id of the file with held-out rows, or None.
        validation_path: where they are.
        uploaded: whether these files are uploads, which nobody changes: the job then needs no copies of its own.
        suffix: part of the adapter's name, or None.
        seed: of the first adapter and of the order of rows; None: chosen, and then told.
        hyperparameters: by name: OpenAI's ``n_epochs``, ``batch_size`` and ``learning_rate_multiplier`` (numbers, or
            ``"auto"``), and options of ``train.sft`` by their names there, such as ``adapter_kind`` and ``rank``.
        metadata: of the user, up to 16 pairs of texts.
        priority: of jobs that wait, those with a higher one begin first.
    """

    training_file: str
    training_path: Path
    validation_file: str | None = None
    validation_path: Path | None = None
    uploaded: bool = False
    suffix: str | None = None
    seed: int | None = None
    hyperparameters: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    metadata: Mapping[str, str] = dataclasses.field(default_factory=dict)
    priority: int = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class JobRecord:
    """A job and how it stands.

    Attributes:
        id: ``ftjob-`` and 24 letters and digits.
        owner: tenant whose key asked for it; None: everybody's.
        model: name of the base model.
        spec: what was asked for, with the seed and the hyperparameters that were chosen.
        status: see ``Status``.
        created_at: seconds since 1970, as the others.
        finished_at: when it succeeded, failed or was cancelled.
        fine_tuned_model: name under which its adapter is served; None until it succeeded.
        trained_tokens: that were learned from so far.
        step: updates done.
        total_steps: updates in all; None until its rows were read.
        error: why it failed: ``code``, ``message`` and ``param``.
    """

    id: str
    owner: str | None
    model: str
    spec: JobSpec
    status: Status
    created_at: int
    finished_at: int | None = None
    fine_tuned_model: str | None = None
    trained_tokens: int = 0
    step: int = 0
    total_steps: int | None = None
    error: Mapping[str, Any] | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Event:
    """Something that happened to a job; ``type`` is ``message`` or ``metrics``, whose figures are in ``data``."""

    id: str
    created_at: int
    level: Literal["info", "warn", "error"]
    message: str
    type: Literal["message", "metrics"] = "message"
    data: Mapping[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """An adapter as it was after an update, and the name under which it is served."""

    id: str
    created_at: int
    step_number: int
    fine_tuned_model_checkpoint: str
    metrics: Mapping[str, float] = dataclasses.field(default_factory=dict)


class FineTuning(Protocol):
    """Runs jobs. Any thread may call it; nothing here waits for the device.

    Attributes:
        is_compiling: whether programs are being compiled, which nothing can end, ``close`` neither.
    """

    @property
    def is_compiling(self) -> bool:
        """See there."""
        ...

    def create(self, spec: JobSpec, *, owner: str | None) -> JobRecord:
        """Queue a job; its rows are read later, and a bad one makes the job fail.

        Raises:
            ConfigError: if a hyperparameter is unknown or out of bounds.
            LimitError: if its owner, or everybody together, has as many open jobs as are allowed.
        """
        ...

    def get(self, job_id: str) -> JobRecord | None:
        """Return a job."""
        ...

    def list(self) -> Sequence[JobRecord]:
        """Return all jobs, the newest first."""
        ...

    def events(self, job_id: str) -> Sequence[Event]:
        """Return what happened to a job, the newest first."""
        ...

    def checkpoints(self, job_id: str) -> Sequence[Checkpoint]:
        """Return the adapters that a job kept, the newest first."""
        ...

    def cancel(self, job_id: str) -> JobRecord:
        """End a job; its last checkpoint stays.

        Raises:
            ConfigError: if its status allows it no more; so do ``pause`` and ``resume``.
        """
        ...

    def pause(self, job_id: str) -> JobRecord:
        """Let a job wait, with all that it learned."""
        ...

    def resume(self, job_id: str) -> JobRecord:
        """Let a paused job go on."""
        ...

    def delete_model(self, name: str) -> bool:
        """Delete the adapter of this name if a job has made it; return whether one has.

        Raises:
            PreftError: if that is impossible now; nothing is deleted then.
        """
        ...

    def close(self) -> None:
        """Keep what open jobs have learned, and stop. They go on when the server is started again."""
        ...
