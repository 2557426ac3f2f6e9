"""A job's rows, read and tokenised; what is wrong with them, as its owner is told."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Literal

from preft_jax.errors import PreftError
from preft_jax.loading import Model
from train.data.rows import Example, load_examples
from train.jobs import Job, first_adapter
from train.service.options import Plan, ServiceOptions, check_steps, in_fields
from train.service.records import Entry


class JobError(PreftError):
    """Why a job failed: a code for programs, a message, and the field of the job that is at fault.

    Flags of ``train.sft`` in the message become fields of a job.
    """

    def __init__(self, code: str, message: str, param: str | None = None):
        super().__init__(in_fields(message))
        self.code = code
        self.param = param

    def as_record(self) -> dict[str, str | None]:
        """Return it as ``JobRecord.error``."""
        return {"code": self.code, "message": str(self), "param": self.param}


class GivenUpError(PreftError):
    """Nobody wants the job's rows any more."""


def load_job(
    entry: Entry, plan: Plan, model: Model, options: ServiceOptions, wanted: Callable[[], bool] = lambda: True
) -> Job:
    """Read a job's rows.

    Args:
        entry: of the job.
        plan: what it is to do.
        model: the base model.
        options: how many rows, tokens and updates are allowed.
        wanted: asked after each row.

    Raises:
        JobError: if a row is wrong (the message has its line), or there are too many.
        GivenUpError: if the job is not wanted any more.
    """
    read = functools.partial(_read, entry, plan, model, options, wanted)
    examples = read("training")
    held_out = [] if entry.rows("validation") is None else read("validation")
    try:
        job = Job(plan.config, model, examples, held_out, first_adapter(plan.config, model))
        check_steps(plan.config, job.total_steps, options)
    except PreftError as error:
        raise JobError("invalid_hyperparameters", str(error), "hyperparameters") from error
    return job


def _read(
    entry: Entry, plan: Plan, model: Model, options: ServiceOptions, wanted: Callable[[], bool],
    what: Literal["training", "validation"],
) -> list[Example]:  # fmt: skip
    path = entry.rows(what)
    assert path is not None
    param = f"{what}_file"
    name = getattr(entry.record.spec, param)

    def taken(rows: int, tokens: int) -> None:
        if not wanted():
            raise GivenUpError(entry.record.id)
        for unit, count, most in (("rows", rows, options.max_rows), ("tokens", tokens, options.max_tokens)):
            if count > most:
                raise JobError("limit_exceeded", f"{name} has more than {most} {unit}; give fewer", param)

    try:
        return load_examples(path, model, plan.config.adapter, plan.config.data, taken=taken)
    except (JobError, GivenUpError):
        raise
    except PreftError as error:
        raise JobError(
            f"invalid_{param}", str(error).replace(str(path), str(name or Path(path).name)), param
        ) from error
