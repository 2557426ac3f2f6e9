"""A watched directory: each of its subdirectories is an adapter, registered under the subdirectory's name."""

import os
from pathlib import Path
from typing import NamedTuple

from preft_jax.errors import AdapterError, ConfigError
from preft_jax.io.file_pair import CONFIG_FILE
from serve.adapter_store import AdapterStore


class Changes(NamedTuple):
    """What a scan found: names registered anew or again, names that are gone, and why others were refused."""

    registered: list[str]
    removed: list[str]
    refused: dict[str, str]


class AdapterDirectory:
    """Keeps a store in step with a directory.

    Raises:
        ConfigError: if it is not a directory.
    """

    def __init__(self, store: AdapterStore, path: Path):
        if not path.is_dir():
            raise ConfigError(f"{path} is not a directory; give one whose subdirectories are adapters")
        self._store = store
        self._path = path.resolve()
        self._refused: dict[str, int] = {}

    def scan(self) -> Changes:
        """Register what is new or has changed, and forget what is gone; takes as long as reading the new ones does.

        A subdirectory that was refused is read again when it changes. Links out of the directory are not followed.
        """
        found = {entry.name: entry.path for entry in os.scandir(self._path) if entry.is_dir(follow_symlinks=False)}
        changes = Changes([], [], {})
        for name, path in sorted(found.items()):
            changed = _changed(path)
            known = self._store.get(name)
            if changed is None or self._refused.get(name) == changed:
                continue
            if known is not None and (known.path != path or changed < known.created * 1e9):
                continue
            try:
                kept = {} if known is None else {"owner": known.owner, "pinned": known.pinned}
                self._store.register(name, path, replace=True, **kept)
                self._refused.pop(name, None)
                changes.registered.append(name)
            except AdapterError as error:
                self._refused[name] = changed
                changes.refused[name] = str(error)
        for adapter in self._store.list():
            if Path(adapter.path).parent == self._path and adapter.name == Path(adapter.path).name not in found:
                self._store.unregister(adapter.name)
                changes.removed.append(adapter.name)
        return changes


def _changed(path: str) -> int | None:
    """Return when an adapter's directory changed last, in nanoseconds; None if it holds none."""
    try:
        if not os.path.exists(os.path.join(path, CONFIG_FILE)):
            return None
        return max(os.stat(path).st_mtime_ns, *(entry.stat().st_mtime_ns for entry in os.scandir(path)))
    except OSError:
        return None
