"""What runs of ``train.sft`` and ``train.rl`` share: how they are interrupted, and how the adapter of a job leaves."""

import contextlib
import signal
from collections.abc import Iterator, Sequence

from preft_jax.errors import PreftError
from preft_jax.io.adapter_files import save_adapter
from train.jobs import Job
from train.publish import publish
from train.run.directory import RunDirectory
from train.run.options import Settings
from train.run.progress import Progress
from train.run.telling import RunReport
from train.trainer import Trainer


class InterruptError(PreftError):
    """The user or the system ended the run; a checkpoint was written."""


class InterruptibleRun[ReportT: RunReport]:
    """A run in its output directory that ends early with a checkpoint when it is asked to.

    Attributes:
        unpublished: by job, why a server did not take its adapter.
    """

    _trainer: Trainer
    _progress: Progress
    _report: ReportT

    def __init__(self, settings: Settings, directory: RunDirectory):
        self.unpublished: dict[str, str] = {}
        self._settings = settings
        self._directory = directory
        self._interrupted = False

    def interrupt(self) -> None:
        """End after this step, with a checkpoint; a second call ends at once."""
        if self._interrupted:
            raise KeyboardInterrupt
        self._interrupted = True

    @contextlib.contextmanager
    def _interrupted_by_sigint(self) -> Iterator[None]:
        before = signal.signal(signal.SIGINT, lambda *_: self.interrupt())
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)

    def _due(self, every: int) -> bool:
        return every > 0 and self._progress.step % every == 0

    def _save(self, done: Sequence[Job]) -> None:
        """Write a checkpoint if jobs are done, it is time, or the run was interrupted; end it if it was.

        Raises:
            InterruptError: if it was, and not all jobs are done.
            CheckpointError: if a checkpoint cannot be written.
        """
        if done or self._due(self._settings.save_steps) or self._interrupted:
            self._progress.save()
        if self._interrupted and self._trainer.jobs:
            raise InterruptError(
                f"interrupted at step {self._progress.step}, which is in {self._directory.checkpoints}; go on with "
                f"--resume --output-dir {self._directory.path}"
            )

    def _export(self, job: Job) -> None:
        """Save a job's adapter as it is now, and hand it to a server if one was named."""
        adapter, path = self._trainer.adapter_of(job), self._directory.adapter(job.name)
        save_adapter(path, adapter)
        self._progress.exported.add(job.name)
        self._report.line(f"the adapter is in {path}", job)
        if self._settings.publish is not None:
            try:
                self._report.line(publish(adapter, job.name, path, self._settings.publish))
            except (PreftError, OSError) as error:  # The adapter is there, and other jobs go on.
                self.unpublished[job.name] = str(error)
                self._report.line(f"not published: {error}", job)
