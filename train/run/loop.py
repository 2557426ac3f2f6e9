"""One run of ``train.sft``: updates of all jobs until each has ended, evaluations and checkpoints between them."""

import functools
import time

from rich.console import Console

from preft_jax.device.mesh import Placement
from preft_jax.loading import Model
from train.jobs import Job
from train.run.directory import RunDirectory
from train.run.evaluation import Evaluation
from train.run.interruptible import InterruptibleRun
from train.run.loading import load_jobs
from train.run.log import say
from train.run.options import Settings
from train.run.progress import Progress
from train.run.report import Report
from train.run.reporters import make_reporters
from train.trainer import Trainer


class Run(InterruptibleRun[Report]):
    """A run in its output directory; a context manager that leaves nothing open.

    Raises:
        ConfigError: if the directory holds another run, or the options do not fit the checkpoint that is resumed.
        DataError: if a dataset is bad.
    """

    def __init__(self, settings: Settings, model: Model, placement: Placement, console: Console):
        names = [config.name for config in settings.jobs]
        super().__init__(settings, RunDirectory(settings.output_dir, names, named="jobs" in settings.given))
        self._jobs = jobs = load_jobs(settings.jobs, model, placement.num_shards)
        self._directory.prepare(resume=settings.resume, overwrite=settings.overwrite_output_dir)
        reporters = make_reporters(settings.report_to, settings.output_dir, settings.output_dir.resolve().name)
        self._trainer = Trainer(model, options=settings.train, placement=placement)
        self._progress = Progress(settings, model, self._directory, jobs, self._trainer)
        self._progress.begin(functools.partial(say, console))
        self._directory.write_options(settings.given, settings.run)  # Once nothing refuses them.
        self._report = Report(settings, model, self._directory, jobs, reporters, console)
        # Weights that are spread over devices generate nothing.
        generations = settings.eval_generations if placement.num_shards == 1 else 0
        self._evaluation = Evaluation(model, self._trainer, self._report, generations=generations)

    def __enter__(self) -> "Run":
        return self

    def __exit__(self, *error: object) -> None:
        self._progress.close()
        self._report.close(failed=error[0] is not None)

    def train(self) -> dict[str, str]:
        """Train until all jobs are done; returns why those failed that did.

        Raises:
            InterruptError: once, if asked to, the run has ended early with a checkpoint.
            CheckpointError: if a checkpoint cannot be written.
        """
        self._report.introduce(self._trainer.jobs)
        with self._interrupted_by_sigint():
            self._loop()
        self._report.draw()
        self._report.warn(self._jobs)
        return self._report.failed | self.unpublished

    def _loop(self) -> None:
        settings, trainer, progress = self._settings, self._trainer, self._progress
        if progress.step and self._due(settings.eval_steps):
            trainer.admit()
            self._evaluation.of_each(trainer.running)
        while trainer.jobs:
            if settings.eval_on_start:
                trainer.admit()
                self._evaluation.of_each([job for job in trainer.running if job.step == 0])
            self._report.updates(trainer.step())
            progress.step += 1
            done = self._ended()
            if done or self._due(settings.eval_steps) or self._due(settings.save_steps) or self._interrupted:
                self._report.updates(trainer.finish())
                done = self._ended()
            if self._due(settings.eval_steps) and not self._interrupted:
                self._evaluation.of_each(trainer.running)
            for job in done:
                self._end(job)
            began = time.perf_counter()
            self._save(done)
            self._report.leave_out(time.perf_counter() - began)
        self._report.updates(trainer.finish())

    def _ended(self) -> list[Job]:
        return [job for job in self._trainer.running if job.done]

    def _end(self, job: Job) -> None:
        """Leave the adapter of a job that is done, unless it failed, and make room for another."""
        if job.failed is None:
            # Before the last evaluation, so that nothing that goes wrong there costs the adapter.
            self._export(job)
            self._evaluation.of(job)
        self._progress.ended[job.name] = self._trainer.release(job)
