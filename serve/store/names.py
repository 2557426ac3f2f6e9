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
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from preft_jax.adapters.config import AdapterConfig
from preft_jax.errors import AdapterError, ConfigError

_TABLES = """
CREATE TABLE IF NOT EXISTS adapters (
    name TEXT PRIMARY KEY, path TEXT NOT NULL, digest TEXT NOT NULL, config TEXT NOT NULL, num_bytes INTEGER NOT NULL,
    owner TEXT, pinned INTEGER NOT NULL, created REAL NOT NULL, asked TEXT NOT NULL, whole TEXT NOT NULL
) STRICT;
CREATE TABLE IF NOT EXISTS owners (name TEXT PRIMARY KEY, owner TEXT NOT NULL, whole TEXT NOT NULL) STRICT;
CREATE TABLE IF NOT EXISTS checksums (sum TEXT NOT NULL) STRICT;
"""

_VERSION = 2
_ASKED = ("name", "path", "owner", "pinned", "created")
_READ = ("digest", "config", "num_bytes")
_OWNED = ("name", "owner")

_NOBODYS = "\0"
"""Owner of a name whose owner is not known any more: no key is his, so that only the admin's serves it."""

_log = logging.getLogger("preft.store")


class RegistryError(AdapterError):
    """A change that could not be written; what the names stand for is as before."""


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


class _Rows(NamedTuple):
    adapters: list[dict[str, Any]]
    owners: list[dict[str, Any]]

    @property
    def all(self) -> list[dict[str, Any]]:
        return [*self.adapters, *self.owners]


class Registry:
    """Adapters by name, in memory and, if a file is given, on disk. Thread-safe.

    Names are read without waiting for a write: a disk that hangs delays only those who change something. Dictionaries
    are replaced, never changed.

    Attributes:
        durable: whether there is a file.
        damaged: names whose rows do not say any more what was read; they stand for nothing until they are put again.

    Raises:
        ConfigError: if the file is not a registry of this version, or cannot be used.
    """

    def __init__(self, path: Path | None = None):
        self._path = path
        self.durable = path is not None
        self._writing = threading.Lock()
        self._adapters: dict[str, Registered] = {}
        self._owners: dict[str, str] = {}
        self.damaged: list[Asked] = []
        try:
            self._file = _connect(path)
            try:
                rows = self._read()
                self._owners = {row["name"]: self._owner(row) for row in rows.owners}
                for row in rows.adapters:
                    self._take(row)
            except BaseException:
                self._file.close()
                raise
        except (sqlite3.Error, ValueError, TypeError, LookupError, OverflowError) as error:
            if isinstance(error, ConfigError):
                raise
            raise ConfigError(f"{path} cannot be used as a registry of adapters: {error}; move it away") from error

    def _read(self) -> _Rows:
        """Return the rows that can be read, in a file that is whole: a damaged one is put aside."""
        try:
            (problem,) = self._file.execute("PRAGMA integrity_check(1)").fetchone()
        except sqlite3.DatabaseError as error:
            problem = str(error)
        if problem != "ok":
            return self._begin_anew(problem)
        rows = _rows(self._file)
        (total,) = self._file.execute("SELECT sum FROM checksums").fetchone() or ("0",)
        if total != _sum(rows):
            self._say_damaged("the registry of adapters has not the rows that were written to it")
            with self._file:
                self._set_sum(_sum(rows))
        return rows

    def _begin_anew(self, problem: str) -> _Rows:
        """Put the file aside, and return what can be read of it, written to a new one."""
        assert self._path is not None
        rows = _Rows([], [])
        for table, found in rows._asdict().items():
            with contextlib.suppress(sqlite3.Error):
                found.extend(_rows_of(self._file, table))  # As far as it gets.
        self._file.close()
        aside = self._path.with_name(f"{self._path.name}.damaged")
        os.replace(self._path, aside)
        for suffix in ("-wal", "-shm"):
            self._path.with_name(self._path.name + suffix).unlink(missing_ok=True)
        self._file = _connect(self._path)
        for row in rows.adapters:
            if row["whole"] == _checksum(row, (*_ASKED, *_READ)):
                self._write("", (_PUT, row))
        for row in rows.owners:
            if row["whole"] == _checksum(row, _OWNED):
                self._write("", (_PUT_OWNER, row))
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
            self._owners[row["name"]] = _NOBODYS  # A watched directory may bring it again.
        elif row["whole"] != _checksum(row, (*_ASKED, *_READ)):
            asked: dict[str, Any] = {field: row[field] for field in _ASKED}
            asked["pinned"] = bool(asked["pinned"])
            self.damaged.append(Asked(**asked))
        else:
            self._adapters[row["name"]] = _from_row(row)

    def _owner(self, row: Mapping[str, Any]) -> str:
        """Return whose a name is that stands for nothing now."""
        if row["whole"] == _checksum(row, _OWNED):
            return row["owner"]
        facts = {"adapter": ascii(row["name"]), "advice": "what is registered under it is the admin's: name its owner"}
        _log.error("the owner of a name is not known any more", extra={"facts": facts})
        return _NOBODYS

    def get(self, name: str) -> Registered | None:
        """Return what a name stands for, or None."""
        return self._adapters.get(name)

    def list(self) -> list[Registered]:
        """Return all adapters by name."""
        return [adapter for _, adapter in sorted(self._adapters.items())]

    def owner(self, name: str) -> str | None:
        """Return whose a name is, or was when it was last removed with ``keep_owner``; None: nobody's."""
        adapter = self._adapters.get(name)
        return self._owners.get(name) if adapter is None else adapter.owner

    def put(self, adapter: Registered) -> Registered | None:
        """Let a name stand for an adapter; return what it stood for.

        Raises:
            RegistryError: if it cannot be written; the name stands for what it did before.
        """
        row = dataclasses.asdict(adapter) | {"config": json.dumps(dataclasses.asdict(adapter.config))}
        row |= {"pinned": int(adapter.pinned), "created": float(adapter.created)}
        row |= {"asked": _checksum(row, _ASKED), "whole": _checksum(row, (*_ASKED, *_READ))}
        with self._writing:
            old = self._adapters.get(adapter.name)
            self._write(
                "it is not registered" if old is None else "its name stands for what it did before",
                (_PUT, row),
                ("DELETE FROM owners WHERE name = :name", row),
            )
            self._owners = _without(self._owners, adapter.name)
            self._adapters = {**self._adapters, adapter.name: adapter}
        return old

    def remove(self, name: str, *, keep_owner: bool = False) -> Registered | None:
        """Forget a name; return what it stood for.

        Args:
            name: to be forgotten.
            keep_owner: whether what is registered under the name later is its owner's, unless it names another.

        Raises:
            RegistryError: if it cannot be written; the name stands for what it did before.
        """
        with self._writing:
            old = self._adapters.get(name)
            if old is None:
                return None
            kept = {name: old.owner} if keep_owner and old.owner is not None else {}
            rows = [{"name": name, "owner": owner} for name, owner in kept.items()]
            self._write(
                "it is still registered",
                ("DELETE FROM adapters WHERE name = :name", {"name": name}),
                *((_PUT_OWNER, row | {"whole": _checksum(row, _OWNED)}) for row in rows),
            )
            self._owners = {**self._owners, **kept}
            self._adapters = _without(self._adapters, name)
        return old

    def close(self) -> None:
        """Close the file."""
        with self._writing:
            self._file.close()

    def _write(self, otherwise: str, *changes: tuple[str, Mapping[str, Any]]) -> None:
        """Make changes, all of them or none; ``otherwise``: what is true of the adapter if that fails."""
        names = {row["name"] for _, row in changes}
        try:
            with self._file:
                (total,) = self._file.execute("SELECT sum FROM checksums").fetchone() or (_sum(_rows(self._file)),)
                gone = [row for name in names for row in _rows(self._file, name).all]
                for statement, row in changes:
                    self._file.execute(statement, row)
                come = [row for name in names for row in _rows(self._file, name).all]
                self._set_sum(_difference(total, gone, come))
        except sqlite3.Error as error:
            raise RegistryError(f"{self._path} cannot be written: {error}; nothing was changed: {otherwise}") from error

    def _set_sum(self, total: str) -> None:
        self._file.execute("DELETE FROM checksums")
        self._file.execute("INSERT INTO checksums VALUES (?)", (total,))


