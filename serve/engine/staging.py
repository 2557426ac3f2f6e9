"""Brings adapters' rank pages to the device: copied beside the bank while a call runs, written to it behind the call.

On a GPU a copy waits for all calls dispatched before it, and the arguments of a call wait for all copies begun before
them. So a later prompt's adapters are copied where they run beside a call: behind its arguments, before itself. A copy
needs no place in the bank, so that a bank with room for one call keeps up.
"""

import contextlib
import itertools
from collections.abc import Callable, Collection, Iterable, Iterator
from typing import Protocol

from serve.engine.observer import Observer
from serve.engine.residency import Entry, Load, Residency


class Writer(Protocol):
    """What runs on the device."""

    def copy_adapters(self, loads: list[Load]) -> list[Load]:
        """Begin to copy rank pages to the device; returns the loads with the copies."""
        ...

    def write_adapters(self, loads: list[Load]) -> None:
        """Write copied rank pages to the bank."""
        ...


class WriteError(Exception):
    """Adapters, at least one of them, could not be brought to the device."""

    def __init__(self, digests: list[str]):
        super().__init__(*digests)
        self.digests = digests


class Staging:
    """Copies what the next prompts need, and writes it once the bank has given it a place.

    Args:
        adapters: where each one is; what is done is noted there.
        writer: the device.
        room: rank pages that may lie beside the bank, copied ahead.
        observer: told of copies and writes.

    Attributes:
        waits: adapters whose copies began only when a call needed them.
    """

    def __init__(self, adapters: Residency, writer: Writer, room: int, observer: Observer | None = None):
        self._adapters = adapters
        self._writer = writer
        self._room = room
        self._observer = observer or Observer()
        self.waits = 0

    def bring(self, digests: Collection[str]) -> None:
        """Have these adapters, for which the bank has places, written before the next call.

        Raises:
            WriteError: if that is impossible.
        """
        needed = [entry for entry in self._adapters.unwritten if entry.digest in digests]
        self._write([entry for entry in needed if entry.on_device is not None])
        late = [entry for entry in needed if not entry.written]
        self.waits += len(late)
        if len(self._that_fit(late)) < len(late):
            self._adapters.drop_copies()  # Later prompts' copies make room.
        while late:
            some = self._that_fit(late) or late[:1]
            del late[: len(some)]
            self._copy(some)
            self._write(some)

    def copies(self, digests: Iterable[str]) -> Callable[[], None] | None:
        """Return what begins copies of adapters that are not in the bank, or None if there is nothing to copy.

        It raises ``WriteError`` if it cannot.

        Args:
            digests: those of the next prompts, in their order.
        """
        ahead = [self._adapters.entry(digest) for digest in dict.fromkeys(digests)]
        wanted = [*self._adapters.unwritten, *(entry for entry in ahead if entry.place is None)]
        some = self._that_fit([entry for entry in wanted if entry.on_device is None])
        # Until they begin, an unwritten place may go to another, and with it the copy that nobody else holds.
        return (lambda: self._copy([entry for entry in some if entry.copy is not None])) if some else None

    def settle(self, digests: Collection[str]) -> None:
        """Behind a call that runs: give places to later prompts' adapters that are copied, and write them.

        Args:
            digests: those of the next prompts, in their order. No place of one of them is given to a later one.

        Raises:
            WriteError: if something cannot be written.
        """
        taken = []
        for entry in map(self._adapters.entry, digests):
            if entry.place is not None or entry.on_device is not None:
                if not self._adapters.acquire(entry.digest):
                    break
                taken.append(entry.digest)
        for digest in taken:
            self._adapters.release(digest)
        self._write([entry for entry in self._adapters.unwritten if entry.on_device is not None])
        self._adapters.drop_copies(but=digests)

    def _that_fit(self, entries: list[Entry]) -> list[Entry]:
        """Return the first ones for whose copies there is room."""
        room = self._room - self._adapters.copied_pages
        pages = itertools.accumulate(entry.load.num_pages for entry in entries)
        return entries[: sum(up_to <= room for up_to in pages)]

    def _copy(self, entries: list[Entry]) -> None:
        for some in _groups(entries):
            with _blaming(some):
                self._observer.copying([entry.digest for entry in some])
                self._adapters.copied(self._writer.copy_adapters([entry.load for entry in some]))

    def _write(self, entries: list[Entry]) -> None:
        for some in _groups(entries):
            with _blaming(some):
                self._observer.writing([entry.digest for entry in some])
                self._writer.write_adapters([entry.load for entry in some])
            self._adapters.written([entry.digest for entry in some])


def _groups(entries: list[Entry]) -> list[list[Entry]]:
    """Return what is brought together: all, but each alone that was among some that failed."""
    together = [entry for entry in entries if entry.strikes is None]
    apart = [[entry] for entry in entries if entry.strikes is not None]
    return [together, *apart] if together else apart


@contextlib.contextmanager
def _blaming(entries: list[Entry]) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        raise WriteError([entry.digest for entry in entries]) from error
