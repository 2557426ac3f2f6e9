"""The registered adapters: what each name stands for, kept in a file that survives the process.

A change is on disk when the call that makes it returns (SQLite in WAL mode, synchronous).
"""

import dataclasses
import json
import sqlite3
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from preft_jax.adapters.config import AdapterConfig
from preft_jax.errors import AdapterError, ConfigError

_TABLE = """
CREATE TABLE IF NOT EXISTS adapters (
    name TEXT PRIMARY KEY, path TEXT NOT NULL, digest TEXT NOT NULL, config TEXT NOT NULL, num_bytes INTEGER NOT NULL,
    owner TEXT, pinned INTEGER NOT NULL, created REAL NOT NULL
) STRICT
"""

_OWNERS = "CREATE TABLE IF NOT EXISTS owners (name TEXT PRIMARY KEY, owner TEXT NOT NULL) STRICT"
"""Whose names are that stand for nothing now."""

_VERSION = 1


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


class Registry:
    """Adapters by name, in memory and, if a file is given, on disk. Thread-safe.

    Names are read without waiting for a write: a disk that hangs delays only those who change something. Dictionaries
    are replaced, never changed.

    Raises:
        ConfigError: if the file is not a registry of this version, or cannot be used.
    """

    def __init__(self, path: Path | None = None):
        self._path = path
        self._writing = threading.Lock()
        self._adapters: dict[str, Registered] = {}
        self._owners: dict[str, str] = {}
        try:
            self._file = sqlite3.connect(":memory:" if path is None else path, check_same_thread=False)
            with self._file:
                self._file.execute("PRAGMA journal_mode = WAL")
                self._file.execute("PRAGMA synchronous = FULL")
                (version,) = self._file.execute("PRAGMA user_version").fetchone()
                if version not in (0, _VERSION):
                    raise ConfigError(f"{path} is a registry of version {version}; this program knows {_VERSION}")
                self._file.execute(f"PRAGMA user_version = {_VERSION}")
                self._file.execute(_TABLE)
                self._file.execute(_OWNERS)
            for row in self._file.execute("SELECT * FROM adapters"):
                adapter = _from_row(row)
                self._adapters[adapter.name] = adapter
            self._owners = dict(self._file.execute("SELECT name, owner FROM owners"))
        except (sqlite3.Error, ValueError, TypeError) as error:
            if isinstance(error, ConfigError):
                raise
            raise ConfigError(f"{path} cannot be used as a registry of adapters: {error}; move it away") from error

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
        with self._writing:
            old = self._adapters.get(adapter.name)
            self._write(
                "it is not registered" if old is None else "its name stands for what it did before",
                ("INSERT OR REPLACE INTO adapters VALUES (:name, :path, :digest, :config, :num_bytes, :owner, :pinned, "
                 ":created)", row),
                ("DELETE FROM owners WHERE name = :name", row),
            )  # fmt: skip
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
            self._write(
                "it is still registered",
                ("DELETE FROM adapters WHERE name = :name", {"name": name}),
                *(("INSERT OR REPLACE INTO owners VALUES (:name, :owner)", {"name": name, "owner": owner})
                  for name, owner in kept.items()),
            )  # fmt: skip
            self._owners = {**self._owners, **kept}
            self._adapters = _without(self._adapters, name)
        return old

    def close(self) -> None:
        """Close the file."""
        with self._writing:
            self._file.close()

    def _write(self, otherwise: str, *changes: tuple[str, Mapping[str, object]]) -> None:
        """Make changes, all of them or none; ``otherwise``: what is true of the adapter if that fails."""
        try:
            with self._file:
                for statement, row in changes:
                    self._file.execute(statement, row)
        except sqlite3.Error as error:
            raise RegistryError(f"{self._path} cannot be written: {error}; nothing was changed: {otherwise}") from error


def _without[T](names: Mapping[str, T], name: str) -> dict[str, T]:
    return {key: value for key, value in names.items() if key != name}


def _from_row(row: tuple) -> Registered:
    name, path, digest, config, num_bytes, owner, pinned, created = row
    fields: dict[str, Any] = json.loads(config)
    fields = {key: tuple(value) if isinstance(value, list) else value for key, value in fields.items()}
    return Registered(
        name=name, path=path, digest=digest, config=AdapterConfig(**fields), num_bytes=num_bytes, owner=owner,
        pinned=bool(pinned), created=created,
    )  # fmt: skip
