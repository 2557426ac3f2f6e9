"""How far a run is: written to its checkpoints, and taken from the newest one when it is resumed."""

from collections.abc import Callable, Sequence

from preft_jax.errors import ConfigError
from preft_jax.loading import Model
from train.checkpoint import Checkpoint, Checkpoints
from train.jobs import Job, first_state
from train.run.directory import RunDirectory
from train.run.kept import OPTIONS_FILE
from train.run.options import Settings
from train.step import Slots
from train.trainer import Trainer


class Progress:
    """A run's step, and what has become of its jobs.

    Attributes:
        step: updates of the run, each of all jobs that run then.
        exported: names of the jobs whose adapters have been left in the directory.
        ended: states of the jobs that have ended since the last checkpoint.

    Raises:
        CheckpointError: if there is no room for checkpoints.
    """

    def __init__(
        self, settings: Settings, model: Model, directory: RunDirectory, jobs: Sequence[Job], trainer: Trainer
    ):
        self.step = 0
        self.exported: set[str] = set()
        self.ended: dict[str, Slots] = {}
        self._settings = settings
        self._model = model
        self._directory = directory
        self._jobs = jobs
        self._trainer = trainer
        self._checkpoints = Checkpoints(directory.checkpoints, settings.save_total_limit)
        self._saved: int | None = None

    def begin(self, say: Callable[[str], None]) -> None:
        """Give the trainer the jobs, as they are in the newest checkpoint if the run is resumed.

        Raises:
            ConfigError: if the options do not fit the checkpoint.
            CheckpointError: if no checkpoint can be read, or an adapter in it has another shape.
        """
        found = self._checkpoints.latest() if self._settings.resume else None
        for change in self._settings.changes:
            say(change)
        if found is None:
            if self._settings.resume:
                say("there is no checkpoint yet: the run begins anew")
            for job in self._jobs:
                self._trainer.add(job)
            return
        if found.meta["model_digest"] != self._model.kv_digest:
            raise ConfigError(f"the run is of another base model than {self._model.name!r}; give the --model it had")
        if found.meta["run"] != self._settings.run:
            raise ConfigError(
                f"{OPTIONS_FILE} in {self._directory.path} is of another run than the checkpoints beside it; "
                "delete it, and the options that the checkpoints have will count"
            )
        for job in self._jobs:
            self._restore(job, found, say)
        self.step = self._saved = found.step
        say(f"going on from step {found.step}")
        if all(job.done for job in self._jobs):
            say("nothing is left to train; raise max_steps or num_train_epochs to go on")

    def _restore(self, job: Job, found: Checkpoint, say: Callable[[str], None]) -> None:
        """Give the trainer a job as it is in a checkpoint, unless it has ended."""
        known = found.meta["jobs"].get(job.name)
        if known is None:
            self._trainer.add(job)
            return
        if known["data"] != job.data_digest:
            raise ConfigError(
                f"the dataset of {job.name!r} is not the one that the run was begun with; restore it, or begin anew"
            )
        job.step = known["step"]
        if known["failed"] is not None:
            say(f"{job.name} is tried again from step {job.step}; it failed: {known['failed']}")
        if known["exported"] and job.done:
            self.exported.add(job.name)
        elif job.name in found.leaves:
            self._trainer.add(job, found.state(job.name, first_state(job)))
        else:
            raise ConfigError(
                f"{job.name!r} ended at step {job.step} and its optimizer state is no longer kept; to train it "
                f"further, begin a run with --init-from {self._directory.adapter(job.name)}"
            )

    def save(self) -> None:
        """Write a checkpoint of all jobs, those that are done included; it is not written twice.

        Raises:
            CheckpointError: if it cannot be written.
        """
        alive = self._trainer.jobs
        if self._saved == self.step or (not alive and any(job.failed is not None for job in self._jobs)):
            return  # What a failed run goes on from is the checkpoint before.
        known = {
            job.name: {
                "step": job.step, "failed": job.failed,
                "exported": job.name in self.exported, "data": job.data_digest,
            }
            for job in self._jobs
        }  # fmt: skip
        meta = {"model_digest": self._model.kv_digest, "options": dict(self._settings.given), "jobs": known}
        meta["run"] = self._settings.run
        states = {job.name: self._trainer.state_of(job) for job in alive}
        self._checkpoints.save(self.step, meta, states | self.ended)
        # An ended job's state is in the checkpoint after its end alone: thousands of them would not fit.
        self._saved, self.ended = self.step, {}

    def close(self) -> None:
        """Let go of the checkpoints."""
        self._checkpoints.close()
