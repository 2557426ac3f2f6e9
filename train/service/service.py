"""Fine-tuning jobs in the process of an engine: created, trained beside requests, and served when they are done.

    service = Service(model, store, Path("state/jobs"), name="tiny")
    engine = Engine(model, config, store=store, background=service.training)
    job = service.create(JobSpec(training_file="rows.jsonl", training_path=Path("rows.jsonl")), owner=None)

Four threads share the work. The caller's changes records. ``finetune-reader`` reads rows, and hands jobs over to
training when it is their turn. ``finetune-compiler`` compiles what is new with them (``train/ahead.py``). Training runs
in the engine's thread, and what it gives lies in a queue that ``finetune-writer`` empties: events, states on disk,
adapters to be served.
"""

import contextlib
import dataclasses
import logging
import secrets
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from preft_jax.device.compiles import expected_compiles
from preft_jax.errors import AdapterError, ConfigError, LimitError, PreftError, shown
from preft_jax.loading import Model
from serve.jobs import OPEN, Checkpoint, Event, JobRecord, JobSpec, Status
from serve.store.host import AdapterStore
from train.coserve import Hooks, Training
from train.cutting import WindowOptions
from train.jobs import Job
from train.service.keeping import Publisher, restore
from train.service.loading import GivenUpError, JobError, load_job
from train.service.open_jobs import OpenJob
from train.service.options import Plan, ServiceOptions, check_spec, make_plan
from train.service.records import Entry, RecordError, Records, new_id
from train.service.results import Results
from train.service.turns import Turns
from train.trainer import Trainer, TrainOptions

_log = logging.getLogger("preft.train")


