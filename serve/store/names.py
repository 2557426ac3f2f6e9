"""The registered adapters: what each name stands for, kept in a file that survives the process.

A change is on disk when the call that makes it returns (SQLite in WAL mode, synchronous). Each row has two checksums:
over what was asked for (name, path, owner, pin, time), and over all of it. The sum of all rows' stands beside them, so
that a row that is lost is noticed too. Where only what was read of an adapter is damaged, ``Registry.damaged`` says
what it can be read from again.
"""

import contextlib
import dataclasses
import hashlib
import json
import logging
import os
import sqlite3
import threading
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from preft_jax.adapters.config import AdapterConfig
from preft_jax.errors import AdapterError, ConfigError

_TABLES = """
CREATE TABLE IF NOT EXISTS adapters (
    name TEXT PRIMARY KEY, path TEXT NOT NULL, digest TEXT NOT NULL, config TEXT NOT NULL, num_bytes INTEGER NOT NULL,
    owner TEXT, pinned INTEGER NOT NULL, created REAL NOT NULL, asked TEXT NOT NULL, whole TEXT NOT NULL
) STRICT;
CREATE TABLE IF NOT EXISTS checksums (sum TEXT NOT NULL) STRICT;
"""

_VERSION = 2
_ASKED = ("name", "path", "owner", "pinned", "created")
_READ = ("digest", "config", "num_bytes")

_log = logging.getLogger("preft.store")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Registered:
    """What a name stands for, and all that a request needs to know of an adapter.

    Attributes:
        name: by which requests ask for it.
        path: the directory that it was read from; empty if it was published from memory.
        digest: of what it computes; another one means another adapter.
        config: its configuration.
        num_bytes: of its rank pages.
        owner: whose it is, or None: everybody's.
        pinned: whether it stays in host memory.
        created: when it was registered, seconds since 1970.
    """

    name: str
    path: str
    digest: str
    config: AdapterConfig
    num_bytes: int
    owner: str | None = None
    pinned: bool = False
    created: float = 0.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Asked:
    """What was asked for when a name was registered; fields as in ``Registered``."""

    name: str
    path: str
    owner: str | None
    pinned: bool
    created: float


class Registry:
    """Adapters by name, in memory and, if a file is given, on disk. Thread-safe.

    Attributes:
        damaged: names whose rows do not say any more what was read; they stand for nothing until they are put again.

    Raises:
        ConfigError: if the file is not a registry of this version, or cannot be used.
    """

    def __init__(self, path: Path | None = None):
        self._path = path
        self._lock = threading.Lock()
        self._adapters: dict[str, Registered] = {}
        self.damaged: list[Asked] = []
        try:
            self._file = _connect(path)
            try:
                for row in self._read():
                    self._take(row)
            except BaseException:
                self._file.close()
                raise
        except (sqlite3.Error, ValueError, TypeError, LookupError, OverflowError) as error:
            if isinstance(error, ConfigError):
                raise
            raise ConfigError(f"{path} cannot be used as a registry of adapters: {error}; move it away") from error

    def _read(self) -> list[dict[str, Any]]:
        """Return the rows that can be read, in a file that is whole: a damaged one is put aside."""
        try:
            (problem,) = self._file.execute("PRAGMA integrity_check(1)").fetchone()
        except sqlite3.DatabaseError as error:
            problem = str(error)
        if problem != "ok":
            return self._begin_anew(problem)
        rows = list(_rows(self._file))
        (total,) = self._file.execute("SELECT sum FROM checksums").fetchone() or (_sum([]),)
        if total != _sum(rows):
            self._say_damaged("the registry of adapters has not the rows that were written to it")
            with self._file:
                self._set_sum(_sum(rows))
        return rows

    def _begin_anew(self, problem: str) -> list[dict[str, Any]]:
        """Put the file aside, and return what can be read of it, written to a new one."""
        assert self._path is not None
        rows = []
        with contextlib.suppress(sqlite3.Error):
            rows.extend(_rows(self._file))  # As far as it gets.
        self._file.close()
        aside = self._path.with_name(f"{self._path.name}.damaged")
        os.replace(self._path, aside)
        for suffix in ("-wal", "-shm"):
            self._path.with_name(self._path.name + suffix).unlink(missing_ok=True)
        self._file = _connect(self._path)
        for row in rows:
            if row["whole"] == _checksum(row, (*_ASKED, *_READ)):
                self._write(_PUT, row)
        self._say_damaged(f"the registry of adapters is damaged ({problem}) and was put aside as {aside}")
        return rows

    def _say_damaged(self, what: str) -> None:
        facts = {"file": str(self._path), "advice": "compare the list of models, and register again what is missing"}
        _log.error("%s", what, extra={"facts": facts})

    def _take(self, row: Mapping[str, Any]) -> None:
        """Let a row's name stand for its adapter, as far as the row is whole."""
        if row["asked"] != _checksum(row, _ASKED):
            facts = {"adapter": ascii(row["name"]), "advice": "register it again"}
            _log.error("the row of a registered adapter is damaged", extra={"facts": facts})
        elif row["whole"] != _checksum(row, (*_ASKED, *_READ)):
            asked: dict[str, Any] = {field: row[field] for field in _ASKED}
            asked["pinned"] = bool(asked["pinned"])
            self.damaged.append(Asked(**asked))
        else:
            self._adapters[row["name"]] = _from_row(row)

    def get(self, name: str) -> Registered | None:
        """Return what a name stands for, or None."""
        return self._adapters.get(name)

    def list(self) -> list[Registered]:
        """Return all adapters by name."""
        with self._lock:
            return [self._adapters[name] for name in sorted(self._adapters)]

    def put(self, adapter: Registered) -> Registered | None:
        """Let a name stand for an adapter; return what it stood for."""
        row = dataclasses.asdict(adapter) | {"config": json.dumps(dataclasses.asdict(adapter.config))}
        row |= {"pinned": int(adapter.pinned), "created": float(adapter.created)}
        row |= {"asked": _checksum(row, _ASKED), "whole": _checksum(row, (*_ASKED, *_READ))}
        with self._lock:
            self._write(_PUT, row)
            old, self._adapters[adapter.name] = self._adapters.get(adapter.name), adapter
        return old

    def remove(self, name: str) -> Registered | None:
        """Forget a name; return what it stood for."""
        with self._lock:
            if name not in self._adapters:
                return None
            self._write("DELETE FROM adapters WHERE name = :name", {"name": name})
            return self._adapters.pop(name)

    def close(self) -> None:
        """Close the file."""
        with self._lock:
            self._file.close()

    def _write(self, statement: str, row: Mapping[str, object]) -> None:
        try:
            with self._file:
                (total,) = self._file.execute("SELECT sum FROM checksums").fetchone() or (_sum(_rows(self._file)),)
                gone = list(_rows(self._file, row["name"]))
                self._file.execute(statement, row)
                self._set_sum(_difference(total, gone, list(_rows(self._file, row["name"]))))
        except sqlite3.Error as error:
            raise AdapterError(f"{self._path} cannot be written: {error}; nothing was changed") from error

    def _set_sum(self, total: str) -> None:
        self._file.execute("DELETE FROM checksums")
        self._file.execute("INSERT INTO checksums VALUES (?)", (total,))


