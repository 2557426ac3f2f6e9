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
from serve.engine.recovery import STRIKES
from serve.engine.residency import AdapterBank, Load


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
        bank: the books.
        writer: the device.
        room: rank pages that may lie beside the bank, copied ahead.
        observer: told of copies and writes.

    Attributes:
        waits: adapters whose copies began only when a call needed them.
    """

    def __init__(self, bank: AdapterBank, writer: Writer, room: int, observer: Observer | None = None):
        self._bank = bank
        self._writer = writer
        self._room = room
        self._observer = observer or Observer()
        self._placed: dict[str, Load] = {}
        self._copied: dict[str, Load] = {}
        self._strikes: dict[str, int] = {}
        self.waits = 0

    def reset(self) -> None:
        """Forget what was on its way: the device's state is made anew."""
        self._placed, self._copied = {}, {}

    def bring(self, digests: Collection[str]) -> None:
        """Have these adapters, for which the bank has places, written before the next call.

        Raises:
            WriteError: if that is impossible.
        """
        self._take_placed()
        self._write([digest for digest in self._placed if digest in digests and digest in self._copied])
        late = [load for digest, load in self._placed.items() if digest in digests]
        self.waits += len(late)
        if len(self._that_fit(late)) < len(late):
            self._copied = {}  # Later prompts' copies make room.
        while late:
            some = self._that_fit(late) or late[:1]
            del late[: len(some)]
            self._copy(some)
            self._write([load.digest for load in some])

    def copies(self, digests: Iterable[str]) -> Callable[[], None] | None:
        """Return what begins copies of adapters that are not in the bank, or None if there is nothing to copy.

        It raises ``WriteError`` if it cannot.

        Args:
            digests: those of the next prompts, in their order.
        """
        self._take_placed()
        missing = [self._bank.load(digest) for digest in dict.fromkeys(digests) if not self._bank.holds(digest)]
        # One that has a place may be on the host no more: whoever wanted it was cancelled.
        wanted = [*self._placed.values(), *missing]
        some = self._that_fit([load for load in wanted if load.digest not in self._copied])
        return (lambda: self._copy(some)) if some else None

    def settle(self, digests: Collection[str]) -> None:
        """Behind a call that runs: give places to later prompts' adapters that are copied, and write them.

        Args:
            digests: those of the next prompts, in their order. No place of one of them is given to a later one.

        Raises:
            WriteError: if something cannot be written.
        """
        taken = []
        for digest in digests:
            if self._bank.holds(digest) or digest in self._copied:
                if not self._bank.acquire(digest):
                    break
                taken.append(digest)
        for digest in taken:
            self._bank.release(digest)
        self._take_placed()
        self._write([digest for digest in self._placed if digest in self._copied])
        self._copied = {digest: load for digest, load in self._copied.items() if digest in digests}

    def blame(self, digests: list[str]) -> str | None:
        """Note that adapters could not be written together; return the one that is to be given up, if it is known.

        Several are tried one by one from now on; one that fails alone twice is given up.
        """
        if len(digests) > 1:
            self._strikes |= dict.fromkeys(digests, 0)
            return None
        (digest,) = digests
        self._strikes[digest] = self._strikes.get(digest, 0) + 1
        if self._strikes[digest] < STRIKES:
            return None
        del self._strikes[digest]
        return digest

    def _take_placed(self) -> None:
        """Take new places, and drop those that had to go again."""
        self._placed |= {load.digest: load for load in self._bank.take_pending()}
        self._placed = {name: load for name, load in self._placed.items() if self._bank.is_at(name, load.place)}

    def _that_fit(self, loads: list[Load]) -> list[Load]:
        """Return the first ones for whose copies there is room."""
        room = self._room - sum(load.num_pages for load in self._copied.values())
        pages = itertools.accumulate(load.num_pages for load in loads)
        return loads[: sum(up_to <= room for up_to in pages)]

    def _copy(self, loads: list[Load]) -> None:
        for some in self._groups(loads):
            with _blaming(some):
                self._observer.copying([load.digest for load in some])
                self._copied |= {load.digest: load for load in self._writer.copy_adapters(some)}

    def _write(self, digests: list[str]) -> None:
        loads = [self._copied.pop(digest)._replace(place=self._placed.pop(digest).place) for digest in digests]
        for some in self._groups(loads):
            with _blaming(some):
                self._observer.writing([load.digest for load in some])
                self._writer.write_adapters(some)
            for load in some:
                self._strikes.pop(load.digest, None)

    def _groups(self, loads: list[Load]) -> list[list[Load]]:
        """Return what is brought together: all, but each alone that was among some that failed."""
        together = [load for load in loads if load.digest not in self._strikes]
        apart = [[load] for load in loads if load.digest in self._strikes]
        return [together, *apart] if together else apart


@contextlib.contextmanager
def _blaming(loads: list[Load]) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        raise WriteError([load.digest for load in loads]) from error
