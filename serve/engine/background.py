"""Other device work beside requests, such as training: units that are calls in the engine's own queue."""

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterable
from collections.abc import Sequence as Many
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Protocol

from serve.engine.pacing import Pacing, Requests
from serve.engine.plan import Step
from serve.engine.sequence import Sequence


@dataclasses.dataclass(frozen=True, kw_only=True)
class Unit:
    """One call of other work.

    Attributes:
        start: starts it on the device, given the base model's weights as the engine holds them (the serving layout),
            and returns arrays that are there when it is done. It does not wait, and leaves the weights as they are.
        seconds: how long it is expected to take on the device.
        name: of its kind; units of one name take the host about as long to start.
    """

    start: Callable[[Any], Any]
    seconds: float
    name: str = ""


class Work(Protocol):
    """Where units come from. All calls are made by the engine's thread.

    Work that makes its units ready in another thread may have an attribute ``pause``: the seconds, above 0, after which
    an engine without requests is to ask for a unit again, or None.

    class Training:
        def next(self): return Unit(start=self.backward, seconds=self.measured)
        def done(self, unit, seconds): self.measured = 0.8 * self.measured + 0.2 * seconds
        def failed(self, unit, error): self.error = error
    """

    def next(self) -> Unit | None:
        """Return the unit that comes next; None: there is nothing to do now."""
        ...

    def done(self, unit: Unit, seconds: float) -> None:
        """Note that a unit is over and how long it took."""
        ...

    def failed(self, unit: Unit, error: Exception) -> None:
        """Note that a unit failed. Requests are not affected."""
        ...


class Repeated:
    """Work that is one function, started again and again while it returns arrays; None ends it.

    Args:
        start: see ``Unit``.
        seconds: what the first unit is expected to take; then it is what the latest ones took.
    """

    def __init__(self, start: Callable[[Any], Any], *, seconds: float = 0.01):
        self._start = start
        self._seconds = seconds
        self._more = True
        self.units = 0
        self.error: Exception | None = None

    def next(self) -> Unit | None:
        """Return a unit until one failed or had nothing to do."""
        return Unit(start=self._run, seconds=self._seconds) if self._more else None

    def done(self, unit: Unit, seconds: float) -> None:
        """Expect what the unit took and what was expected before, half each."""
        self.units += self._more
        self._seconds = (self._seconds + seconds) / 2

    def failed(self, unit: Unit, error: Exception) -> None:
        """Stop for good."""
        self.error, self._more = error, False

    def _run(self, params: Any) -> Any:
        arrays = self._start(params)
        self._more = arrays is not None
        return arrays


@dataclasses.dataclass(kw_only=True)
class UnitCall:
    """A unit that the device works on; ``over`` has the time when it was done, or why it failed."""

    unit: Unit
    arrays: Any
    started: float
    over: "Future[float] | None" = None

    @property
    def is_over(self) -> bool:
        """Whether the device is done with it."""
        return self.over is not None and self.over.done()


