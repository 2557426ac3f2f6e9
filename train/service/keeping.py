"""What is kept of a job beside its record: the trainer's state, and adapters, which are served by name."""

import contextlib
import logging
import shutil
import threading
import time
from pathlib import Path
from typing import Any, NamedTuple

from preft_jax.adapters.adapter import Adapter
from preft_jax.errors import AdapterError
from preft_jax.io.adapter_files import save_adapter
from preft_jax.loading import Model
from serve.jobs import JobRecord
from serve.store.host import AdapterStore
from train.checkpoint import CheckpointError, Checkpoints, latest_in
from train.jobs import Job, first_state, host_state
from train.service.loading import JobError
from train.service.records import Entry
from train.step import Slots

_log = logging.getLogger("preft.train")

_STATE = "job"

_LOOK_SECONDS = 0.05


class Restored(NamedTuple):
    """A job's state as it was kept: with so many updates done, and so many tokens trained on."""

    step: int
    trained_tokens: int
    state: Slots


def save_state(entry: Entry, model: Model, job: Job, step: int, state: Slots) -> None:
    """Write a job's state after so many updates; the one before stays until this one is whole.

    Raises:
        CheckpointError: if it cannot be written.
    """
    checkpoints = Checkpoints(entry.state)
    try:
        if step not in checkpoints.steps:
            meta = {"trained_tokens": entry.record.trained_tokens, "data": job.data_digest, "model": model.kv_digest}
            checkpoints.save(step, meta, {_STATE: host_state(state)})
    finally:
        checkpoints.close()


def restore(entry: Entry, model: Model, job: Job) -> Restored | None:
    """Return the newest state that is whole; None: the job has none yet.

    Raises:
        JobError: if it cannot be read, or belongs to another base model or other rows.
    """
    try:
        found = latest_in(entry.state)
        if found is None:
            return None
        if found.meta["model"] != model.kv_digest:
            raise JobError("other_model", "the job was begun on another base model; create it again")
        if found.meta["data"] != job.data_digest:
            raise JobError(
                "invalid_training_file", "the job's rows give other tokens than when it was begun; create it again",
                "training_file",
            )  # fmt: skip
        return Restored(found.step, found.meta["trained_tokens"], found.state(_STATE, first_state(job)))
    except CheckpointError as error:
        _log.error("the state of %s cannot be used: %s", entry.record.id, error)
        raise JobError("damaged_state", "what the job has learned was damaged on disk; create it again") from error


def model_name(record: JobRecord) -> str:
    """Return the name that a job's adapter is served by: ``ft:BASE:SUFFIX:ID``, the suffix its owner's name if none.

    An owner with a colon, as a key without a user has, gives none.
    """
    middle = record.spec.suffix or record.owner or ""
    return f"ft:{record.model}:{middle if middle.isprintable() and ':' not in middle else ''}:{record.id[-8:]}"


def checkpoint_name(record: JobRecord, step: int) -> str:
    """Return the name that a job's adapter after so many updates is served by."""
    return f"{model_name(record)}:ckpt-step-{step}"


def _made(entry: Entry) -> dict[Path, str]:
    """Return the adapters in a job's directory, whole or not, and the names that are theirs."""
    found = {entry.adapter: model_name(entry.record)} if entry.adapter.exists() else {}
    for path in entry.directory.glob(f"{entry.adapter_after(0).name[:-1]}*"):
        found[path] = checkpoint_name(entry.record, int(path.name.rpartition("-")[2]))
    return found


class Publisher:
    """Saves adapters and lets a store serve them: a name stands for an adapter that is whole on disk, or for nothing.

    Args:
        store: of the adapters that requests name.
    """

    def __init__(self, store: AdapterStore):
        self._store = store

    def check(self, config: Any) -> None:
        """Raise ``AdapterError`` for an adapter that the engine could never serve."""
        self._store.check(config)

    def publish(self, record: JobRecord, name: str, path: Path, adapter: Adapter) -> None:
        """Save an adapter and let requests name it, its owner's alone.

        Raises:
            AdapterError: if it cannot be saved or served; nothing of it is then left.
        """
        try:
            save_adapter(path, adapter)
            self._store.register(name, path, owner=record.owner, replace=True)
        except Exception:
            self.withdraw(name, path)
            raise

    def withdraw(self, name: str, path: Path) -> None:
        """Let a name stand for nothing, and delete its adapter once no request waits to read it."""
        with contextlib.suppress(AdapterError):
            self._store.unregister(name)
        self._remove(path)

    def serves(self, name: str, path: Path) -> bool:
        """Whether a name stands for the adapter in a directory."""
        known = self._store.get(name)
        return known is not None and known.path == str(path)

    def delete(self, name: str, path: Path) -> None:
        """Do as ``withdraw`` does, or nothing.

        Raises:
            AdapterError: if the name cannot be taken away; it stands for what it did before.
        """
        self._store.unregister(name)
        self._remove(path)

    def _remove(self, path: Path) -> None:
        """Delete a directory, in a thread that waits while requests are to read it: they were taken before."""

        def wait() -> None:
            while self._store.reads(path):
                time.sleep(_LOOK_SECONDS)
            shutil.rmtree(path, ignore_errors=True)

        if self._store.reads(path):
            threading.Thread(target=wait, name="finetune-remover", daemon=True).start()
        else:
            shutil.rmtree(path, ignore_errors=True)

    def take_up(self, entry: Entry) -> None:
        """Let requests name what a job of an earlier process has published, and delete what it was about to."""
        record = entry.record
        names = {entry.adapter_after(one.step_number): one.fine_tuned_model_checkpoint for one in entry.checkpoints}
        if record.fine_tuned_model is not None and not entry.deleted:
            names[entry.adapter] = record.fine_tuned_model
        for path, name in _made(entry).items():
            if path not in names:
                self.withdraw(name, path)
        for path, name in names.items():
            self._again(record, name, path)

    def _again(self, record: JobRecord, name: str, path: Path) -> None:
        """Register an adapter again if the store does not remember it.

        A store that does, and to which the name is unknown, was told to forget it.
        """
        known = self._store.get(name)
        forgotten = not self._store.durable if known is None else not Path(known.path).exists()
        if not forgotten or not path.is_dir():
            return
        try:
            self._store.register(name, path, owner=record.owner, replace=True)
        except (AdapterError, OSError) as error:
            _log.error("the adapter %s is not served again: %s", name, error)
