"""Brings adapters' rank pages to the device: copied while a call runs, written to the bank behind it.

On a GPU a copy waits for all calls dispatched before it, and the arguments of a call wait for all copies begun before
them. So a later prompt's adapters are copied where they run beside a call: behind its arguments, before itself.
"""

from collections.abc import Callable, Collection, Iterable
from typing import Protocol

from serve.adapters import AdapterBank, Load

STRIKES = 2
"""Failures, of a sequence's call alone or of an adapter's write, after which it is given up."""


class Writer(Protocol):
    """What runs on the device."""

    def copy_adapter(self, load: Load) -> Load:
        """Begin to copy rank pages to the device; returns the load with the copies."""
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
    """

    def __init__(self, bank: AdapterBank, writer: Writer, room: int):
        self._bank = bank
        self._writer = writer
        self._room = room
        self._copied: dict[str, Load] = {}
        self._strikes: dict[str, int] = {}

    def reset(self) -> None:
        """Forget what was on its way: the device's state is made anew."""
        self._copied = {}

    def bring(self, digests: Collection[str]) -> None:
        """Have these adapters, for which the bank has places, written before the next call.

        Raises:
            WriteError: if that is impossible.
        """
        self._copy()
        self._write([digest for digest in self._copied if digest in digests])

    def ahead(self, digests: Iterable[str]) -> Callable[[], None] | None:
        """Give adapters of later prompts places in the bank, the next one first.

        Returns:
            What begins their copies, and raises ``WriteError`` if it cannot; None if nothing is to be copied.
        """
        taken = []
        for digest in digests:
            if sum(load.num_pages for load in self._bank.pending) >= self._room or not self._bank.acquire(digest):
                break
            taken.append(digest)
        for digest in taken:
            self._bank.release(digest)
        return self._copy if self._bank.pending else None

    def settle(self) -> None:
        """Write everything that was copied, behind the call that runs.

        Raises:
            WriteError: if that is impossible.
        """
        self._write(list(self._copied))

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

    def _copy(self) -> None:
        for load in self._bank.take_pending():
            try:
                self._copied[load.digest] = self._writer.copy_adapter(load)
            except Exception as error:
                raise WriteError([load.digest]) from error

    def _write(self, digests: list[str]) -> None:
        copied = [self._copied.pop(digest) for digest in digests]
        # The place of one that had to go again meanwhile belongs to another.
        loads = [load for load in copied if self._bank.is_at(load.digest, load.place)]
        together = [load for load in loads if load.digest not in self._strikes]
        apart = [[load] for load in loads if load.digest in self._strikes]
        for some in (*([together] if together else []), *apart):
            try:
                self._writer.write_adapters(some)
            except Exception as error:
                raise WriteError([load.digest for load in some]) from error
            for load in some:
                self._strikes.pop(load.digest, None)
