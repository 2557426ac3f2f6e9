"""One run of ``train.rl``: samples, rewards and updates of all jobs until each has ended, evaluations between them."""

import dataclasses
import functools
import time
from collections.abc import Sequence

from rich.console import Console

from preft_jax.loading import Model
from train.jobs import first_adapter
from train.rollouts.drawing import Drawing
from train.rollouts.learning import learned
from train.rollouts.measures import eval_measures, prompt_rewards, step_measures
from train.rollouts.options import RolloutConfig, RolloutSettings
from train.rollouts.report import RolloutReport
from train.rollouts.rewarding import Rewarder
from train.rollouts.samples import RolloutJob, Sampler, held_out_prompts
from train.rollouts.tasks import make_task
from train.rollouts.update import Update, learn
from train.run.directory import RunDirectory
from train.run.interruptible import InterruptibleRun
from train.run.log import say
from train.run.progress import Progress
from train.run.reporters import make_reporters
from train.trainer import Trainer


def load_jobs(configs: Sequence[RolloutConfig], model: Model) -> list[RolloutJob]:
    """Return jobs on a base model, with the adapters that they start from and their tasks.

    Raises:
        ConfigError: if options do not fit the model or the adapter to start from, or there is no such task.
        DataError: if a dataset is bad.
    """
    jobs = []
    for config in configs:
        initial = first_adapter(config, model)
        config = dataclasses.replace(config, adapter=initial.config)
        jobs.append(RolloutJob(config, model, make_task(config, model), initial))
    return jobs


class RolloutRun(InterruptibleRun[RolloutReport]):
    """A run in its output directory; a context manager that leaves nothing open.

    Raises:
        ConfigError: if the directory holds another run, or the options do not fit the checkpoint that is resumed.
        DataError: if a dataset is bad.
    """

    def __init__(self, settings: RolloutSettings, model: Model, console: Console):
        names = [config.name for config in settings.jobs]
        named = "jobs" in settings.given
        super().__init__(settings, RunDirectory(settings.output_dir, names, named=named, picture="reward.png"))
        configs = [config for config in settings.jobs if isinstance(config, RolloutConfig)]
        self._jobs = jobs = load_jobs(configs, model)
        sampler = Sampler(model, jobs, max_num_seqs=settings.max_num_seqs, max_jobs=settings.train.max_jobs)
        self._rewarder = Rewarder()
        self._drawing = Drawing(sampler, self._rewarder, settings.max_staleness)
        try:
            self._rewarder.start(jobs)
            self._directory.prepare(resume=settings.resume, overwrite=settings.overwrite_output_dir)
            reporters = make_reporters(settings.report_to, settings.output_dir, settings.output_dir.resolve().name)
            self._trainer = Trainer(model, options=settings.train)
            self._progress = Progress(settings, model, self._directory, jobs, self._trainer)
            self._progress.begin(functools.partial(say, console))
            self._directory.write_options(settings.given, settings.run)  # Once nothing refuses them.
            self._report = RolloutReport(settings, model, self._directory, jobs, reporters, console)
        except BaseException:
            self._close()
            raise

    def __enter__(self) -> "RolloutRun":
        return self

    def _close(self) -> None:
        self._drawing.close()
        self._rewarder.close()

    def __exit__(self, *error: object) -> None:
        self._close()
        self._progress.close()
        self._report.close(failed=error[0] is not None)

    def train(self) -> dict[str, str]:
        """Train until all jobs are done; returns why those failed that did.

        Raises:
            InterruptError: once, if asked to, the run has ended early with a checkpoint.
            CheckpointError: if a checkpoint cannot be written.
        """
        self._report.introduce(self._running(waiting=True))
        with self._interrupted_by_sigint():
            self._loop()
        self._report.conclude()
        return self._report.failed | self.unpublished

    def _running(self, *, waiting: bool = False) -> list[RolloutJob]:
        jobs = self._trainer.jobs if waiting else self._trainer.running
        return [job for job in jobs if isinstance(job, RolloutJob)]

    def _loop(self) -> None:
        settings, trainer, progress = self._settings, self._trainer, self._progress
        if progress.step and self._due(settings.eval_steps):
            trainer.admit()
            self._evaluate(self._running())
        while trainer.jobs:
            trainer.admit()
            if settings.eval_on_start:
                self._evaluate([job for job in self._running() if job.step == 0])
            going = [job for job in self._running() if not job.done]
            if going:  # Else they were done before the run was resumed.
                self._step(going)
            progress.step += 1
            done = [job for job in self._running() if job.done]
            if self._due(settings.eval_steps) and not self._interrupted:
                self._evaluate(self._running())
            for job in done:
                self._end(job)
            self._save(done)

    def _step(self, jobs: Sequence[RolloutJob]) -> None:
        """Sample, reward and learn, once for each job; all of them beside each other."""
        batches = self._drawing.next(jobs, self._trainer.adapter_of)
        began = time.perf_counter()
        updates = learn(self._trainer, {job: learned(job, batches[job].groups) for job in jobs})
        learning_seconds = time.perf_counter() - began
        for job in jobs:
            batch = batches[job]
            values = step_measures(batch.groups, job.options, job.prompts_per_step) | _learning(updates[job])
            values |= {
                "staleness": float(batch.staleness), "sampling_seconds": batch.sampling_seconds,
                "reward_seconds": batch.reward_seconds, "learning_seconds": learning_seconds,
            }  # fmt: skip
            self._report.step(job, values, batch.groups)

    def _evaluate(self, jobs: Sequence[RolloutJob]) -> None:
        """Evaluate jobs on what is held out, unless they are done, or that was before the run was interrupted."""
        for job in jobs:
            if not job.done and (job.name, job.batch) not in self._report.evaluated:
                self._evaluate_one(job)

    def _evaluate_one(self, job: RolloutJob) -> None:
        asked = held_out_prompts(job)
        if not asked:
            return
        groups = self._drawing.draw({job: asked}, {job: self._trainer.adapter_of(job)}, punish=False)[job]
        self._report.evaluation(job, eval_measures(groups), prompt_rewards(groups))

    def _end(self, job: RolloutJob) -> None:
        """Leave the adapter of a job that is done, unless it failed, and make room for another."""
        if job.failed is None:
            # Before the last evaluation, so that nothing that goes wrong there costs the adapter.
            self._export(job)
            self._evaluate_one(job)
        self._progress.ended[job.name] = self._trainer.release(job)
        self._drawing.forget(job)


def _learning(update: Update) -> dict[str, float]:
    """Return the numbers of a step's updates: of the last one, and the losses' own as means over all."""
    if not update.results:
        return update.mismatch.metrics()
    last = update.results[-1]
    names = list(last.metrics)
    means = {name: sum(one.metrics.get(name, 0.0) for one in update.results) / len(update.results) for name in names}
    return {
        "loss": last.loss, "grad_norm": last.grad_norm, "learning_rate": last.learning_rate,
        "tokens": float(update.tokens), **means, **update.mismatch.metrics(),
    }  # fmt: skip