class Background:
    """Starts units: while nothing is asked for, always; beside requests, as a ``Pacing`` allows.

    Args:
        work: where units come from; None: there is none.
        pacing: says when a unit runs beside requests.
        clock: seconds.
        wait: waits for arrays; called by a thread that notes when a unit is over, for the engine may look much later.
        may_compile: entered around each call of the work's own code, whose compilations are not the engine's.
    """

    MARGIN = 0.001
    """Seconds before the expected end of a unit at which the next one behind it is to be on the device, if no request
    is there: the host begins to start it as much earlier as it took to start the last ones of that name."""

    LONGEST_PAUSE = 0.05
    """Seconds after which an idle engine looks again in any case: a unit may end sooner than expected."""

    def __init__(
        self,
        work: Work | None,
        pacing: Pacing,
        clock: Callable[[], float] = time.perf_counter,
        wait: Callable[[Any], object] = lambda arrays: None,
        may_compile: Callable[[], contextlib.AbstractContextManager[object]] = contextlib.nullcontext,
    ):
        self.pacing = pacing
        self._work = work
        self._wait = wait
        self._may_compile = may_compile
        self._watch = ThreadPoolExecutor(1, "unit-watch")
        self._clock = clock
        self._next: Unit | None = None
        # What the host took to start a unit, by name.
        self._starting: dict[str, float] = {}
        # A unit that is between its queue and the calls under way.
        self.in_hand: Unit | None = None

    def arrived(self, sequences: Iterable[Sequence]) -> None:
        """Note samples of a request that was taken."""
        if self._work is not None:
            self.pacing.arrived(sequences, self._clock())

    def opened(self, queue: Many[Step | Unit], since: float, requests: Requests) -> None:
        """Look for room; arguments as ``Pacing.opened`` has them, with units themselves."""
        if self._peek() is not None:
            seconds = [one if isinstance(one, Step) else one.seconds for one in queue]
            self.pacing.opened(seconds, since, requests, self._clock())

    def collected(self, step: Step, seconds: float) -> None:
        """Note that a step is over, how long it took, and that its tokens are known."""
        if self._work is not None:
            self.pacing.collected(step, seconds, self._clock())

    def beside(self) -> Unit | None:
        """Return a unit to start behind what was queued when ``opened`` was called, if there is room for it."""
        unit = self._peek()
        return self._take() if unit is not None and self.pacing.takes(unit.seconds) else None

    def idle(self, last: UnitCall | None) -> Unit | None:
        """Return a unit to start while nothing is asked for, if the last one is over or nearly so."""
        return self._take() if self.pause(last) == 0 else None

    def pause(self, last: UnitCall | None) -> float | None:
        """Return the seconds after which an idle engine should look again; None: there is nothing to do."""
        following = self._peek()
        if following is None and last is None:
            return getattr(self._work, "pause", None)
        if last is None or last.is_over:
            return 0.0
        ahead = self.MARGIN if following is None else self.MARGIN + self._starting.get(following.name, 0.0)
        left = last.started + last.unit.seconds - ahead - self._clock()
        return min(max(0.0, left), self.LONGEST_PAUSE)

    def is_over(self, call: UnitCall) -> bool:
        """Whether an idle engine should wait for a unit now: it is nearly over and no other comes behind it."""
        return self.pause(call) == 0 and self._peek() is None

    def done(self, call: UnitCall, seconds: float) -> None:
        """Note that a unit is over."""
        assert self._work is not None
        self.pacing.unit_over(call.unit.seconds, seconds, self._clock())
        with self._may_compile():
            self._work.done(call.unit, seconds)

    def failed(self, unit: Unit, error: Exception) -> None:
        """Note that a unit failed."""
        assert self._work is not None
        with self._may_compile():
            self._work.failed(unit, error)

    def start(self, unit: Unit, params: Any) -> UnitCall | None:
        """Start a unit; None if it fails."""
        started = self._clock()
        try:
            with self._may_compile():
                arrays = unit.start(params)
            self._starting[unit.name] = (self._starting.get(unit.name, 0.0) + self._clock() - started) / 2
            over = self._watch.submit(self._when_over, arrays)
            return UnitCall(unit=unit, arrays=arrays, started=started, over=over)
        except Exception as error:
            self.failed(unit, error)
            return None

    def _when_over(self, arrays: Any) -> float:
        self._wait(arrays)
        return self._clock()

    def interrupted(self, calls: Iterable[UnitCall]) -> None:
        """Note that the engine was cut off: a unit that is in none of the ``calls`` under way counts as failed."""
        unit = self.in_hand
        if unit is not None and self._next is not unit and all(call.unit is not unit for call in calls):
            self.failed(unit, InterruptedError("the engine was interrupted while it started or ended this work"))
        self.in_hand = None

    def _peek(self) -> Unit | None:
        if self._next is None and self._work is not None:
            with self._may_compile():
                self._next = self._work.next()
        return self._next

    def _take(self) -> Unit | None:
        self.in_hand = unit = self._peek()
        self._next = None
        return unit
