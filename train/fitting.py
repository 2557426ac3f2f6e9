"""``fit``: train jobs to their end, in one call."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

from preft_jax.adapters.adapter import Adapter
from preft_jax.device.mesh import Placement
from preft_jax.errors import ConfigError
from preft_jax.loading import Model
from train.jobs import Job
from train.results import Result
from train.trainer import Trainer, TrainOptions


class Fitted(NamedTuple):
    """What came of a job: its adapter (of the last update that was made), and why it was given up, if it was."""

    job: Job
    adapter: Adapter
    results: list[Result]
    failed: str | None


def fit(
    model: Model,
    jobs: Job | Sequence[Job],
    options: TrainOptions = TrainOptions(),
    placement: Placement | None = None,
    on_result: Callable[[Result], None] | None = None,
) -> list[Fitted]:
    """Train jobs beside each other on their own examples until each is done.

        (ann,) = fit(model, Job(JobConfig(name="ann", max_steps=100), model, examples))
        preft_jax.generate(model, "Hello", adapters=ann.adapter)

    ``train.sft`` does the same with checkpoints, evaluation and logs.

    Args:
        model: from ``load_model``.
        jobs: one, or several; those that do not fit beside each other (``options.max_jobs``) wait.
        options: how the device is used.
        placement: of weights and batches on several devices; None: one device.
        on_result: told of each update of each job, when it is over.

    Returns:
        One ``Fitted`` for each job, in order.

    Raises:
        ConfigError: if a job has no examples of its own.
    """
    jobs = [jobs] if isinstance(jobs, Job) else list(jobs)
    strange = [job for job in jobs if not isinstance(job, Job)]
    if not jobs or strange:
        what = f"a {type(strange[0]).__name__}" if strange else "none"
        raise ConfigError(f"jobs holds {what}; give Job(JobConfig(...), model, examples), or a list of them")
    trainer = Trainer(model, jobs, options, placement)
    results: dict[Job, list[Result]] = {job: [] for job in jobs}
    adapters: dict[Job, Adapter] = {}

    def take(new: Sequence[Result]) -> None:
        for result in new:
            results[result.job].append(result)
            if on_result is not None:
                on_result(result)

    while trainer.jobs:
        step = trainer.step()
        take([] if step is None else step.results)
        if any(job.done for job in trainer.running):
            last = trainer.finish()  # What failed is known now.
            take([] if last is None else last.results)
        for job in [job for job in trainer.running if job.done]:
            adapters[job] = trainer.adapter_of(job)
            trainer.release(job)
    return [Fitted(job, adapters[job], results[job], job.failed) for job in jobs]
