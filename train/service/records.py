"""Jobs on disk: a directory each, which survives the process.

    STATE/ftjob-.../record.json       the job and the checkpoints that it kept, replaced as a whole, with a checksum
                    events.jsonl      what happened to it, a line each
                    training.jsonl    its rows, and validation.jsonl those held out, while it is open
                    state/            its parameters and optimizer state after its latest updates, while it is open
                    adapter/          its adapter, once it has succeeded
                    adapter-step-N/   its adapter after N updates, where it was to be kept

A job is there from one moment on: its directory is made under another name and then renamed. A line of events that a
crash has cut is left out.
"""

import contextlib
import dataclasses
import hashlib
import json
import logging
import os
import secrets
import shutil
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from preft_jax.errors import ConfigError, PreftError
from preft_jax.io.safetensors_io import sync_directory, write_file
from serve.jobs import Checkpoint, Event, JobRecord, JobSpec

_RECORD = "record.json"
_EVENTS = "events.jsonl"
_TEMPORARY = ".new-"
_LONGEST = 2**24
_VERSION = 1

_log = logging.getLogger("preft.train")


class RecordError(PreftError):
    """A job's directory that cannot be written or read."""


@dataclasses.dataclass
class Entry:
    """A job as it is in its directory, and in memory where that is further.

    Attributes:
        record: of the job. It is replaced, never changed.
        asked: its hyperparameters as they were given; those of the record have numbers in place of ``"auto"``.
        directory: of the job.
        checkpoints: that it kept, the oldest first; replaced, never changed.
        deleted: whether its adapter was deleted after it had succeeded.
    """

    record: JobRecord
    asked: Mapping[str, Any]
    directory: Path
    checkpoints: tuple[Checkpoint, ...] = ()
    deleted: bool = False

    @property
    def state(self) -> Path:
        """Where the trainer's state is."""
        return self.directory / "state"

    @property
    def adapter(self) -> Path:
        """Where the adapter is."""
        return self.directory / "adapter"

    def adapter_after(self, step: int) -> Path:
        """Return where the adapter after so many updates is."""
        return self.directory / f"adapter-step-{step}"

    def rows(self, what: Literal["training", "validation"]) -> Path | None:
        """Return where the job's rows are; None: it has none of these."""
        given = self.record.spec.training_path if what == "training" else self.record.spec.validation_path
        return None if given is None else self.directory / _rows_name(what, given)


