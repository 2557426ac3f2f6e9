"""Tells how a run of ``train.rl`` goes: on the console, in its metrics, to TensorBoard or wandb, and in pictures."""

import json
import math
import os
import time
from collections.abc import Sequence
from typing import Any

import jax
from rich.console import Console

from preft_jax.io.safetensors_io import write_file
from preft_jax.loading import Model
from train.checkpoint import CheckpointError
from train.rollouts.options import RolloutSettings
from train.rollouts.picture import draw_rewards
from train.rollouts.samples import Group, RolloutJob
from train.rollouts.statistics import Interval, interval
from train.rollouts.transcripts import Transcripts
from train.run.directory import RunDirectory
from train.run.log import read_metrics
from train.run.reporters import Reporter
from train.run.telling import RunReport

_UNLIKE = 1e-2
"""In float32, a log-probability of the trainer is that of the sampler to 1e-4. So much is a fault."""


class RolloutReport(RunReport):
    """What is told of a run of ``train.rl``.

    Attributes:
        evaluated: jobs and steps that a resumed run evaluated before.
    """

    def __init__(
        self,
        settings: RolloutSettings,
        model: Model,
        directory: RunDirectory,
        jobs: Sequence[RolloutJob],
        reporters: Sequence[Reporter],
        console: Console,
    ):
        kept = {job.name: job.batch for job in jobs} if settings.resume else None
        total, done = sum(job.steps for job in jobs), sum(job.batch for job in jobs)
        super().__init__(settings, directory, reporters, console, kept=kept, total=total, done=done)
        self._model = model
        self._jobs = jobs
        self._transcripts = Transcripts(directory.path / TRANSCRIPTS, keep_until=kept)
        self.evaluated = {(row["job"], row["step"]) for row in read_metrics(directory.metrics) if "eval_reward" in row}
        self._warned: set[str] = set()
        self._began = time.perf_counter()

    def introduce(self, jobs: Sequence[RolloutJob]) -> None:
        """Tell what each job trains, and for what."""
        for job in jobs:
            config, options = job.initial.config, job.options
            count = sum(leaf.size for leaf in jax.tree.leaves(job.initial.params))
            self.line(
                f"{job.name}: {config.kind} r{config.rank} at {config.positions}, {count:,} parameters on "
                f"{self._model.name or 'the model'}; {job.task.name}; {options.algorithm}, {job.steps} steps of "
                f"{job.prompts_per_step} prompts with {options.num_generations} samples"
            )

    def step(self, job: RolloutJob, values: dict[str, float], groups: Sequence[Group]) -> None:
        """Tell what a step of a job gave: values for the metrics, and its samples."""
        self._status.advance(1)
        if job.failed is not None:
            self.failed[job.name] = job.failed
            self._write({"step": job.batch, "job": job.name, "failed": job.failed})
            return
        self._look_at(job, values)
        if job.batch % self._settings.logging_steps:
            return
        self._write({"step": job.batch, "job": job.name} | values)
        self._transcripts.write(job.batch, job.name, groups)
        dropped = f", {values['samples_dropped']:.0f} dropped" if values["samples_dropped"] else ""
        if values["prompts_left_out"]:
            dropped += f", {values['prompts_left_out']:.0f} prompts too long"
        self.line(
            f"step {job.batch}/{job.steps}  reward {values['reward']:.3f} ± {values['reward_std']:.3f}  "
            f"length {values['completions/mean_length']:.1f}  loss {values['loss']:.4f}  "
            f"grad {values['grad_norm']:.3f}  lr {values['learning_rate']:.2e}  "
            f"sampling {values['sampling_seconds']:.1f} s, learning {values['learning_seconds']:.1f} s{dropped}",
            job,
        )

    def _look_at(self, job: RolloutJob, values: dict[str, float]) -> None:
        """Warn once if the samples were not drawn from the adapter that learns from them, and should have been."""
        largest = values["sampling_logp_difference/max"]
        is_exact = str(self._model.params["embed"].dtype) == "float32"
        if is_exact and not values["staleness"] and largest > _UNLIKE and job.name not in self._warned:
            self._warned.add(job.name)
            self.line(
                f"warning: a log-probability of the sampler is {largest:.3g} from the trainer's at step {job.batch}; "
                "the samples are not those of the adapter that learns from them",
                job,
            )

    def evaluation(self, job: RolloutJob, values: dict[str, Any], rewards: Sequence[float]) -> None:
        """Tell of an evaluation of a job as it is now; ``rewards`` are those of the held-out prompts."""
        plain = [reward if math.isfinite(reward) else None for reward in rewards]
        self._write({"step": job.batch, "job": job.name} | values, {"eval_rewards": plain})
        found = Interval(values["eval_reward"], values["eval_reward_low"], values["eval_reward_high"])
        self.line(f"held out: reward {found} of {len(rewards)} prompts after {job.batch} steps", job)

    def conclude(self) -> None:
        """Draw the rewards, tell what came out, and leave it in ``results.json``."""
        rows = read_metrics(self._directory.metrics)
        if draw_rewards(rows, self._directory.picture):
            self.line(f"rewards: {self._directory.picture}")
        else:
            self.line("no picture of the rewards: pip install 'preft-jax[train]'")
        self.line(f"samples to read: {self._directory.path / TRANSCRIPTS}")
        found = {job.name: self._concluded(job, rows) for job in self._jobs}
        content = {
            "schema": 1, "model": self._model.name, "device": jax.devices()[0].device_kind,
            "backend": jax.default_backend(), "cores": os.cpu_count(), "jax": jax.__version__,
            "options": dict(self._settings.given),
            "seconds": round(time.perf_counter() - self._began, 1), "jobs": found,
        }  # fmt: skip
        write_file(
            self._directory.path / RESULTS, (json.dumps(content, indent=2) + "\n").encode(), error=CheckpointError
        )

    def _concluded(self, job: RolloutJob, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
        mine = [row for row in rows if row["job"] == job.name]
        held_out = [row for row in mine if row.get("eval_rewards")]
        learned = [row for row in mine if row.get("reward") is not None]
        found: dict[str, Any] = {"steps": job.batch}
        if learned:
            part = max(1, len(learned) // 10)
            found["first_samples"], found["last_samples"] = (
                _plain(interval([row["reward"] for row in some])) for some in (learned[:part], learned[-part:])
            )
        if len(held_out) > 1:
            first, last = (_rewards(row) for row in (held_out[0], held_out[-1]))
            gained = [b - a for a, b in zip(first, last, strict=True)] if len(first) == len(last) else []
            ends = interval(first), interval(last), interval(gained)
            names = ("first_reward", "last_reward", "rise")
            found |= {name: _plain(one) for name, one in zip(names, ends, strict=True)}
            found |= {"first_step": held_out[0]["step"], "last_step": held_out[-1]["step"], "prompts": len(first)}
            self.line(
                f"held-out reward (95% intervals over {len(first)} prompts): first {ends[0]}, last {ends[1]}, "
                f"rise {ends[2]}",
                job,
            )
        return found

    def close(self, *, failed: bool) -> None:
        """Close the transcripts, and what all reports close."""
        self._transcripts.close()
        super().close(failed=failed)


def _plain(found: Interval) -> dict[str, float | None]:
    """Return an interval as JSON has it."""
    return {name: value if math.isfinite(value) else None for name, value in found._asdict().items()}


def _rewards(row: dict[str, Any]) -> list[float]:
    return [float("nan") if reward is None else reward for reward in row["eval_rewards"]]


TRANSCRIPTS = "transcripts.txt"
RESULTS = "results.json"
