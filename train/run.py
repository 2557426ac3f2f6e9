"""One run of ``train.sft``: jobs, checkpoints, evaluation, status, and what is left in the output directory."""

import dataclasses
import functools
import json
import shutil
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
from rich.console import Console

from preft_jax.adapter import Adapter
from preft_jax.errors import ConfigError, PreftError
from preft_jax.io.adapter_files import save_adapter
from preft_jax.loading import Model
from preft_jax.sharding import Placement
from train import builtin_task
from train.checkpoint import Checkpoints
from train.data import Example, load_examples, make_examples
from train.generation import answer, answerable
from train.job import Job, JobConfig, first_adapter
from train.log import Meter, Metrics, Status, draw_losses, make_reporters, peak_flops, read_metrics
from train.options import OPTIONS_FILE, Settings
from train.publish import publish
from train.step import Slots
from train.trainer import Result, StepResult, Trainer

CHECKPOINTS = "checkpoints"
METRICS = "metrics.jsonl"
PICTURE = "loss.png"
_RESERVED = ("adapter", CHECKPOINTS, METRICS, PICTURE, OPTIONS_FILE, "tensorboard", "wandb")


class InterruptError(PreftError):
    """The user or the system ended the run; a checkpoint was written."""


class Run:
    """A run in its output directory; a context manager that leaves nothing open.

    Raises:
        ConfigError: if the directory holds another run, or the options do not fit the checkpoint that is resumed.
        DataError: if a dataset is bad.
    """

    def __init__(self, settings: Settings, model: Model, placement: Placement, console: Console):
        self._settings = settings
        self._model = model
        self._directory = settings.output_dir
        self._interrupted = False
        self._say = functools.partial(console.print, highlight=False, soft_wrap=True, markup=False)
        self._peak = peak_flops(jax.devices()[0].device_kind)
        self._num_params = sum(leaf.size for leaf in jax.tree.leaves(model.params))
        self._check_options()
        self._shards = placement.num_shards
        self._jobs = jobs = [self._job(config) for config in settings.jobs]
        self._prepare_directory()
        self._reporters = make_reporters(settings.report_to, self._directory, self._directory.resolve().name)
        self._checkpoints = Checkpoints(self._directory / CHECKPOINTS, settings.save_total_limit)
        self._trainer = Trainer(model, options=settings.train, placement=placement)
        self._step = 0
        self._saved: int | None = None
        self._failed: dict[str, str] = {}
        self._exported: set[str] = set()
        self._final: dict[str, Slots] = {}
        self._unpublished: dict[str, str] = {}
        self._start(jobs)
        self._write_options()
        self._metrics = Metrics(
            self._directory / METRICS, keep_until={job.name: job.step for job in jobs} if settings.resume else None
        )
        kept = read_metrics(self._directory / METRICS)
        self._evaluated = {(row["job"], row["step"]) for row in kept if "eval_loss" in row}
        self._meter = Meter()
        self._status = Status(console, total=sum(job.total_steps for job in jobs), done=sum(job.step for job in jobs))

    def __enter__(self) -> "Run":
        return self

    def __exit__(self, *error: object) -> None:
        self._status.close()
        self._metrics.close()
        self._checkpoints.close()

    def interrupt(self) -> None:
        """End after this update, with a checkpoint; a second call ends at once."""
        if self._interrupted:
            raise KeyboardInterrupt
        self._interrupted = True

    # Beginning

    def _check_options(self) -> None:
        positions = self._model.config.max_position_embeddings
        for config in self._settings.jobs:
            if config.batches.max_length > positions and not config.batches.packing:
                raise ConfigError(
                    f"max_length is {config.batches.max_length} and the model has {positions} positions; lower it"
                )
            if self._named and config.name in _RESERVED:
                raise ConfigError(f"a job has the name {config.name!r}, which the run uses itself; give it another")

    @property
    def _named(self) -> bool:
        """Whether the jobs are those of a file, each in a directory of its name."""
        return "jobs" in self._settings.given

    def _job(self, config: JobConfig) -> Job:
        rows = config.batches.batch_size * self._shards
        try:
            initial = first_adapter(config, self._model)
        except ConfigError as error:
            raise ConfigError(f"job {config.name!r}: {error}" if self._named else str(error)) from error
        config = dataclasses.replace(
            config, adapter=initial.config, batches=dataclasses.replace(config.batches, batch_size=rows)
        )
        if config.dataset is None:
            train, held_out = (self._examples(rows, config) for rows in builtin_task.rows())
            return Job(config, self._model, train, held_out, initial)
        examples = load_examples(config.dataset, self._model, config.adapter, config.data)
        held_out: list[Example] = []
        if config.eval_dataset is not None:
            held_out = load_examples(config.eval_dataset, self._model, config.adapter, config.data)
        return Job(config, self._model, examples, held_out, initial)

    def _examples(self, rows: Sequence[dict[str, Any]], config: JobConfig) -> list[Example]:
        made = [
            make_examples(row, self._model, config.adapter, config.data, line=line) for line, row in enumerate(rows, 1)
        ]
        return [example for some in made for example in some]

    def _prepare_directory(self) -> None:
        settings, directory = self._settings, self._directory
        if (directory / OPTIONS_FILE).exists() and not settings.resume:
            if not settings.overwrite_output_dir:
                raise ConfigError(
                    f"{directory} holds a run; go on with --resume, begin anew with --overwrite-output-dir, or choose "
                    "another --output-dir"
                )
            for old in (directory / CHECKPOINTS, *map(self._path, self._jobs)):
                shutil.rmtree(old, ignore_errors=True)
        try:
            directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"{directory} cannot be written: {error}; choose another --output-dir") from error

    def _write_options(self) -> None:
        """Write the options down, once nothing refuses them: a resumed run inherits them."""
        (self._directory / OPTIONS_FILE).write_text(json.dumps(self._settings.given, indent=2) + "\n")

    def _start(self, jobs: Sequence[Job]) -> None:
        """Give the trainer the jobs, as they are in the newest checkpoint if the run is resumed."""
        found = self._checkpoints.latest() if self._settings.resume else None
        for change in self._settings.changes:
            self._say(change)
        if found is None:
            if self._settings.resume:
                self._say("there is no checkpoint yet: the run begins anew")
            for job in jobs:
                self._trainer.add(job)
            return
        if found.meta["model_digest"] != self._model.digest:
            raise ConfigError(f"the run is of another base model than {self._model.name!r}; give the --model it had")
        for job in jobs:
            known = found.meta["jobs"].get(job.name)
            if known is None:
                self._trainer.add(job)
                continue
            if known["data"] != job.data_digest:
                raise ConfigError(
                    f"the dataset of {job.name!r} is not the one that the run was begun with; restore it, or begin anew"
                )
            job.step = known["step"]
            if known["failed"] is not None:
                self._say(f"{job.name} is tried again from step {job.step}; it failed: {known['failed']}")
            if known["exported"] and job.done:
                self._exported.add(job.name)
            elif job.name in found.leaves:
                self._trainer.add(job, found.state(job.name, self._trainer.state_of(job)))
            else:
                raise ConfigError(
                    f"{job.name!r} ended at step {job.step} and its optimizer state is no longer kept; to train it "
                    f"further, begin a run with --init-from {self._path(job)}"
                )
        self._step = self._saved = found.step
        self._say(f"going on from step {found.step}")

    # The loop

    def train(self) -> dict[str, str]:
        """Train until all jobs are done; returns why those failed that did.

        Raises:
            InterruptError: once, if asked to, the run has ended early with a checkpoint.
            CheckpointError: if a checkpoint cannot be written.
        """
        self._introduce()
        before = signal.signal(signal.SIGINT, lambda *_: self.interrupt())
        try:
            self._loop()
        finally:
            signal.signal(signal.SIGINT, before)
        self._draw()
        return self._failed | self._unpublished

    def _loop(self) -> None:
        settings = self._settings
        if self._step and self._due(settings.eval_steps):
            self._trainer.admit()
            self._evaluate_each(self._trainer.running)
        while self._trainer.jobs:
            if settings.eval_on_start:
                self._trainer.admit()
                self._evaluate_each([job for job in self._trainer.running if job.step == 0])
            self._tell(self._trainer.step())
            self._step += 1
            done = self._ended()
            if done or self._due(settings.eval_steps) or self._due(settings.save_steps) or self._interrupted:
                self._tell(self._trainer.finish())
                done = self._ended()
            if self._due(settings.eval_steps) and not self._interrupted:
                self._evaluate_each(self._trainer.running)
            for job in done:
                if job.failed is None:
                    # Before the last evaluation, so that nothing that goes wrong there costs the adapter.
                    self._export(job, self._trainer.state_of(job))
                    self._evaluate(job)
                self._final[job.name] = self._trainer.release(job)
            if done or self._due(settings.save_steps) or self._interrupted:
                self._save()
            if self._interrupted and self._trainer.jobs:
                raise InterruptError(
                    f"interrupted at step {self._step}, which is in {self._directory / CHECKPOINTS}; go on with "
                    f"--resume --output-dir {self._directory}"
                )
        self._tell(self._trainer.finish())

    def _ended(self) -> list[Job]:
        return [job for job in self._trainer.running if job.done]

    def _due(self, every: int) -> bool:
        return every > 0 and self._step % every == 0

    def _introduce(self) -> None:
        for job in self._trainer.jobs:
            config, start = job.initial.config, job.config.init_from
            what = builtin_task.NAME if job.config.dataset is None else str(job.config.dataset)
            count = sum(leaf.size for leaf in jax.tree.leaves(job.initial.params))
            self._say(
                f"{job.name}: {config.kind} r{config.rank} at {config.positions}"
                f"{'' if start is None else f' from {start}'}, {count:,} parameters on "
                f"{self._model.name or 'the model'} ({self._num_params:,}); {what}: {len(job.examples)} examples, "
                f"{job.total_steps} updates"
            )

    def _tell(self, step: StepResult | None) -> None:
        """Write down what an update gave, and print it."""
        if step is None:
            return
        self._meter.add(step.tokens)
        self._status.advance(len(step.results))
        rate = self._meter.read()
        for result in step.results:
            self._check(result)
            if result.job.name in self._failed or result.step % self._settings.logging_steps:
                continue
            flops = 4 * self._num_params * rate
            row = {
                "step": result.step, "job": result.job.name, "loss": result.loss, "grad_norm": result.grad_norm,
                "learning_rate": result.learning_rate, "tokens_per_s": round(rate, 1), "flops_per_s": flops,
                "padding": round(1 - step.tokens / step.padded_tokens, 4),
            }  # fmt: skip
            if self._peak:
                row["mfu"] = round(flops / self._peak, 4)
            self._write(row)
            mfu = f", MFU {row['mfu']:.1%}" if self._peak else ""
            self._status.line(
                f"{self._label(result.job)}step {result.step}/{result.job.total_steps}  loss {result.loss:.4f}  "
                f"grad {result.grad_norm:.3f}  lr {result.learning_rate:.2e}  {rate:,.0f} tok/s{mfu}"
            )

    def _label(self, job: Job) -> str:
        return "" if len(self._settings.jobs) == 1 else f"{job.name}: "

    def _check(self, result: Result) -> None:
        """Note a job that failed."""
        if result.job.failed is not None and result.job.name not in self._failed:
            self._failed[result.job.name] = result.job.failed
            self._write({"step": result.step, "job": result.job.name, "failed": result.job.failed})

    def _write(self, row: dict[str, Any]) -> None:
        self._metrics.write(row)
        scalars = {
            f"{row['job']}/{name}": float(value)
            for name, value in row.items()
            if name not in ("step", "job") and isinstance(value, int | float)
        }
        for report in self._reporters:
            report(row["step"], scalars)

    def _evaluate_each(self, jobs: Sequence[Job]) -> None:
        """Evaluate the jobs that go on, unless that was done before the run was interrupted."""
        for job in jobs:
            if not job.done and (job.name, job.step) not in self._evaluated:
                self._evaluate(job)

    def _evaluate(self, job: Job) -> None:
        if not job.held_out:
            return
        loss, count = self._trainer.evaluate(job, job.held_out)
        row = {"step": job.step, "job": job.name, "eval_loss": loss, "eval_tokens": count}
        text = f"{self._label(job)}held out: loss {loss:.4f}"
        asked = answerable(self._model, job.held_out)[: self._settings.eval_generations]
        if asked and self._shards == 1:
            some = answer(self._model, self._trainer.adapter_of(job), asked)
            row |= {"exact_match": some.exact_match}
            text += f", {some.exact_match:.0%} of answers exact; {_short(some.texts[0])}"
            text += "" if some.texts[0] == some.expected[0] else f" for {_short(some.expected[0])}"
        self._write(row)
        self._status.line(text)
        self._meter.read()

    # What is left

    def _path(self, job: Job) -> Path:
        """Return where a job's adapter goes."""
        return self._directory / (job.name if self._named else "") / "adapter"

    def _export(self, job: Job, state: Slots) -> None:
        adapter = Adapter(job.initial.config, state.params)
        save_adapter(self._path(job), adapter)
        self._exported.add(job.name)
        self._status.line(f"{self._label(job)}the adapter is in {self._path(job)}")
        if self._settings.publish is not None:
            try:
                self._status.line(publish(adapter, job.name, self._path(job), self._settings.publish))
            except (PreftError, OSError) as error:  # The adapter is there, and other jobs go on.
                self._unpublished[job.name] = str(error)
                self._status.line(f"{self._label(job)}not published: {error}")

    def _save(self) -> None:
        """Write a checkpoint of all jobs, those that are done included."""
        alive = self._trainer.jobs
        if self._saved == self._step or (self._failed and not alive):
            return  # What a failed run goes on from is the checkpoint before.
        known = {
            job.name: {
                "step": job.step, "failed": job.failed,
                "exported": job.name in self._exported, "data": job.data_digest,
            }
            for job in self._jobs
        }  # fmt: skip
        meta = {"model_digest": self._model.digest, "options": dict(self._settings.given), "jobs": known}
        states = {job.name: self._trainer.state_of(job) for job in alive}
        self._checkpoints.save(self._step, meta, states | self._final)
        # An ended job's state is in the checkpoint after its end alone: thousands of them would not fit.
        self._saved, self._final = self._step, {}

    def _draw(self) -> None:
        rows = read_metrics(self._directory / METRICS)
        if not any(row.get("loss") is not None for row in rows):
            return
        if draw_losses(rows, self._directory / PICTURE):
            self._status.line(f"losses: {self._directory / PICTURE}")
        else:
            self._status.line("no picture of the losses: pip install 'preft-jax[train]'")


def _short(text: str) -> str:
    return repr(text if len(text) <= 60 else text[:57] + "...")