class Service:
    """``serve.jobs.FineTuning`` over ``train.coserve.Training``.

    Args:
        model: the base model, as the engine has it.
        store: the engine's; adapters are served through it.
        directory: of the jobs, one process's at a time. What is in it goes on.
        name: of the base model, for records and names of adapters; None: the model's own.
        options: what is allowed.
        windows: how training is cut into units; None: as suits the model and the device.
        train: how the trainer uses the device.
        make_training: makes what trains, given hooks and who is told of jobs that ended; None: a ``Training``.
        load: reads a job's rows.
        clock: seconds, of any beginning.

    Attributes:
        training: the work that the engine is to be given as ``background``.
        wake: called when training has something to do again: ``AsyncEngine.wake`` where there is such a thing.

    Raises:
        ConfigError: if the directory cannot be used.
    """

    def __init__(
        self,
        model: Model,
        store: AdapterStore,
        directory: Path,
        *,
        name: str | None = None,
        options: ServiceOptions = ServiceOptions(),
        windows: WindowOptions | None = None,
        train: TrainOptions = TrainOptions(),
        make_training: Callable[[Hooks, Callable[..., object]], Any] | None = None,
        load: Callable[..., Job] = load_job,
        clock: Callable[[], float] = time.monotonic,
    ):
        self.options = options
        self.wake: Callable[[], object] = lambda: None
        self._model = model
        self._name = name or model.name or "model"
        self._load = load
        self._records = Records(directory)
        self._publisher = Publisher(store)
        self._turns = Turns()
        # Guards records, their files and what jobs wait for. The engine's thread never takes it.
        self._changed = threading.Condition(threading.RLock())
        self._entries: dict[str, Entry] = {}
        self._open: dict[str, OpenJob] = {}
        self._closed = False
        self._results = Results(self._records, self._publisher, model, self._changed, self._open, options, clock)
        hooks, ended = self._results.hooks(), self._results.ended
        self.training = (
            make_training(hooks, ended)
            if make_training is not None
            else Training(
                Trainer(model, options=train), windows or WindowOptions.suited(model.config), ended=ended, hooks=hooks
            )
        )
        self._take_up()
        self._reader = threading.Thread(target=self._read_jobs, name="finetune-reader", daemon=True)
        self._results.start()
        self._reader.start()

    # Records

    def get(self, job_id: str) -> JobRecord | None:
        """Return a job."""
        entry = self._entries.get(job_id)
        return None if entry is None else entry.record

    def list(self) -> Sequence[JobRecord]:
        """Return all jobs, the newest first."""
        with self._changed:
            return [entry.record for _, entry in sorted(self._entries.items(), reverse=True)]

    def events(self, job_id: str) -> Sequence[Event]:
        """Return what happened to a job, the newest first."""
        return self._records.events(self._entry(job_id))

    def checkpoints(self, job_id: str) -> Sequence[Checkpoint]:
        """Return the adapters that a job kept, the newest first."""
        return self._entry(job_id).checkpoints[::-1]

    # Changes

    def create(self, spec: JobSpec, *, owner: str | None) -> JobRecord:
        """Queue a job; its rows are read later, and a bad one makes the job fail.

        Raises:
            ConfigError: if a hyperparameter is unknown or out of bounds, or the file is not there.
            LimitError: if its owner, or everybody together, has as many open jobs as are allowed, or the disk is full.
        """
        check_spec(spec)
        spec = dataclasses.replace(spec, seed=secrets.randbits(31) if spec.seed is None else spec.seed)
        job_id, asked = new_id("ftjob"), spec.hyperparameters
        plan = self._plan(job_id, spec)
        spec = dataclasses.replace(spec, hyperparameters=plan.hyperparameters)
        record = JobRecord(
            id=job_id, owner=owner, model=self._name, spec=spec, status="validating_files", created_at=int(time.time())
        )
        with self._changed:
            self._check_room(owner)
            try:
                entry = self._records.create(record, asked)
            except RecordError as error:
                raise LimitError(str(error)) from error
            self._records.append(entry, f"Created fine-tuning job: {record.id}")
            self._records.append(entry, f"Validating training file: {spec.training_file}")
            self._entries[record.id] = entry
            self._open[record.id] = OpenJob(entry, plan)
            self._changed.notify_all()
        return record

    def cancel(self, job_id: str) -> JobRecord:
        """End a job; the checkpoints that it kept stay.

        Raises:
            ConfigError: if it has ended, or there is no such job.
        """
        with self._changed:
            found = self._change(job_id, OPEN, "cancelled", "Fine-tuning job cancelled", finished_at=int(time.time()))
            self._part(found)
            if not found.in_training:
                self._results.forget(found)
        self.wake()
        return found.entry.record

    def pause(self, job_id: str) -> JobRecord:
        """Let a job wait, with all that it learned; what it had of an update that is under way is learned too.

        Raises:
            ConfigError: if it does not run and does not wait to.
        """
        with self._changed:
            found = self._change(job_id, OPEN - {"paused"}, "paused", "Fine-tuning job paused")
            self._part(found)
        self.wake()
        return found.entry.record

    def resume(self, job_id: str) -> JobRecord:
        """Let a paused job wait for its turn.

        Raises:
            ConfigError: if it is not paused.
        """
        with self._changed:
            entry = self._entry(job_id)
            after: Status = "validating_files" if entry.record.total_steps is None else "queued"
            self._change(job_id, {"paused"}, after, "Fine-tuning job resumed")
        return entry.record

    def checkpoint(self, job_id: str) -> JobRecord:
        """Let a running job's adapter be kept and served as it is after its next update.

        Raises:
            ConfigError: if it does not run.
        """
        with self._changed:
            entry = self._entry(job_id)
            if entry.record.status != "running":
                raise ConfigError(f"the job is {entry.record.status}; a checkpoint can be taken of a running one")
            self._open[job_id].wants_checkpoint = True
        return entry.record

    def delete_model(self, name: str) -> bool:
        """Delete the adapter that a name stands for, if a job has made it; the job and what happened to it stay.

        Requests that were taken before end as they would have.

        Raises:
            ConfigError: if the service was closed.
            LimitError: if the disk is full, as ``AdapterError`` if the store cannot write it; nothing is deleted then.
        """
        with self._changed:
            entry, path = self._made(name)
            if entry is None or not self._publisher.serves(name, path):
                return False
            if self._closed:
                raise ConfigError("the server is shutting down; try again when it is back")
            before = entry.deleted, entry.checkpoints
            entry.deleted |= path == entry.adapter
            entry.checkpoints = tuple(one for one in before[1] if one.fine_tuned_model_checkpoint != name)
            try:
                self._records.write(entry)  # First: what a crash leaves undone is done by ``take_up``.
                self._publisher.delete(name, path)
            except (AdapterError, RecordError) as error:
                entry.deleted, entry.checkpoints = before
                with contextlib.suppress(RecordError):
                    self._records.write(entry)
                if isinstance(error, RecordError):
                    raise LimitError(str(error)) from error
                raise
            self._records.append(entry, f"Model deleted: {name}")
        return True

    @property
    def is_compiling(self) -> bool:
        """Whether programs are being compiled, which nothing can end, ``close`` neither."""
        return self.training.is_compiling

    def close(self) -> None:
        """Keep what open jobs have learned, and stop. They go on when there is a service of the directory again.

        An engine that still runs gets no more units.
        """
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._reader.join()
        self.training.close()
        self._results.close()

    # With the lock held

    def _made(self, name: str) -> tuple[Entry | None, Path]:
        """Return whose adapter has a name, and where it is."""
        for entry in self._entries.values():
            if entry.record.fine_tuned_model == name:
                return entry, entry.adapter
            for one in entry.checkpoints:
                if one.fine_tuned_model_checkpoint == name:
                    return entry, entry.adapter_after(one.step_number)
        return None, Path()

    def _entry(self, job_id: str) -> Entry:
        entry = self._entries.get(job_id)
        if entry is None:
            raise ConfigError(f"there is no fine-tuning job {shown(job_id)}")
        return entry

    def _change(
        self, job_id: str, allowed: "frozenset[Status] | set[Status]", status: Status, message: str, **fields: Any
    ) -> OpenJob:
        """Give a job another status, on disk too."""
        entry = self._entry(job_id)
        if entry.record.status not in allowed:
            raise ConfigError(
                f"the job is {entry.record.status}; this can be done to one that is {', '.join(sorted(allowed))}"
            )
        if self._closed:
            raise ConfigError("the server is shutting down; try again when it is back")
        try:
            self._results.set(entry, message, status=status, **fields)
        except RecordError as error:
            raise LimitError(str(error)) from error
        self._changed.notify_all()
        return self._open[job_id]

    def _part(self, found: OpenJob) -> None:
        """Let a job leave training, if it is there."""
        if found.job is not None:
            self.training.leave(found.job)

    def _check_room(self, owner: str | None) -> None:
        if self._closed:
            raise LimitError("the server is shutting down; try again when it is back")
        records = [entry.record for entry in self._entries.values() if entry.record.status in OPEN]
        own = sum(record.owner == owner for record in records)
        for count, most, whose in (
            (own, self.options.max_open_jobs_per_owner, "you have"),
            (len(records), self.options.max_open_jobs, "there are"),
        ):
            if count >= most:
                raise LimitError(
                    f"{whose} {count} fine-tuning jobs that have not ended; allowed: up to {most}; wait for one, or "
                    "cancel one"
                )

    def _plan(self, job_id: str, spec: JobSpec) -> Plan:
        plan = make_plan(job_id, spec, self._model.config, self.options)
        try:
            self._publisher.check(plan.config.adapter)
        except AdapterError as error:
            raise ConfigError(str(error)) from error
        return plan

    def _take_up(self) -> None:
        """Go on with the jobs of an earlier process, and serve its adapters."""
        for entry in self._records.load():
            record = entry.record
            self._entries[record.id] = entry
            self._publisher.take_up(entry)
            if record.status not in OPEN:
                self._records.forget_rows(entry)
                continue
            if record.status == "running":
                entry.record = dataclasses.replace(record, status="queued")
            try:
                plan = self._plan(record.id, dataclasses.replace(record.spec, hyperparameters=entry.asked))
                self._open[record.id] = OpenJob(entry, plan)
            except PreftError as error:  # Less is allowed than when it was created.
                self._results.fail(entry, JobError("invalid_hyperparameters", str(error), "hyperparameters"))
                self._records.forget_rows(entry)

    # In the reader's thread

    @expected_compiles()  # What a new adapter starts from is computed in small programs.
    def _read_jobs(self) -> None:
        while True:
            with self._changed:
                while not self._closed and (task := self._next_task()) is None:
                    self._changed.wait()
                if self._closed:
                    return
            assert task is not None
            work, found = task
            try:
                work(found)
            except GivenUpError:
                self._stay(found)
            except Exception as error:
                _log.info("the fine-tuning job %s failed", found.entry.record.id, exc_info=error)
                unknown = f"the job could not be begun ({type(error).__name__}); the server's log says why"
                self._fail(found, error if isinstance(error, JobError) else JobError("internal_error", unknown))

    def _next_task(self) -> tuple[Callable[[OpenJob], None], OpenJob] | None:
        """Return what the reader does next: hand a job over where there is room, or read a new one's rows."""
        running = [found.entry.record for found in self._open.values() if found.in_training]
        if len(running) < self.options.max_jobs:
            record = self._turns.choose(self._waiting("queued"), running)
            if record is not None:
                self._turns.took(record)
                self._open[record.id].in_training = True
                return self._hand_over, self._open[record.id]
        record = self._turns.choose(self._waiting("validating_files"), running)
        return None if record is None else (self._validate, self._open[record.id])

    def _waiting(self, status: Status) -> "list[JobRecord]":
        records = (found.entry.record for found in self._open.values() if not found.in_training)
        return [record for record in records if record.status == status]

    def _read(self, found: OpenJob, status: Status) -> Job:
        def wanted() -> bool:
            return not self._closed and found.entry.record.status == status

        return self._load(found.entry, found.plan, self._model, self.options, wanted)

    def _validate(self, found: OpenJob) -> None:
        job = self._read(found, "validating_files")
        with self._changed:
            if found.entry.record.status == "validating_files":
                found.read = job if not any(other.read for other in self._open.values()) else None
                self._results.set(
                    found.entry, "Files validated, moving job to queued state", status="queued",
                    total_steps=job.total_steps,
                )  # fmt: skip

    def _hand_over(self, found: OpenJob) -> None:
        """Read a job's rows and let it join training, with what it has learned."""
        job, found.read = found.read or self._read(found, "queued"), None
        kept = restore(found.entry, self._model, job)
        with self._changed:
            entry = found.entry
            if entry.record.status != "queued" or self._closed:
                raise GivenUpError(entry.record.id)
            job.step = 0 if kept is None else kept.step
            entry.record = dataclasses.replace(
                entry.record, step=job.step, trained_tokens=0 if kept is None else kept.trained_tokens
            )
            self._records.forget_after(entry, job.step)
            found.job = job
            self.training.join(job, None if kept is None else kept.state)
        self.wake()

    def _stay(self, found: OpenJob) -> None:
        """Leave a job that was not handed over to those that want something else of it."""
        with self._changed:
            found.in_training, found.read = False, None
            if found.entry.record.status == "cancelled":
                self._results.forget(found)
            self._changed.notify_all()

    def _fail(self, found: OpenJob, error: JobError) -> None:
        with self._changed:
            if found.entry.record.status == "paused":
                self._stay(found)  # It is told when the job goes on.
                return
            if found.entry.record.status in OPEN:
                self._results.fail(found.entry, error)
            self._results.forget(found)
            self._changed.notify_all()
