"""What training gives, written down: events, states, adapters that are served, and how jobs end.

Training tells of it in the engine's thread, which must not wait for a disk; so it lies in a queue until the thread
``finetune-writer`` comes to it, in order.
"""

import dataclasses
import functools
import logging
import queue
import threading
import time
from collections.abc import Callable
from typing import Any

from preft_jax.adapters.adapter import Adapter
from preft_jax.device.compiles import expected_compiles
from preft_jax.errors import PreftError
from preft_jax.loading import Model
from serve.jobs import OPEN, Checkpoint, JobRecord
from train.checkpoint import CheckpointError
from train.coserve import Hooks
from train.jobs import Job, host_state
from train.results import Result
from train.service.keeping import Publisher, checkpoint_name, model_name, save_state
from train.service.loading import JobError
from train.service.open_jobs import OpenJob
from train.service.options import ServiceOptions
from train.service.records import Entry, RecordError, Records, new_id
from train.step import Slots

_log = logging.getLogger("preft.train")


class Results:
    """Takes what training gives.

    Args:
        records: where jobs are written.
        publisher: lets adapters be served.
        model: the base model.
        changed: the service's lock, notified when a job's status changes.
        open_jobs: by id, the service's.
        options: see there.
        clock: seconds, of any beginning.
    """

    def __init__(
        self,
        records: Records,
        publisher: Publisher,
        model: Model,
        changed: threading.Condition,
        open_jobs: dict[str, OpenJob],
        options: ServiceOptions,
        clock: Callable[[], float],
    ):
        self._records = records
        self._publisher = publisher
        self._model = model
        self._changed = changed
        self._open = open_jobs
        self._options = options
        self._clock = clock
        self._queue: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._write, name="finetune-writer", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def close(self) -> None:
        """Write what lies in the queue, and end the thread."""
        self._queue.put(None)
        self._thread.join()

    # In the engine's thread

    def hooks(self) -> Hooks:
        """Return what training calls."""
        return Hooks(
            joined=self._begins,
            updated=lambda result: self._put(self._updated, result.job, result),
            keeps=self._keeps,
            kept=lambda job, step, state: self._put(self._kept, job, step, state),
            evaluates=self._evaluates,
            evaluated=lambda job, step, loss, tokens: self._put(self._evaluated, job, step, loss),
            left=lambda job, state: self._put(self._left, job, state),
            lost=lambda job: self._put(self._lost, job),
        )

    def ended(self, job: Job, adapter: Adapter) -> None:
        """Take the adapter of a job that is done, or was given up."""
        self._put(self._ended, job, adapter)

    def _put(self, work: Callable[..., None], job: Job, *args: Any) -> None:
        self._queue.put(functools.partial(self._with_open, work, job, *args))

    def _begins(self, job: Job) -> None:
        found = self._open.get(job.name)
        if found is not None:
            found.kept_at = found.updated_at = self._clock()
        self._put(self._joined, job)

    def _keeps(self, job: Job) -> bool:
        found = self._open.get(job.name)
        if found is None:
            return False
        if found.wants_checkpoint:
            found.wants_checkpoint, found.checkpoint_step = False, job.step
        now = self._clock()
        is_due, found.updated_at = found.is_due(job.step, now, self._options), now
        keeps = job.done or (is_due and not found.writing) or found.is_served_at(job.step)
        if keeps:
            found.writing, found.kept_at = True, now
        return keeps

    def _evaluates(self, job: Job) -> bool:
        found = self._open.get(job.name)
        every = 0 if found is None else found.plan.eval_steps
        return job.done or (every > 0 and job.step % every == 0)

    # In the writer's thread

    @expected_compiles()  # An adapter is folded in small programs before it is served.
    def _write(self) -> None:
        while (work := self._queue.get()) is not None:
            try:
                work()
            except Exception:
                _log.exception("what came of a fine-tuning job could not be written")

    def _with_open(self, work: Callable[..., None], job: Job, *args: Any) -> None:
        found = self._open.get(job.name)
        if found is not None:
            work(found, job, *args)

    def _joined(self, found: OpenJob, job: Job) -> None:
        with self._changed:
            if found.entry.record.status == "queued":
                going_on = f", going on after step {job.step}" if job.step else ""
                self.set(found.entry, f"Fine-tuning job started{going_on}", status="running")

    def _updated(self, found: OpenJob, job: Job, result: Result) -> None:
        with self._changed:
            entry, record = found.entry, found.entry.record
            tokens = record.trained_tokens + result.tokens
            entry.record = dataclasses.replace(record, step=result.step, trained_tokens=tokens)
        data = {
            "step": result.step, "total_steps": job.total_steps, "train_loss": result.loss,
            "learning_rate": result.learning_rate, "grad_norm": result.grad_norm, "trained_tokens": tokens,
        }  # fmt: skip
        found.metrics |= {"train_loss": result.loss}
        self._records.append(entry, f"Step {result.step}/{job.total_steps}: training loss={result.loss:.4f}", data)

    def _evaluated(self, found: OpenJob, job: Job, step: int, loss: float) -> None:
        found.metrics |= {"valid_loss": loss, "full_valid_loss": loss}
        data = {"step": step, "total_steps": job.total_steps, "valid_loss": loss, "full_valid_loss": loss}
        self._records.append(found.entry, f"Step {step}/{job.total_steps}: validation loss={loss:.4f}", data)

    def _kept(self, found: OpenJob, job: Job, step: int, state: Slots) -> None:
        try:
            state = host_state(state)
            # Served first: a crash behind the state would leave the checkpoint out.
            if found.is_served_at(step) and found.entry.record.status in OPEN:
                self._serve_checkpoint(found, step, Adapter(job.initial.config, state.params))
            self._save(found, job, step, state)
        finally:
            found.writing = False

    def _save(self, found: OpenJob, job: Job, step: int, state: Slots) -> None:
        """Write a state down, if the job may go on from it."""
        if found.entry.record.status not in OPEN:
            return
        try:
            save_state(found.entry, self._model, job, step, state)
            with self._changed:
                self._records.write(found.entry)
        except (CheckpointError, RecordError) as error:
            _log.error("%s", error)
            self._records.append(
                found.entry, f"The state after step {step} could not be written; the job goes on", level="warn"
            )

    def _serve_checkpoint(self, found: OpenJob, step: int, adapter: Adapter) -> None:
        """Let an adapter be served as it is after so many updates, and delete the checkpoint that is one too many."""
        entry = found.entry
        name, path = checkpoint_name(entry.record, step), entry.adapter_after(step)
        if any(checkpoint.step_number == step for checkpoint in entry.checkpoints):
            return
        try:
            self._publisher.publish(entry.record, name, path, adapter)
        except (PreftError, OSError) as error:
            self._records.append(entry, f"The checkpoint of step {step} is not served: {error}", level="warn")
            return
        checkpoint = Checkpoint(
            id=new_id("ftckpt"), created_at=int(time.time()), step_number=step, fine_tuned_model_checkpoint=name,
            metrics={"step": step, **found.metrics},
        )  # fmt: skip
        with self._changed:
            kept = (*entry.checkpoints, checkpoint)
            most = found.plan.save_total_limit
            entry.checkpoints, dropped = kept[-most:], kept[:-most]
            self._records.write(entry)
        for one in dropped:
            self._publisher.withdraw(one.fine_tuned_model_checkpoint, entry.adapter_after(one.step_number))
        self._records.append(entry, f"Checkpoint created at step {step}: {name}")

    def _left(self, found: OpenJob, job: Job, state: Slots) -> None:
        self._save(found, job, job.step, state)
        self._out(found)

    def _lost(self, found: OpenJob, job: Job) -> None:
        self._records.append(
            found.entry,
            "What the job learned last was lost on the device; it goes on from what is on disk",
            level="warn",
        )
        self._out(found)

    def _out(self, found: OpenJob) -> None:
        """Note that a job has left training: it waits again, unless it was paused or cancelled."""
        with self._changed:
            found.job, found.in_training, found.writing = None, False, False
            record = found.entry.record
            if record.status == "running":
                found.entry.record = dataclasses.replace(record, status="queued")
            elif record.status not in OPEN:
                self.forget(found)
            self._changed.notify_all()

    def _ended(self, found: OpenJob, job: Job, adapter: Adapter) -> None:
        status = found.entry.record.status
        if status not in OPEN or status == "paused":
            self._out(found)
        elif job.failed is not None:
            self._end(found, JobError("training_failed", job.failed))
        else:
            self._succeed(found, job, adapter)

    def _succeed(self, found: OpenJob, job: Job, adapter: Adapter) -> None:
        """Let a finished job's adapter be served."""
        entry = found.entry
        name, failure = model_name(entry.record), None
        try:
            self._publisher.publish(entry.record, name, entry.adapter, adapter)
            with self._changed:
                if entry.record.status in OPEN:
                    self._records.append(entry, f"New fine-tuned model created: {name}")
                    self.set(
                        entry, "The job has successfully completed", status="succeeded", fine_tuned_model=name,
                        step=job.step, total_steps=job.total_steps, finished_at=int(time.time()),
                    )  # fmt: skip
        except (PreftError, OSError) as error:
            failure = JobError("not_served", f"the adapter is trained and cannot be served: {error}")
        if entry.record.status != "succeeded":  # Or it was cancelled a moment ago.
            self._publisher.withdraw(name, entry.adapter)
        self._end(found, failure)

    def _end(self, found: OpenJob, error: JobError | None) -> None:
        with self._changed:
            if error is not None:
                self.fail(found.entry, error)
            self.forget(found)
            self._changed.notify_all()

    # With the lock held

    def set(self, entry: Entry, message: str, **fields: Any) -> None:
        """Change fields of a job's record, on disk too, and append an event.

        Raises:
            RecordError: if it cannot be written; the record is then as it was.
        """
        after: JobRecord = dataclasses.replace(entry.record, **fields)
        self._records.write(entry, after)
        self._records.append(entry, message)
        entry.record = after

    def fail(self, entry: Entry, error: JobError) -> None:
        """Note that a job failed."""
        after = dataclasses.replace(
            entry.record, status="failed", error=error.as_record(), finished_at=int(time.time())
        )
        try:
            self._records.write(entry, after)
        except RecordError as cause:  # It fails again when the service is started again.
            _log.error("the failure of %s is not on disk: %s", entry.record.id, cause)
        self._records.append(entry, f"The job failed: {error}", level="error")
        entry.record = after

    def forget(self, found: OpenJob) -> None:
        """Let go of a job that has ended."""
        self._records.forget_rows(found.entry)
        self._open.pop(found.entry.record.id, None)
