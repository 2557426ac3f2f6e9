"""What the device works on: steps of requests, and units of other work behind them."""

import collections
import itertools
from collections.abc import Callable

from preft_jax.models.params import Params
from serve.engine.background import Background, Unit, UnitCall
from serve.engine.calls import Call, Prepared
from serve.engine.pacing import Requests
from serve.engine.plan import Step


class UnderWay:
    """Calls that were started and not collected, oldest first: two steps at most, each with units behind it.

    Args:
        background: where units come from.
        clock: seconds.

    Units that are long enough hide what the host does between two steps. So a step behind them is planned late: once
    the tokens of the step before went out, and no further unit has room.

    Attributes:
        calls: all of them.
        prepared: a call that is started as soon as the oldest one is over.
    """

    COVER = 0.004
    """Seconds of units behind a step that give the host the time to start the next one, if it took no longer."""

    MOST = 8
    """Units that are started behind a step at once, however short they are."""

    def __init__(self, background: Background, clock: Callable[[], float]):
        self.calls: collections.deque[Call | UnitCall] = collections.deque()
        self.prepared: Prepared | None = None
        self._background = background
        self._clock = clock
        self._results_at = 0.0
        # When the last step's results came, if nothing was waited for since; and what the host takes from there until
        # the next step is started.
        self._collected_at: float | None = None
        self._host = 0.0

    @property
    def _cover(self) -> float:
        return max(self.COVER, self._host)

    @property
    def steps(self) -> list[Step]:
        """The steps among them."""
        return [call.step for call in self.calls if isinstance(call, Call)]

    @property
    def covers(self) -> bool:
        """Whether units behind the last step, or alone, keep the device busy until a step is started behind them."""
        units = itertools.takewhile(lambda call: isinstance(call, UnitCall), reversed(self.calls))
        return sum(call.unit.seconds for call in units if isinstance(call, UnitCall)) >= self._cover

    @property
    def pause(self) -> float | None:
        """Seconds after which an engine without requests should look again; None: there is nothing to do."""
        return self._background.pause(self._last_unit)

    @property
    def _last_unit(self) -> UnitCall | None:
        last = self.calls[-1] if self.calls else None
        return last if isinstance(last, UnitCall) else None

    def started(self, call: Call) -> None:
        """Add a step that was just started behind all others."""
        if self.steps:
            self._host *= 0.98  # Not measured while steps are started ahead.
        elif self._collected_at is not None and self.calls:
            self._host += 0.2 * (self._clock() - self._collected_at - self._host)
        self._collected_at = None
        self.calls.append(call)

    def took(self, started: float) -> float:
        """Return what the oldest step took, which is over now."""
        now = self._collected_at = self._clock()
        return self._took(started, now)

    def _took(self, started: float, now: float) -> float:
        seconds, self._results_at = max(0.0, now - max(started, self._results_at)), now
        return seconds

    def interrupted(self) -> None:
        """Forget steps after the engine was cut off; units go on, but not one that was just being started or ended."""
        units = [call for call in self.calls if isinstance(call, UnitCall)]
        self._background.interrupted(units)
        self.calls, self.prepared = collections.deque(units), None

    def forget_steps(self) -> None:
        """Forget steps whose results are lost. Units touch nothing of the engine's: they go on."""
        self.calls = collections.deque(call for call in self.calls if isinstance(call, UnitCall))
        self.prepared = None

    # Units

    def start_beside(self, requests: Requests, params: Params) -> None:
        """Start units behind a step that was started last, if there is room: one, or as many short ones as cover."""
        if self.steps:
            self._open(requests)
            for _ in range(self.MOST):
                if self.covers or not self._start(self._background.beside(), params):
                    break

    def go_on(self, requests: Requests, params: Params) -> bool:
        """Start units behind others while no step is under way, as far as there is room.

        Returns whether to wait for the oldest one: those behind it give the host time for a step. If not, there is no
        further room, and a step comes next.
        """
        if not self.calls or self.steps:
            return False
        if not self._hides_host():
            self._open(requests)
            while len(self.calls) <= self.MOST and not self._hides_host():
                if not self._start(self._background.beside(), params):
                    return False
        return True

    def _hides_host(self) -> bool:
        behind = itertools.islice(self.calls, 1, None)
        return sum(call.unit.seconds for call in behind if isinstance(call, UnitCall)) >= self._cover

    def _open(self, requests: Requests) -> None:
        queue = [call.step if isinstance(call, Call) else call.unit for call in self.calls]
        self._background.opened(queue, max(self.calls[0].started, self._results_at), requests)

    def start_idle(self, params: Params) -> None:
        """Start a unit for an engine without requests, if the last one is over or nearly so."""
        if len(self.calls) < 2:
            self._start(self._background.idle(self._last_unit), params)

    def _start(self, unit: Unit | None, params: Params) -> bool:
        if unit is None:
            return False
        call = self._background.start(unit, params)
        if call is not None:
            self.calls.append(call)
        self._background.in_hand = None
        return call is not None

    def end_oldest_unit(self) -> bool:
        """End the oldest call if it is a unit and others are behind it, or nothing is; whether it is a unit."""
        call = self.calls[0]
        if not isinstance(call, UnitCall):
            return False
        # The tokens of the call before it went out.
        if len(self.calls) > 1 or self._background.is_over(call):
            self._end(call)
        return True

    def _end(self, call: UnitCall) -> None:
        """Wait for a unit, the oldest call."""
        self._background.in_hand = call.unit
        self._collected_at = None
        self.calls.popleft()
        try:
            assert call.over is not None
            now = call.over.result()
        except Exception as error:
            self._background.failed(call.unit, error)
        else:
            self._background.done(call, self._took(call.started, now))
            if self.calls:
                self.calls[0].started = max(self.calls[0].started, now)  # Then the device began it.
        self._background.in_hand = None