class Records:
    """The jobs of one state directory. Its caller has a lock: one thread at a time writes an entry.

    Args:
        directory: made if it is not there. One process at a time may use it.

    Raises:
        ConfigError: if it cannot be used.
    """

    def __init__(self, directory: Path):
        try:
            directory.mkdir(parents=True, exist_ok=True)
            for left in directory.glob(f"{_TEMPORARY}*"):
                shutil.rmtree(left, ignore_errors=True)
        except OSError as error:
            raise ConfigError(f"{directory} cannot be used for fine-tuning jobs: {error}; give another one") from error
        self._directory = directory.resolve()
        self._appending = threading.Lock()

    def load(self) -> list[Entry]:
        """Return all jobs, the oldest first; one whose record is damaged is left where it is, and the log says so."""
        found = []
        for path in self._directory.iterdir():
            if path.name.startswith(".") or not path.is_dir():
                continue
            try:
                found.append(_read(path))
            except (OSError, ValueError, LookupError, TypeError) as error:
                _log.error("the record of a fine-tuning job is damaged: %s (%s)", path, error)
        return sorted(found, key=lambda entry: entry.record.id)

    def create(self, record: JobRecord, asked: Mapping[str, Any]) -> Entry:
        """Make a job's directory, with its rows: another name of uploads, and a copy of files that may change.

        Raises:
            ConfigError: if a file of rows is not there.
            RecordError: if there is no room; nothing of the job is then left.
        """
        made = self._directory / f"{_TEMPORARY}{record.id}"
        entry = Entry(record, dict(asked), made)
        try:
            made.mkdir()
            spec = record.spec
            for what, path in (("training", spec.training_path), ("validation", spec.validation_path)):
                if path is not None:
                    if not path.is_file():
                        raise ConfigError(f"the {what} file is not there any more; upload it again")
                    _take_rows(path, made / _rows_name(what, path), link=spec.uploaded)
            self.write(entry)
            (made / _EVENTS).touch()
            sync_directory(made)
            entry.directory = self._directory / record.id
            os.rename(made, entry.directory)
            sync_directory(self._directory)
        except OSError as error:
            raise RecordError(f"the job cannot be written to disk: {error.strerror or error}; make room") from error
        finally:
            shutil.rmtree(made, ignore_errors=True)
        return entry

    def write(self, entry: Entry, record: JobRecord | None = None) -> None:
        """Write an entry's record, or another in its place, and its checkpoints; a crash leaves what was, or this.

        Raises:
            RecordError: if that is impossible; what was there is then still there.
        """
        content = {
            "version": _VERSION,
            "record": _plain(record or entry.record),
            "asked": entry.asked,
            "checkpoints": [dataclasses.asdict(checkpoint) for checkpoint in entry.checkpoints],
            "deleted": entry.deleted,
        }
        text = json.dumps(content | {"sha256": _checksum(content)}, indent=1) + "\n"
        write_file(entry.directory / _RECORD, text.encode(), error=RecordError)

    def append(
        self,
        entry: Entry,
        message: str,
        data: Mapping[str, Any] | None = None,
        *,
        level: Literal["info", "warn", "error"] = "info",
    ) -> None:
        """Append an event to a job's; with ``data`` it is one of figures. A full disk costs the event, no more."""
        event = Event(
            id=new_id("ftevent"), created_at=int(time.time()), level=level, message=message,
            type="message" if data is None else "metrics", data=data or {},
        )  # fmt: skip
        try:
            with self._appending, open(entry.directory / _EVENTS, "a+b") as file:
                if file.tell() and os.pread(file.fileno(), 1, file.tell() - 1) != b"\n":
                    file.write(b"\n")  # A crash has cut the last one.
                file.write(json.dumps(dataclasses.asdict(event)).encode() + b"\n")
        except OSError as error:
            _log.warning("an event of %s is lost: %s", entry.record.id, error)

    def events(self, entry: Entry) -> list[Event]:
        """Return a job's events, the newest first."""
        try:
            lines = (entry.directory / _EVENTS).read_bytes().splitlines()
        except OSError:
            return []
        found = []
        for line in reversed(lines):
            with contextlib.suppress(ValueError, TypeError):
                found.append(Event(**json.loads(line)))
        return found

    def forget_after(self, entry: Entry, step: int) -> None:
        """Drop figures of updates after this one, which are made again."""
        events = self.events(entry)
        kept = [event for event in reversed(events) if event.type == "message" or event.data.get("step", 0) <= step]
        if len(kept) != len(events):
            text = "".join(json.dumps(dataclasses.asdict(event)) + "\n" for event in kept)
            with self._appending:
                write_file(entry.directory / _EVENTS, text.encode(), error=RecordError)

    def forget_rows(self, entry: Entry) -> None:
        """Delete what only an open job needs: its rows and its trainer's state."""
        for path in (entry.rows("training"), entry.rows("validation")):
            if path is not None:
                with contextlib.suppress(OSError):
                    path.unlink(missing_ok=True)
        shutil.rmtree(entry.state, ignore_errors=True)


def new_id(kind: str) -> str:
    """Return a new id, such as ``ftjob-`` and 24 letters and digits; later ones are greater."""
    return f"{kind}-{time.time_ns():016x}{secrets.token_hex(4)}"


def _take_rows(source: Path, target: Path, *, link: bool) -> None:
    """Copy a file, or give it another name where it may be linked and can be; it is on disk when this returns."""
    linked = False
    if link:
        with contextlib.suppress(OSError):
            os.link(source, target)
            linked = True
    if not linked:
        shutil.copyfile(source, target)
    with open(target, "rb") as file:
        os.fsync(file.fileno())


def _rows_name(what: str, given: Path) -> str:
    return what + "".join(given.suffixes[-2:])


def _plain(record: JobRecord) -> dict[str, Any]:
    fields = dataclasses.asdict(record)
    for name in ("training_path", "validation_path"):
        path = fields["spec"][name]
        fields["spec"][name] = None if path is None else str(path)
    return fields


def _read(path: Path) -> Entry:
    with open(path / _RECORD, "rb") as file:
        content = json.loads(file.read(_LONGEST))
    if content.pop("sha256") != _checksum(content) or content["version"] != _VERSION:
        raise ValueError("it does not hold what was written to it")
    fields = content["record"]
    spec = fields["spec"]
    for name in ("training_path", "validation_path"):
        spec[name] = None if spec[name] is None else Path(spec[name])
    record = JobRecord(**fields | {"spec": JobSpec(**spec)})
    checkpoints = tuple(Checkpoint(**one) for one in content["checkpoints"])
    return Entry(record, content["asked"], path, checkpoints, content.get("deleted", False))


def _checksum(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