_PUT = """
INSERT OR REPLACE INTO adapters VALUES (
    :name, :path, :digest, :config, :num_bytes, :owner, :pinned, :created, :asked, :whole
)
"""


_PUT_OWNER = "INSERT OR REPLACE INTO owners VALUES (:name, :owner, :whole)"


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


def _rows(file: sqlite3.Connection, *names: object) -> _Rows:
    """Return the rows by column, all or those of one name."""
    return _Rows(*(list(_rows_of(file, table, *names)) for table in _Rows._fields))


def _rows_of(file: sqlite3.Connection, table: str, *names: object) -> Iterator[dict[str, Any]]:
    cursor = file.execute(f"SELECT * FROM {table}" + " WHERE name = ?" * len(names), names)
    columns = [column for column, *_ in cursor.description]
    for row in cursor:
        yield dict(zip(columns, row, strict=True))


def _checksum(row: Mapping[str, Any], columns: Iterable[str]) -> str:
    """Return SHA-256 (hex) over some columns of a row."""
    return hashlib.sha256(json.dumps([(name, row[name]) for name in columns]).encode()).hexdigest()


def _sum(rows: _Rows) -> str:
    """Return the sum of rows' checksums, in which no row can be missing."""
    return _difference("0", [], rows.all)


def _difference(total: str, gone: Iterable[Mapping[str, Any]], come: Iterable[Mapping[str, Any]]) -> str:
    changes = [-int(_checksum(row, row), 16) for row in gone] + [int(_checksum(row, row), 16) for row in come]
    return f"{(int(total, 16) + sum(changes)) % 2**256:x}"


def _without[T](names: Mapping[str, T], name: str) -> dict[str, T]:
    return {key: value for key, value in names.items() if key != name}


def _from_row(row: Mapping[str, Any]) -> Registered:
    fields: dict[str, Any] = json.loads(row["config"])
    fields = {key: tuple(value) if isinstance(value, list) else value for key, value in fields.items()}
    known = {name: row[name] for name in (*_ASKED, *_READ)}
    return Registered(**known | {"config": AdapterConfig(**fields), "pinned": bool(row["pinned"])})
