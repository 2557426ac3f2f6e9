"""Adapters by name, on disk and in host memory; the bank is the tier above (``serve/engine/residency.py``).

A name is registered once, with what a request must know: digest and configuration. The rank pages come to host memory
when a request asks for them, in the background and once for all that ask; they stay until their room is needed. A
request holds a ``Lease``: what it names neither changes nor leaves host memory until the lease is given back, whatever
happens to the name.
"""

import collections
import contextlib
import dataclasses
import enum
import threading
import time
from collections.abc import Callable
from concurrent.futures import Executor, ThreadPoolExecutor
from pathlib import Path
from typing import Protocol

import numpy as np

from preft_jax.adapters.adapter import Adapter
from preft_jax.adapters.config import AdapterConfig
from preft_jax.errors import AdapterError, ConfigError
from serve.store.copies import Copy, Lease, Told
from serve.store.files import Read, told
from serve.store.host_copy import Known
from serve.store.names import Registered, Registry
from serve.store.repair import read_again

_LONGEST_NAME = 256


class Unchanged(enum.Enum):
    """Says that a name keeps what it has."""

    UNCHANGED = enum.auto()


UNCHANGED = Unchanged.UNCHANGED


class Files(Protocol):
    """Where adapters are read from; ``AdapterFiles`` in earnest. ``dtype``: of their rank pages."""

    dtype: np.dtype

    def read(self, path: str) -> Read:
        """Read and check an adapter."""
        ...

    def take(self, adapter: Adapter) -> Read:
        """Check an adapter that is in memory."""
        ...

    def load(self, path: str, digest: str) -> Known:
        """Return the rank pages of an adapter that was read before."""
        ...

    def keep(self, digest: str, known: Known) -> bool:
        """Keep rank pages for later loads, if there is a place for them; return whether there is."""
        ...

    def drop(self, digest: str) -> None:
        """Delete what is kept of an adapter."""
        ...


