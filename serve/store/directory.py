"""A watched directory: each of its subdirectories is an adapter, registered under the subdirectory's name."""

import os
from collections.abc import Collection
from pathlib import Path
from typing import NamedTuple

from preft_jax.errors import AdapterError, ConfigError, PreftError
from preft_jax.io.file_pair import CONFIG_FILE
from serve.store.host import AdapterStore
from serve.store.names import Registered, RegistryError


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
        self._refused: dict[str, tuple[_State, str]] = {}

    def scan(self) -> Changes:
        """Register what is new or has changed, and forget what is gone; takes as long as reading the new ones does.

        A subdirectory whose adapter was refused is read again when it changes; where the system was what refused, at
        the next scan. A refusal is told once. What comes back under a name is its owner's again. Links out of the
        directory are not followed: the store's files are to be confined to it.
        """
        found = {entry.name: entry.path for entry in os.scandir(self._path) if entry.is_dir(follow_symlinks=False)}
        changes = Changes([], [], {})
        for name, path in sorted(found.items()):
            state = _state(path)
            if state and self._seen.get(name) != state:
                self._look(name, path, state, changes)
        self._seen = {name: state for name, state in self._seen.items() if name in found}
        self._refused = {name: refusal for name, refusal in self._refused.items() if name in found}
        for adapter in self._store.list():
            if Path(adapter.path).parent == self._path and adapter.name == Path(adapter.path).name not in found:
                self._store.unregister(adapter.name, keep_owner=True)
                changes.removed.append(adapter.name)
        return changes

    def _look(self, name: str, path: str, state: "_State", changes: Changes) -> None:
        """Register a subdirectory's adapter, unless it was before the program started."""
        known = self._store.get(name)
        is_first_look = name not in self._seen
        if is_first_look and known is not None and known.path == path and _last_change(state) < known.created * 1e9:
            self._seen[name] = state
            return
        try:
            self._check_free(name, path, known)
            self._store.register(name, path, replace=True)
        except (PreftError, OSError) as error:
            if not _may_pass(error):
                self._seen[name] = state
            refusal = state, str(error)
            if self._refused.get(name) != refusal:
                self._refused[name] = refusal
                changes.refused[name] = str(error)
        else:
            self._seen[name] = state
            self._refused.pop(name, None)
            changes.registered.append(name)

    def _check_free(self, name: str, path: str, known: Registered | None) -> None:
        """Raise ``AdapterError`` if a name is another's; one whose directory is gone, as after a move, is free."""
        if name in self._taken:
            raise AdapterError(f"{name!r} is the base model's name; rename the directory")
        if known is not None and known.path != path and (not known.path or os.path.exists(known.path)):
            other = f"in {known.path}; remove that directory" if known.path else "published from memory; unload it"
            raise _NameInUseError(f"{name!r} stands for the adapter {other}, or rename this one")


class _NameInUseError(AdapterError):
    """A name that stands for an adapter from elsewhere, for now."""


def _may_pass(error: BaseException | None) -> bool:
    """Whether an adapter was refused for something else than what it is, such as a full disk."""
    while error is not None:
        if isinstance(error, OSError | RegistryError | _NameInUseError):
            return True
        error = error.__cause__ or error.__context__
    return False


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


def _last_change(state: _State) -> int:
    """Return when status or content changed last, in nanoseconds since 1970; copies may keep the time of contents."""
    return max(max(changed, modified) for _, _, changed, modified in state)
