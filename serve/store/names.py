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

_VERSION = 1


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

    Raises:
        ConfigError: if the file is not a registry of this version, or cannot be used.
    """

    def __init__(self, path: Path | None = None):
        self._path = path
        self._lock = threading.Lock()
        self._adapters: dict[str, Registered] = {}
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
            for row in self._file.execute("SELECT * FROM adapters"):
                adapter = _from_row(row)
                self._adapters[adapter.name] = adapter
        except (sqlite3.Error, ValueError, TypeError) as error:
            if isinstance(error, ConfigError):
                raise
            raise ConfigError(f"{path} cannot be used as a registry of adapters: {error}; move it away") from error

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
        with self._lock:
            self._write("INSERT OR REPLACE INTO adapters VALUES (:name, :path, :digest, :config, :num_bytes, :owner, "
                        ":pinned, :created)", row)  # fmt: skip
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
                self._file.execute(statement, row)
        except sqlite3.Error as error:
            raise AdapterError(f"{self._path} cannot be written: {error}; nothing was changed") from error


def _from_row(row: tuple) -> Registered:
    name, path, digest, config, num_bytes, owner, pinned, created = row
    fields: dict[str, Any] = json.loads(config)
    fields = {key: tuple(value) if isinstance(value, list) else value for key, value in fields.items()}
    return Registered(
        name=name, path=path, digest=digest, config=AdapterConfig(**fields), num_bytes=num_bytes, owner=owner,
        pinned=bool(pinned), created=created,
    )  # fmt: skip
