"""A watched directory: each of its subdirectories is an adapter, registered under the subdirectory's name."""

import os
from collections.abc import Collection
from pathlib import Path
from typing import NamedTuple

from preft_jax.errors import AdapterError, ConfigError, PreftError
from preft_jax.io.file_pair import CONFIG_FILE
from serve.store.host import AdapterStore


class Changes(NamedTuple):
    """What a scan found: names registered anew or again, names that are gone, and why others were refused."""

    registered: list[str]
    removed: list[str]
    refused: dict[str, str]


class AdapterDirectory:
    """Keeps a store in step with a directory.

    Args:
        store: to be kept in step.
        path: the directory.
        taken: names that no adapter may have.

    Raises:
        ConfigError: if it is not a directory.
    """

    def __init__(self, store: AdapterStore, path: Path, *, taken: Collection[str] = ()):
        if not path.is_dir():
            raise ConfigError(f"{path} is not a directory; give one whose subdirectories are adapters")
        self._store = store
        self._path = path.resolve()
        self._taken = taken
        self._seen: dict[str, _State] = {}

    def scan(self) -> Changes:
        """Register what is new or has changed, and forget what is gone; takes as long as reading the new ones does.

        A subdirectory that was refused is read again when it changes. What comes back under a name is its owner's
        again. Links out of the directory are not followed: the store's files are to be confined to it.
        """
        found = {entry.name: entry.path for entry in os.scandir(self._path) if entry.is_dir(follow_symlinks=False)}
        changes = Changes([], [], {})
        for name, path in sorted(found.items()):
            state = _state(path)
            known = self._store.get(name)
            if not state or self._seen.get(name) == state or (known is not None and known.path != path):
                continue
            is_first_look, self._seen[name] = name not in self._seen, state
            # What was registered before the program started.
            if is_first_look and known is not None and max(when for *_, when in state) < known.created * 1e9:
                continue
            try:
                if name in self._taken:
                    raise AdapterError(f"{name!r} is the base model's name; rename the directory")
                self._store.register(name, path, replace=True)
                changes.registered.append(name)
            except (PreftError, OSError) as error:
                changes.refused[name] = str(error)
        self._seen = {name: state for name, state in self._seen.items() if name in found}
        for adapter in self._store.list():
            if Path(adapter.path).parent == self._path and adapter.name == Path(adapter.path).name not in found:
                self._store.unregister(adapter.name, keep_owner=True)
                changes.removed.append(adapter.name)
        return changes


_State = tuple[tuple[int, int, int, int], ...]
"""Of a directory and its files: inode, bytes, and when status and content changed last, in nanoseconds."""


def _state(path: str) -> _State:
    """Return what differs once an adapter's directory has changed, however it did; nothing if it holds none."""
    try:
        if not os.path.exists(os.path.join(path, CONFIG_FILE)):
            return ()
        found = [os.stat(path), *(entry.stat() for entry in sorted(os.scandir(path), key=lambda entry: entry.name))]
    except OSError:
        return ()
    return tuple((one.st_ino, one.st_size, one.st_ctime_ns, one.st_mtime_ns) for one in found)