_PUT = """
INSERT OR REPLACE INTO adapters VALUES (
    :name, :path, :digest, :config, :num_bytes, :owner, :pinned, :created, :asked, :whole
)
"""


def _connect(path: Path | None) -> sqlite3.Connection:
    """Open a registry's file, with its tables.

    Raises:
        ConfigError: if it is of another version.
        sqlite3.Error: if it cannot be used.
    """
    file = sqlite3.connect(":memory:" if path is None else path, check_same_thread=False)
    file.text_factory = lambda data: data.decode(errors="surrogateescape")  # Damaged texts fail the checksums.
    try:
        with file:
            file.execute("PRAGMA journal_mode = WAL")
            file.execute("PRAGMA synchronous = FULL")
            # What is written goes to the file itself at once: SQLite takes a damaged log for one that was not finished.
            file.execute("PRAGMA wal_autocheckpoint = 1")
            (version,) = file.execute("PRAGMA user_version").fetchone()
            if version not in (0, _VERSION):
                raise ConfigError(f"{path} is a registry of version {version}; this program knows {_VERSION}")
            file.execute(f"PRAGMA user_version = {_VERSION}")
            file.executescript(_TABLES)
    except BaseException:
        file.close()
        raise
    return file


def _rows(file: sqlite3.Connection, *names: object) -> Iterable[dict[str, Any]]:
    """Yield the rows, or that of one name, by column."""
    cursor = file.execute("SELECT * FROM adapters" + " WHERE name = ?" * len(names), names)
    columns = [column for column, *_ in cursor.description]
    for row in cursor:
        yield dict(zip(columns, row, strict=True))


def _checksum(row: Mapping[str, Any], columns: Iterable[str]) -> str:
    """Return SHA-256 (hex) over some columns of a row."""
    return hashlib.sha256(json.dumps([(name, row[name]) for name in columns]).encode()).hexdigest()


def _sum(rows: Iterable[Mapping[str, Any]]) -> str:
    """Return the sum of rows' checksums, in which no row can be missing."""
    return _difference("0", [], rows)


def _difference(total: str, gone: Iterable[Mapping[str, Any]], come: Iterable[Mapping[str, Any]]) -> str:
    changes = [-int(_checksum(row, row), 16) for row in gone] + [int(_checksum(row, row), 16) for row in come]
    return f"{(int(total, 16) + sum(changes)) % 2**256:x}"


def _from_row(row: Mapping[str, Any]) -> Registered:
    fields: dict[str, Any] = json.loads(row["config"])
    fields = {key: tuple(value) if isinstance(value, list) else value for key, value in fields.items()}
    known = {name: row[name] for name in (*_ASKED, *_READ)}
    return Registered(**known | {"config": AdapterConfig(**fields), "pinned": bool(row["pinned"])})
