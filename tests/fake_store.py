"""Adapters on a make-believe disk, and executors that tests hold in their hands."""

import collections
from concurrent.futures import Executor
from typing import Any

import numpy as np

from preft_jax.adapters.config import AdapterConfig
from preft_jax.errors import AdapterError
from serve.store.files import Read
from serve.store.host_copy import Columns, Known
from serve.store.names import Registered

CONFIG = AdapterConfig(kind="lora", rank=4, targets=("q",))


def known_of(digest: str, size: int) -> Known:
    assert len(digest) <= size
    array = np.frombuffer(digest.encode().ljust(size, b"."), np.uint8)
    return Known({"q": Columns((0,))}, {"q": [array]})


class FakeFiles:
    """Adapters on a make-believe disk: path -> (digest, size). ``broken`` paths cannot be read.

    An adapter in memory is such a pair, too. ``keeps``: whether there is a place for rank pages.
    """

    dtype = np.dtype(np.uint8)

    def __init__(self, keeps: bool = True):
        self.keeps = keeps
        self.disk: dict[str, tuple[str, int]] = {}
        self.kept: dict[str, int] = {}
        self.broken: set[str] = set()
        self.loading: collections.Counter[str] = collections.Counter()
        self.loads = 0

    def read(self, path: str) -> Read:
        if path in self.broken or path not in self.disk:
            raise AdapterError(f"{path} cannot be read")
        return self.take(self.disk[path])

    def take(self, adapter: Any) -> Read:
        return Read(CONFIG, adapter[0], known_of(*adapter))

    def load(self, path: str, digest: str) -> Known:
        self.loads += 1
        if path in self.broken:
            raise OSError(f"{path} is gone")
        if digest in self.kept:
            return known_of(digest, self.kept[digest])
        read = self.read(path)
        if read.digest != digest:
            raise AdapterError("another adapter")
        return read.known

    def keep(self, digest: str, known: Known) -> bool:
        if self.keeps:
            self.kept[digest] = known.num_bytes
        return self.keeps

    def drop(self, digest: str) -> None:
        self.kept.pop(digest, None)


class Later(Executor):
    """Runs what was submitted when it is told to, in any order."""

    def __init__(self):
        self.waiting: list[tuple[Any, Any]] = []

    def submit(self, fn, /, *args, **kwargs):
        self.waiting.append((fn, args))

    def run(self, which: int = 0) -> None:
        fn, args = self.waiting.pop(which)
        fn(*args)

    def shutdown(self, wait=True, *, cancel_futures=False):
        self.waiting.clear()


class Now(Executor):
    """Runs what is submitted at once."""

    def submit(self, fn, /, *args, **kwargs):
        fn(*args)


def registered(store, files, name, size=10, digest=None, **options) -> Registered:
    files.disk[f"/{name}"] = (digest or f"{name}-", size)
    return store.register(name, f"/{name}", **options)
