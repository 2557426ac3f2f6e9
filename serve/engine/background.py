"""Other device work between an engine's steps: training beside serving, for one."""

import time
from collections.abc import Callable
from typing import Protocol


class BackgroundWork(Protocol):
    """Work that an engine lets run between its steps.

    The device is one queue: while background work runs, requests wait. So an engine names the seconds that it can
    spare, and the work decides what fits.
    """

    def run(self, seconds: float) -> bool:
        """Do what can be expected to fit in ``seconds``, or nothing; return whether there is more to do.

        Must return only when the device has finished it, must not raise, and keeps its own failures to itself.
        """
        ...


class RepeatedCall:
    """Background work that is one function, called again and again while it returns true.

    The time of a call is expected to be that of the slowest call so far, halved at each call that was quicker, and a
    little less each time that there was no room for it: a first call that compiles is forgotten.
    """

    def __init__(self, call: Callable[[], bool], clock: Callable[[], float] = time.perf_counter):
        self._call = call
        self._clock = clock
        self._expected = 0.0
        self.calls = 0
        self.error: Exception | None = None
        self._more = True

    def run(self, seconds: float) -> bool:
        """Call while the next call is expected to end within ``seconds``; stop for good at the first failure."""
        end, before = self._clock() + seconds, self.calls
        while self._more and self._clock() + self._expected <= end:
            start = self._clock()
            try:
                self._more = bool(self._call())
            except Exception as error:
                self.error, self._more = error, False
            self.calls += 1
            self._expected = max(self._clock() - start, self._expected / 2)
        if self.calls == before:
            self._expected *= 0.9
        return self._more
