"""Brings adapters' rank pages to the device: copied while a call runs, written to the bank behind it.

On a GPU a copy waits for all calls dispatched before it, and the arguments of a call wait for all copies begun before
them. So a later prompt's adapters are copied where they run beside a call: behind its arguments, before itself.
"""

import contextlib
from collections.abc import Callable, Collection, Iterable, Iterator
from typing import Protocol

from serve.adapters import AdapterBank, Load

STRIKES = 2
"""Failures, of a sequence's call alone or of an adapter's write, after which it is given up."""


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
    """Copies and writes what the bank has given a place to.

    Args:
        bank: the books.
        writer: the device.
        room: rank pages that may lie beside the bank, copied ahead.

    Attributes:
        waits: adapters whose copies began only when a call needed them.
    """

    def __init__(self, bank: AdapterBank, writer: Writer, room: int):
        self._bank = bank
        self._writer = writer
        self._room = room
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
        late = [digest for digest in self._placed if digest in digests]
        self.waits += len(late)
        while late:
            # What is copied takes memory until it is written.
            room, some = self._room, []
            while late and (not some or self._placed[late[0]].num_pages <= room):
                room -= self._placed[late[0]].num_pages
                some.append(late.pop(0))
            self._copy(some)
            self._write(some)
        self._write([digest for digest in self._copied if digest in digests])

    def copies(self, only: Collection[str] | None = None) -> Callable[[], None] | None:
        """Return what begins the copies of adapters that have places, or None if there are none.

        It raises ``WriteError`` if it cannot.

        Args:
            only: copy none but these.
        """
        digests = [digest for digest in self._placed if only is None or digest in only]
        return (lambda: self._copy(digests)) if digests else None

    def settle(self, digests: Iterable[str]) -> None:
        """Behind a call that runs: write what was copied beside it, and give places to later prompts' adapters.

        Args:
            digests: those of the next prompts, in their order.

        Raises:
            WriteError: if something cannot be written.
        """
        self._write(list(self._copied))
        taken = []
        for digest in digests:
            waiting = [*self._placed.values(), *self._bank.pending]
            if sum(load.num_pages for load in waiting) >= self._room or not self._bank.acquire(digest):
                break
            taken.append(digest)
        for digest in taken:
            self._bank.release(digest)
        self._take_placed()

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
        """Take new loads, and drop those that had to go again."""
        self._placed |= {load.digest: load for load in self._bank.take_pending()}
        self._placed = {name: load for name, load in self._placed.items() if self._bank.is_at(name, load.place)}

    def _copy(self, digests: list[str]) -> None:
        for some in self._groups([self._placed.pop(digest) for digest in digests]):
            with _blaming(some):
                self._copied |= {load.digest: load for load in self._writer.copy_adapters(some)}

    def _write(self, digests: list[str]) -> None:
        for some in self._groups([self._copied.pop(digest) for digest in digests]):
            with _blaming(some):
                self._writer.write_adapters(some)
            for load in some:
                self._strikes.pop(load.digest, None)

    def _groups(self, loads: list[Load]) -> list[list[Load]]:
        """Return what is brought together: all, but each alone that was among some that failed.

        What had to go again meanwhile is left out: its place belongs to another.
        """
        loads = [load for load in loads if self._bank.is_at(load.digest, load.place)]
        together = [load for load in loads if load.digest not in self._strikes]
        apart = [[load] for load in loads if load.digest in self._strikes]
        return [together, *apart] if together else apart


@contextlib.contextmanager
def _blaming(loads: list[Load]) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        raise WriteError([load.digest for load in loads]) from error
