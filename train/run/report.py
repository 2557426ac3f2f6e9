"""Tells how a run goes: on the console, in its metrics, to TensorBoard or wandb, and in a picture of the losses."""

import collections
from collections.abc import Sequence
from typing import Any

import jax
from rich.console import Console

from preft_jax.loading import Model
from train.data import builtin as builtin_task
from train.jobs import Job
from train.results import StepResult
from train.run.directory import RunDirectory
from train.run.log import Meter, peak_flops, read_metrics
from train.run.options import Settings
from train.run.picture import draw_losses
from train.run.reporters import Reporter
from train.run.telling import RunReport


class Report(RunReport):
    """What is told of a run of ``train.sft``.

    Attributes:
        evaluated: jobs and steps that a resumed run evaluated before.
    """

    def __init__(
        self,
        settings: Settings,
        model: Model,
        directory: RunDirectory,
        jobs: Sequence[Job],
        reporters: Sequence[Reporter],
        console: Console,
    ):
        kept_until = {job.name: job.step for job in jobs} if settings.resume else None
        total, done = sum(job.total_steps for job in jobs), sum(job.step for job in jobs)
        super().__init__(settings, directory, reporters, console, kept=kept_until, total=total, done=done)
        self._model = model
        self._num_params = model.config.num_params()
        self._peak = peak_flops(jax.devices()[0].device_kind)
        kept = read_metrics(directory.metrics)
        self.evaluated = {(row["job"], row["step"]) for row in kept if "eval_loss" in row}
        self._first_loss: dict[str, float] = {}
        self._last_losses = {job.name: collections.deque[float](maxlen=max(1, job.total_steps // 10)) for job in jobs}
        for row in kept:
            if row.get("loss") is not None:
                self._first_loss.setdefault(row["job"], row["loss"])
        self._meter = Meter()

    def introduce(self, jobs: Sequence[Job]) -> None:
        """Tell what each job trains, and on what."""
        for job in jobs:
            config, start = job.initial.config, job.config.init_from
            what = builtin_task.NAME if job.config.dataset is None else str(job.config.dataset)
            count = sum(leaf.size for leaf in jax.tree.leaves(job.initial.params))
            self._status.line(
                f"{job.name}: {config.kind} r{config.rank} at {config.positions}"
                f"{'' if start is None else f' from {start}'}, {count:,} parameters on "
                f"{self._model.name or 'the model'} ({self._num_params:,}); {what}: {len(job.examples)} examples, "
                f"{job.total_steps} updates"
            )

    def updates(self, step: StepResult | None) -> None:
        """Tell what an update of the running jobs gave."""
        if step is None:
            return
        self._meter.add(step.tokens)
        self._status.advance(len(step.results))
        told = any(result.step % self._settings.logging_steps == 0 for result in step.results)
        rate = self._meter.read() if told else 0.0
        for result in step.results:
            job = result.job
            if job.failed is not None and job.name not in self.failed:
                self.failed[job.name] = job.failed
                self._write({"step": result.step, "job": job.name, "failed": job.failed})
            if job.name in self.failed:
                continue
            self._first_loss.setdefault(job.name, result.loss)
            self._last_losses[job.name].append(result.loss)
            if result.step % self._settings.logging_steps:
                continue
            flops, epoch = 4 * self._num_params * rate, job.epoch_after(result.step)
            row = {
                "step": result.step, "job": job.name, "epoch": round(epoch, 4), "loss": result.loss,
                "grad_norm": result.grad_norm, "learning_rate": result.learning_rate, "tokens_per_s": round(rate, 1),
                "flops_per_s": flops, "padding": round(1 - step.tokens / step.padded_tokens, 4),
            }  # fmt: skip
            if self._peak:
                row["mfu"] = round(flops / self._peak, 4)
            self._write(row)
            mfu = f", MFU {row['mfu']:.1%}" if self._peak else ""
            self.line(
                f"step {result.step}/{job.total_steps}  epoch {epoch:.2f}  loss {result.loss:.4f}  "
                f"grad {result.grad_norm:.3f}  lr {result.learning_rate:.2e}  {rate:,.0f} tok/s{mfu}",
                job,
            )

    def leave_out(self, seconds: float) -> None:
        """Let the speed of training not count time that was spent otherwise."""
        self._meter.leave_out(seconds)

    def evaluation(self, job: Job, values: dict[str, Any], text: str) -> None:
        """Tell of an evaluation of a job as it is now: values for the metrics, and a line of them for people."""
        self._write({"step": job.step, "job": job.name} | values)
        self.line(text, job)
        self._meter.read()  # An evaluation takes none of the training's time.

    def draw(self) -> None:
        """Draw the losses."""
        rows = read_metrics(self._directory.metrics)
        if not any(row.get("loss") is not None for row in rows):
            return
        if draw_losses(rows, self._directory.picture):
            self.line(f"losses: {self._directory.picture}")
        else:
            self.line("no picture of the losses: pip install 'preft-jax[train]'")

    def warn(self, jobs: Sequence[Job]) -> None:
        """Warn of the jobs whose loss has risen, from the first to the mean of the last tenth: one batch is noisy."""
        for job in jobs:
            first, losses = self._first_loss.get(job.name), self._last_losses[job.name]
            if first is None or not losses or job.failed is not None:
                continue
            last = sum(losses) / len(losses)
            if last > first:
                over = f" (mean of {len(losses)} updates)" if len(losses) > 1 else ""
                self.line(
                    f"warning: the training loss was {first:.4f} at first and is {last:.4f} at the end{over}; lower "
                    "learning_rate, or look at the data",
                    job,
                )