class AdapterStore:
    """Registers adapters and keeps those in use in host memory. Thread-safe.

    Args:
        files: reads adapters.
        registry: remembers names; ``durable`` says whether over restarts.
        host_bytes: most bytes of rank pages in host memory.
        loaders: threads that load, or what runs them.
        deleter: runs the deletions of what is kept; None: a thread of its own, which may wait for the disk.
        pin: makes rank pages readable for the device (pinned memory).
        check: raises ``AdapterError`` for an adapter that the engine could never serve; an engine sets it.
    """

    def __init__(
        self,
        files: Files,
        registry: Registry,
        *,
        host_bytes: int,
        loaders: int | Executor = 2,
        deleter: Executor | None = None,
        pin: Callable[[Known], Known] = lambda known: known,
        check: Callable[[AdapterConfig], object] = lambda config: None,
    ):
        if host_bytes < 1:
            raise ConfigError(f"host_bytes is {host_bytes}; give at least 1")
        self.host_bytes = host_bytes
        self.check = check
        self.durable = registry.durable
        self._files = files
        self._registry = registry
        self._pin = pin
        # Names change one at a time, and ``_changed`` is not held while the disk is waited for.
        self._naming = threading.RLock()
        self._changed = threading.Condition()
        self._pool = ThreadPoolExecutor(loaders, "adapter-loader") if isinstance(loaders, int) else loaders
        self._deleter = deleter or ThreadPoolExecutor(1, "adapter-deleter")
        self._copies: collections.OrderedDict[str, Copy] = collections.OrderedDict()
        self._wanted: collections.deque[Copy] = collections.deque()
        self._done: Told = []
        self._used = 0
        self._pins: dict[str, Lease] = {}
        counted = "hits", "loads", "failed_loads", "evictions", "loaded_bytes"
        self._counts = collections.Counter(dict.fromkeys(counted, 0))
        self._load_seconds = 0.0
        self._names = collections.Counter(adapter.digest for adapter in registry.list())
        with self._changed:
            for adapter in registry.list():
                with contextlib.suppress(AdapterError):  # The budget may have become smaller.
                    self._check_size(adapter)
                    self._repin(adapter)
        read_again(registry.damaged, self.register)

    @property
    def dtype(self) -> np.dtype:
        """Of the rank pages that it loads."""
        return self._files.dtype

    # Names

    def register(
        self,
        name: str,
        path: str | Path,
        *,
        owner: str | Unchanged | None = UNCHANGED,
        pinned: bool | Unchanged = UNCHANGED,
        replace: bool = False,
    ) -> Registered:
        """Read an adapter and let a name stand for it; takes as long as reading does.

        Requests that run keep what the name stood for before. A name keeps its owner and pin where none is given; a
        new one has no owner and is not pinned.

        Raises:
            AdapterError: if the adapter is bad or larger than host memory may hold, or the name is taken and
                ``replace`` is false. The name then stands for what it did before.
        """
        self._check_name(name, replace)
        created = time.time()
        read = self._files.read(str(path))
        return self._enter(name, str(path), read, created, owner=owner, pinned=pinned, replace=replace)

    def publish(
        self,
        name: str,
        adapter: Adapter,
        *,
        owner: str | Unchanged | None = UNCHANGED,
        pinned: bool | Unchanged = UNCHANGED,
        replace: bool = True,
    ) -> Registered:
        """Let a name stand for an adapter that is in memory, as a trainer has it; it is folded once, here.

        ``register``, without a file. Its rank pages are kept where the ``Files`` keep them, and come and go as others
        do. Where these keep nothing, they stay in host memory as a pinned adapter's do, for as long as it has a name.

        Raises:
            AdapterError: as ``register``; or if rank pages that must stay find no room, as requests use all of it.
        """
        self._check_name(name, replace)
        created = time.time()
        read = self._files.take(adapter)
        return self._enter(name, "", read, created, owner=owner, pinned=pinned, replace=replace)

    def _enter(
        self,
        name: str,
        path: str,
        read: Read,
        created: float,
        *,
        owner: str | Unchanged | None,
        pinned: bool | Unchanged,
        replace: bool,
    ) -> Registered:
        """Let a name stand for what was read; no path: it has no file."""
        self.check(read.config)
        adapter = Registered(
            name=name, path=path, digest=read.digest, config=read.config, num_bytes=read.known.num_bytes,
            created=created,
        )  # fmt: skip
        with self._changed:
            self._check_size(self._with_rights(adapter, owner, pinned))
            self._names[adapter.digest] += 1  # Until it has its name, so that what is kept of it stays.
            room = self._used + adapter.num_bytes <= self.host_bytes
        held: Lease | None = None
        try:
            with self._naming:
                stays = not self._files.keep(read.digest, read.known) and not path
                known = self._pin(read.known) if room or not path else None
                with self._changed:
                    if not replace:
                        self._check_free(name)
                    adapter = self._with_rights(adapter, owner, pinned)
                    self._check_size(adapter, stays=stays)
                    if stays:
                        self._check_room(adapter)
                        self._offer(adapter, known)
                        held = self._lease(adapter)  # It has no file: its place is not taken while the name is written.
                old = self._registry.put(adapter)
                with self._changed:
                    self._names[adapter.digest] += 1
                    if old is not None:
                        self._unname(old.digest)
                    self._offer(adapter, known)
                    self._repin(adapter, stays=stays)
        finally:
            with self._changed:
                if held is not None:
                    self._give_back(held)
                self._unname(adapter.digest)
        return adapter

    def unregister(self, name: str, *, keep_owner: bool = False) -> Registered:
        """Forget a name; requests that run end as they would have.

        With ``keep_owner``, what is registered under the name later is its owner's, unless another is named then.

        Raises:
            AdapterError: if the name is not registered.
            RegistryError: if that cannot be written; the name then stands for what it did before.
        """
        with self._naming:
            adapter = self._registry.remove(name, keep_owner=keep_owner)
            if adapter is None:
                raise AdapterError(f"no adapter is registered as {name!r}; see the list of models")
            with self._changed:
                if name in self._pins:
                    self._give_back(self._pins.pop(name))
                self._unname(adapter.digest)
                self._start_loads()
        return adapter

    def get(self, name: str) -> Registered | None:
        """Return what a name stands for, or None."""
        return self._registry.get(name)

    def list(self) -> list[Registered]:
        """Return all registered adapters by name."""
        return self._registry.list()

    # Requests

    def lease(self, adapter: Registered) -> Lease:
        """Claim an adapter's copy in host memory; if there is none yet, it is loaded and ``poll`` tells of it.

        Raises:
            AdapterError: if it is larger than host memory may hold.
        """
        with self._changed:
            self._check_size(dataclasses.replace(adapter, pinned=False))
            lease = self._lease(adapter)
            self._counts["hits"] += lease.known is not None
        return lease

    def release(self, lease: Lease) -> None:
        """Give a lease back, loaded or not."""
        with self._changed:
            self._give_back(lease)
            self._start_loads()

    def poll(self) -> Told:
        """Return the leases whose wait is over since the last call, each with the reason if its load failed."""
        with self._changed:
            done, self._done = self._done, []
            own = set(self._pins.values())
        return [(lease, error) for lease, error in done if lease in lease.copy.leases and lease not in own]

    def wait(self, seconds: float) -> None:
        """Wait until ``poll`` has something to tell, at most so long."""
        with self._changed:
            self._changed.wait_for(lambda: bool(self._done), seconds)

    def reads(self, path: str | Path) -> bool:
        """Whether requests wait for an adapter that is still to be read from a directory."""
        with self._changed:
            return any(copy.path == str(path) and copy.known is None for copy in self._copies.values())

    def tiers(self) -> dict[str, float]:
        """Return what the store holds and did, for metrics."""
        with self._changed:
            return {
                "registered": sum(self._names.values()),
                "host_adapters": sum(copy.known is not None for copy in self._copies.values()),
                "host_bytes": self._used,
                "host_budget_bytes": self.host_bytes,
                "leased": sum(bool(copy.leases) for copy in self._copies.values()),
                "waiting": len(self._wanted),
                "load_seconds": self._load_seconds,
                **self._counts,
            }

    def close(self) -> None:
        """Stop loading; what is registered stays."""
        self._pool.shutdown(wait=True, cancel_futures=True)
        self._deleter.shutdown(wait=True)
        self._registry.close()

    # With the lock held

    def _with_rights(self, adapter: Registered, owner: str | Unchanged | None, pinned: bool | Unchanged) -> Registered:
        old = self._registry.get(adapter.name) or adapter
        return dataclasses.replace(
            adapter,
            owner=self._registry.owner(adapter.name) if isinstance(owner, Unchanged) else owner,
            pinned=old.pinned if isinstance(pinned, Unchanged) else pinned,
        )

    def _check_name(self, name: str, replace: bool) -> None:
        if not isinstance(name, str) or not name.isprintable() or not name.strip() or len(name) > _LONGEST_NAME:
            raise AdapterError(f"the name {name!r} is not allowed; give 1 to {_LONGEST_NAME} printable characters")
        if not replace:
            self._check_free(name)

    def _check_free(self, name: str) -> None:
        if self._registry.get(name) is not None:
            raise AdapterError(f"the name {name!r} is taken; unload that adapter first, or choose another name")

    def _check_room(self, adapter: Registered) -> None:
        copy = self._copies.get(adapter.digest)
        if (copy is None or not copy.reserved) and not self._make_room(adapter.num_bytes):
            raise AdapterError(
                f"the adapter takes {adapter.num_bytes} bytes of host memory and must stay there, and requests use all "
                f"{self.host_bytes}; publish it later, raise the budget, or give AdapterFiles a directory for them"
            )

    def _check_size(self, adapter: Registered, *, stays: bool = False) -> None:
        half = self.host_bytes // 2  # One half is for pinned adapters, so that the other is always there.
        if adapter.num_bytes > half:
            raise AdapterError(
                f"the adapter takes {adapter.num_bytes} bytes; host memory has {self.host_bytes} for all adapters, and "
                "one may take half of it; raise the budget"
            )
        pinned = {lease.copy for name, lease in self._pins.items() if name != adapter.name}
        total = sum(copy.num_bytes for copy in pinned)
        if (adapter.pinned or stays) and total + adapter.num_bytes > half:
            others = " (those published from memory that no directory keeps among them)" if stays else ""
            raise AdapterError(
                f"pinned adapters{others} would take {total + adapter.num_bytes} bytes; they may take half of the "
                f"{self.host_bytes} that host memory has for adapters; unpin others, or raise the budget"
            )

    def _unname(self, digest: str) -> None:
        self._names[digest] -= 1
        if self._names[digest] <= 0:
            del self._names[digest]
            self._drop_if_unused(digest)

    def _repin(self, adapter: Registered, *, stays: bool = False) -> None:
        old = self._pins.pop(adapter.name, None)
        if adapter.pinned or stays:
            self._pins[adapter.name] = self._lease(adapter)
        if old is not None:
            self._give_back(old)

    def _pin_again(self, copy: Copy) -> None:
        """Let a copy stay for names whose own load of it failed before."""
        for name, lease in list(self._pins.items()):
            if lease.digest == copy.digest and lease.copy is not copy:
                lease.copy.leases.discard(lease)
                self._pins[name] = Lease(copy)
                copy.leases.add(self._pins[name])

    def _lease(self, adapter: Registered) -> Lease:
        copy = self._copies.get(adapter.digest)
        if copy is None:
            copy = self._copies[adapter.digest] = Copy(adapter.digest, adapter.path, adapter.num_bytes)
        self._copies.move_to_end(adapter.digest)
        lease = Lease(copy)
        copy.leases.add(lease)
        if copy.known is None and not copy.reserved and copy not in self._wanted:
            self._wanted.append(copy)
            self._start_loads()
        return lease

    def _give_back(self, lease: Lease) -> None:
        copy = lease.copy
        copy.leases.discard(lease)
        if not copy.leases and copy.known is None and not copy.reserved:
            if copy in self._wanted:
                self._wanted.remove(copy)
            self._forget(copy)
        self._drop_if_unused(copy.digest)

    def _drop_if_unused(self, digest: str) -> None:
        """Drop what no name stands for and no request holds."""
        copy = self._copies.get(digest)
        if digest in self._names or (copy is not None and (copy.leases or (copy.reserved and copy.known is None))):
            return
        if copy is not None:
            self._forget(copy)
        with contextlib.suppress(RuntimeError):  # The store is closed; a later start deletes it.
            self._deleter.submit(self._drop, digest)

    def _forget(self, copy: Copy) -> None:
        if self._copies.get(copy.digest) is copy:
            del self._copies[copy.digest]
        if copy.reserved:
            copy.reserved = False
            self._used -= copy.num_bytes

    def _make_room(self, num_bytes: int) -> bool:
        """Evict copies that no request holds, those used longest ago first, if that makes enough room."""
        idle = [copy for copy in self._copies.values() if copy.known is not None and not copy.leases]
        missing = self._used + num_bytes - self.host_bytes
        if missing > sum(copy.num_bytes for copy in idle):
            return False
        for copy in idle:
            if missing <= 0:
                break
            missing -= copy.num_bytes
            self._forget(copy)
            self._counts["evictions"] += 1
        return True

    def _start_loads(self) -> None:
        while self._wanted and self._make_room(self._wanted[0].num_bytes):
            copy = self._wanted.popleft()
            copy.reserved = True
            self._used += copy.num_bytes
            self._pool.submit(self._load, copy)

    def _offer(self, adapter: Registered, known: Known | None) -> None:
        """Take a copy that is there anyway, if there is room for it; one without a file may evict others."""
        copy = self._copies.get(adapter.digest)
        if known is None or (copy is not None and (copy.known is not None or adapter.path)):
            return
        is_loading = copy is not None and copy.reserved
        room = is_loading or self._used + adapter.num_bytes <= self.host_bytes
        if not room and (adapter.path or not self._make_room(adapter.num_bytes)):
            return
        if copy is None:
            copy = self._copies[adapter.digest] = Copy(adapter.digest, adapter.path, adapter.num_bytes)
        if not copy.reserved:
            copy.reserved = True
            self._used += copy.num_bytes
        copy.known = known
        if copy in self._wanted:
            self._wanted.remove(copy)
        self._tell(copy, None)
        self._pin_again(copy)

    def _tell(self, copy: Copy, error: str | None) -> None:
        self._done += [(lease, error) for lease in copy.leases]
        self._changed.notify_all()

    # In threads that may wait for the disk

    def _drop(self, digest: str) -> None:
        """Delete what is kept of an adapter, if it was not registered again meanwhile."""
        with self._naming:
            with self._changed:
                if digest in self._names or digest in self._copies:
                    return
            self._files.drop(digest)

    def _load(self, copy: Copy) -> None:
        start = time.perf_counter()
        try:
            known, error = self._pin(self._files.load(copy.path, copy.digest)), None
        except Exception as cause:
            known, error = None, told(cause)
        with self._changed:
            self._load_seconds += time.perf_counter() - start
            self._counts["failed_loads" if known is None else "loads"] += 1
            self._counts["loaded_bytes"] += 0 if known is None else copy.num_bytes
            if copy.known is None:  # It was not published meanwhile.
                copy.known = known
                self._tell(copy, error)
                if known is None:
                    self._forget(copy)
                else:
                    self._pin_again(copy)
                    self._drop_if_unused(copy.digest)
            self._start_loads()
