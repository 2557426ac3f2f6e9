"""How much other work runs beside requests: a fixed share of the device's time, or what a latency promise leaves.

``Promise`` is told what requests were promised: their TTFT, and their mean TPOT, each for a percentile of all requests.
It measures calls and units, and says before each further unit whether the requests can afford it.

A request that has ``k + 1`` tokens keeps its TPOT promise if its newest token came within ``k * TPOT`` of its first.
It may end with any token: an end token is not foreseen, and a stall before the last token is never made good. So the
promise is kept at every token, not only at ``max_tokens``. What a request is ahead of it is its *slack*:

    slack = first token's time + k * TPOT - expected time of its next token

A unit delays all running requests by its length. It may begin if the slack of each of them is longer than that, and if
a *reserve* is left. The reserve is for what serving does by itself, such as the prefill of a prompt that comes next:
after it, requests without slack are late for some tokens. How late follows from the times of serving alone, which are
the measured ones less those of units: ``lag = max(0, lag + time - TPOT)`` at each token. The reserve is a high quantile
of the lag. A young request has not earned that much yet; half of what it has earned is kept. Slack that was saved up is
not spent at once: units between two calls take two promised TPOTs at most, or are one unit. So a gap between two tokens
stays short, and the mean is kept as well.

Prompts go first: no unit begins while one waits that no call under way takes, so none does while a burst lasts. Who is
still to come waits behind all that is queued, and then as long as serving alone lets nearly all wait; both together
stay within the promised TTFT. While serving alone takes the promised TPOT for a token, no unit runs.

Errors of all these estimates show in requests that break their promise and would not have broken it alone. Each of them
raises the reserve, and each other request lowers it a little: in the long run as many break it as the percentile
allows, whatever the estimates are. Requests that are late without units, and cannot catch up, hold up nobody. A unit
that is longer than any slack runs while nothing is asked for.
"""

import collections
import dataclasses
import math
from collections.abc import Collection, Iterable, Mapping
from collections.abc import Sequence as Many
from typing import Protocol

from preft_jax.errors import ConfigError
from serve.engine.plan import Step
from serve.engine.sequence import Sequence, Status


class Requests(Protocol):
    """Requests as the scheduler has them."""

    @property
    def running(self) -> Collection[Sequence]:
        """Those that decode, and those whose prompts end with a step under way."""
        ...

    @property
    def prefilling(self) -> Collection[Sequence]:
        """Those with prompt tokens that no step under way computes."""
        ...

    @property
    def waiting(self) -> Iterable[Sequence]:
        """Those in the queue, in order."""
        ...


class Pacing(Protocol):
    """Says when units run beside requests. Times are seconds of the engine's clock; calls come from its thread."""

    def arrived(self, sequences: Iterable[Sequence], now: float) -> None:
        """Note samples of a request that was taken."""
        ...

    def opened(self, queue: Many[Step | float], since: float, requests: Requests, now: float) -> None:
        """Look how many units may go behind what is queued: behind a step that was just started, or behind units.

        Args:
            queue: what the device works on, oldest first: steps, and the expected seconds of units.
            since: when it began with the oldest.
            requests: of the engine.
            now: the time.
        """
        ...

    def takes(self, seconds: float) -> bool:
        """Whether a unit of so many seconds is started now, behind what is queued; if so it counts as started."""
        ...

    def collected(self, step: Step, seconds: float, now: float) -> None:
        """Note that a step is over, how long it took, and that its tokens are known."""
        ...

    def unit_over(self, expected: float, seconds: float, now: float) -> None:
        """Note that a unit is over, what it was expected to take, and what it took."""
        ...


class Share:
    """A fixed part of the device's time.

    Of each second that calls of requests take, units earn so many that they take ``share`` of the whole. One is started
    once what it is expected to take has been earned, and never two between two calls. Time is not saved up beyond that.

    Args:
        share: from 0 up to, not including, 1.
    """

    def __init__(self, share: float):
        if not 0 <= share < 1:
            raise ConfigError(f"background_share is {share!r}; give 0 up to, not including, 1")
        self._rate = share / (1 - share)
        self._earned = 0.0
        self._is_open = False

    def arrived(self, sequences: Iterable[Sequence], now: float) -> None:
        """See ``Pacing``: it makes no difference."""

    def opened(self, queue: Many[Step | float], since: float, requests: Requests, now: float) -> None:
        """See ``Pacing``."""
        self._is_open = self._rate > 0 and isinstance(queue[-1], Step)

    def takes(self, seconds: float) -> bool:
        """See ``Pacing``."""
        if not self._is_open or self._earned < seconds:
            return False
        self._earned, self._is_open = 0.0, False
        return True

    def collected(self, step: Step, seconds: float, now: float) -> None:
        """See ``Pacing``."""
        self._earned += self._rate * seconds

    def unit_over(self, expected: float, seconds: float, now: float) -> None:
        """See ``Pacing``: it makes no difference."""


class Reserve:
    """A high quantile of what serving alone does, of the latest values and of those of some minutes.

    Args:
        tail: the part of all values that may lie above.
        step: by how much it is raised for a request that broke its promise through units.

    Attributes:
        found: the quantile, in seconds.
        raised: what broken promises added, in seconds.
    """

    RECENT, LONG, EVERY = 256, 2048, 16

    def __init__(self, tail: float, step: float):
        self._tail = tail
        self._step = step
        self._recent: collections.deque[float] = collections.deque(maxlen=self.RECENT)
        self._long: collections.deque[float] = collections.deque(maxlen=self.LONG)
        self._count = 0
        self.found = 0.0
        self.raised = 0.0

    @property
    def seconds(self) -> float:
        """What is to be kept back."""
        return self.found + self.raised

    def add(self, value: float) -> None:
        """Note a value."""
        self._recent.append(value)
        if self._count % self.EVERY == 0:
            self._long.append(value)
        self._count += 1
        if self._count <= self.EVERY or self._count % self.EVERY == 0:
            self.found = max(_quantile(values, 1 - self._tail) for values in (self._recent, self._long))

    def ended(self, *, broke: bool) -> None:
        """Note a request that ended, and whether it broke its promise through units."""
        self.raised = max(0.0, self.raised + (broke - self._tail) * self._step)


def _quantile(values: Iterable[float], q: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, math.ceil(q * len(ordered)))] if ordered else 0.0


class CallTimes:
    """What calls take, by kind and size; the latest ones count most."""

    OF_THE_NEW = 0.2

    def __init__(self) -> None:
        self._seconds: dict[tuple[str, int], float] = {}
        self._repeats = 1

    def add(self, step: Step, seconds: float) -> None:
        """Note what a step took."""
        key, each = self._key(step), seconds / step.repeats
        before = self._seconds.get(key, each)
        self._seconds[key] = before + self.OF_THE_NEW * (each - before)
        if not step.chunks:
            self._repeats = step.repeats

    def of(self, step: Step) -> float:
        """Return the seconds that a step is expected to take."""
        return step.repeats * self._nearest(*self._key(step))

    def next_decode(self, rows: int) -> float:
        """Return what the next decode call of so many rows is expected to take, of as many steps as the last one."""
        return self._repeats * self._nearest("decode", rows.bit_length())

    @staticmethod
    def _key(step: Step) -> tuple[str, int]:
        return step.kind, (step.num_tokens or len(step.rows)).bit_length()

    def _nearest(self, kind: str, size: int) -> float:
        known = [(abs(own - size), -own) for of_kind, own in self._seconds if of_kind == kind]
        return self._seconds[kind, -min(known)[1]] if known else 0.0


@dataclasses.dataclass
class _Own:
    """A request's tokens as the client has them.

    Attributes:
        first, last: when its first and its latest token came.
        units: what units had taken until the first token.
        delay: what units took between these two tokens.
        tokens: how many there are.
    """

    first: float
    units: float
    last: float
    delay: float = 0.0
    tokens: int = 1


class Promise:
    """What a promise of TTFT and TPOT leaves.

    Args:
        tpot_ms: milliseconds per output token after the first, in the mean of a request.
        ttft_ms: milliseconds from a request's arrival to its first token.
        percentile: part of all requests that are to keep each of both, above 0 and below 1.
        slowdown: how much longer units may make the time from a request's first token to its last: 0.1 is a tenth.
            None: as the promise allows.

    Attributes:
        ended: requests that ended.
        broken: those of them that broke a promise which they would have kept without units.
    """

    GAP = 2.0
    """Promised TPOTs that units between two calls take at most, unless it is one unit."""

    def __init__(self, *, tpot_ms: float, ttft_ms: float, percentile: float = 0.97, slowdown: float | None = None):
        for name, value in (("tpot_ms", tpot_ms), ("ttft_ms", ttft_ms), ("slowdown", slowdown)):
            if value is not None and not 0 < value < math.inf:
                raise ConfigError(f"{name} is {value!r}; give a number above 0")
        if not 0 < percentile < 1:
            raise ConfigError(f"percentile is {percentile!r}; give a part of all requests, such as 0.97")
        self.tpot, self.ttft = tpot_ms / 1e3, ttft_ms / 1e3
        self.percentile = percentile
        self.slowdown = slowdown
        self.ended = self.broken = 0
        # Half of those that may break it are left to errors.
        tail = (1 - percentile) / 2
        self._lags = Reserve(tail, self.tpot)
        self._waits = Reserve(tail, self.ttft / 10)
        self._times = CallTimes()
        self._arrived: dict[Sequence, tuple[float, float]] = {}
        self._own: dict[Sequence, _Own] = {}
        # All that units took so far, and of that until the last decode call ended.
        self._units = self._units_before = 0.0
        self._before: float | None = None
        self._lag = 0.0
        self._each: float | None = None
        # How far units are from what they are expected to take; and what requests lose by one, over what it takes.
        self._honesty, self._stretch = 1.0, 1.0
        # Seconds a token without units and prompts beside it, by the number of rows.
        self._undisturbed: dict[int, float] = {}
        self._prompts = False
        self._room = self._given = 0.0

    # What happened

    def arrived(self, sequences: Iterable[Sequence], now: float) -> None:
        """See ``Pacing``."""
        self._arrived |= dict.fromkeys(sequences, (now, self._units))

    def unit_over(self, expected: float, seconds: float, now: float) -> None:
        """See ``Pacing``."""
        self._units += seconds
        if expected > 0:
            ratio = min(max(seconds / expected, 0.1), 10.0)
            self._honesty += 0.1 * (ratio - self._honesty)

    def collected(self, step: Step, seconds: float, now: float) -> None:
        """See ``Pacing``."""
        self._times.add(step, seconds)
        goes_on = False
        for sequence in step.sampled:
            if sequence.generated == 0:
                continue
            if sequence not in self._own:
                self._own[sequence] = _Own(now, self._units, now)
                self._began_answer(sequence, now)
            own = self._own[sequence]
            own.last, own.delay, own.tokens = now, self._units - own.units, sequence.generated
            goes_on |= sequence.status is Status.RUNNING and sequence.remaining > 0
        self._prompts |= bool(step.chunks)
        if step.rows:
            self._took(step.repeats, len(step.rows), now)
            self._prompts = False
        if not goes_on and (step.rows or self._before is None):
            self._before = None
        elif self._before is None or step.rows:
            self._before, self._units_before = now, self._units

    def _took(self, repeats: int, rows: int, now: float) -> None:
        """Note the time since the last tokens, without what units took of it."""
        if self._before is None:
            self._lag = 0.0
            return
        units = self._units - self._units_before
        alone = max(0.0, now - self._before - units)
        each = alone / repeats
        if not self._prompts:
            self._compare(rows.bit_length(), each, units / repeats)
        self._each = each if self._each is None else self._each + 0.05 * (each - self._each)
        self._lag = max(0.0, self._lag + alone - repeats * self.tpot)
        self._lags.add(self._lag)

    def _compare(self, size: int, each: float, units: float) -> None:
        """Learn what a token takes undisturbed, or by how much more than units it takes beside them."""
        alone = self._undisturbed.get(size)
        if units == 0:
            self._undisturbed[size] = each if alone is None else alone + 0.05 * (each - alone)
        elif alone is not None:
            lost = min(max((each + units - alone) / units, 1.0), 3.0)
            self._stretch += 0.1 * (lost - self._stretch)

    def _began_answer(self, sequence: Sequence, now: float) -> None:
        arrival, units = self._arrived.pop(sequence, (None, 0.0))
        if arrival is not None:
            took, alone = now - arrival, max(0.0, now - arrival - (self._units - units))
            self._waits.add(alone)
            self._waits.ended(broke=took > self.ttft >= alone)

    def _sweep(self) -> None:
        """Judge the requests that ended."""
        for sequence in [one for one in self._arrived if one.status is Status.FINISHED]:
            del self._arrived[sequence]
        for sequence in [one for one in self._own if one.status is Status.FINISHED]:
            own = self._own.pop(sequence)
            promised, took = (own.tokens - 1) * self.tpot, own.last - own.first
            broke = took > promised >= took - own.delay
            self.ended += 1
            self.broken += broke
            self._lags.ended(broke=broke)

    # What may run

    def opened(self, queue: Many[Step | float], since: float, requests: Requests, now: float) -> None:
        """See ``Pacing``."""
        self._sweep()
        if isinstance(queue[-1], Step):
            self._given = 0.0
        self._room = 0.0
        if requests.prefilling or next(iter(requests.waiting), None) is not None:
            return  # Prompts go first.
        units, at = 0.0, since
        firsts: dict[Sequence, float] = {}
        for one in queue:
            if isinstance(one, Step):
                at += self._times.of(one)
                firsts |= {own: at for own in one.sampled if own not in self._own and own not in firsts}
            else:
                at += self._honesty * one
                units += self._honesty * one
        # Who comes now waits for all of this.
        ends = max(now, at)
        room = self.ttft - self._waits.seconds - (ends - now)
        self._room = min(room, self._room_of_running(requests, ends, units, firsts))

    def takes(self, seconds: float) -> bool:
        """See ``Pacing``."""
        expected = self._honesty * seconds
        if expected > self._room or (self._given and self._given + expected > self.GAP * self.tpot):
            return False
        self._room -= expected
        self._given += expected
        return True

    def _room_of_running(self, requests: Requests, at: float, units: float, firsts: Mapping[Sequence, float]) -> float:
        """Return how long units may take so that running requests keep their promise.

        Args:
            requests: all of them.
            at: when the queue is expected to be done.
            units: seconds of units in the queue.
            firsts: when first tokens are expected that the queue brings.
        """
        decode = self._times.next_decode(len(requests.running))
        running = [sequence for sequence in requests.running if sequence.undrawn > 0]
        if not running:
            return math.inf
        each = self._each
        if each is None or each >= self.tpot:
            return 0.0  # Nothing is known of serving alone, or it keeps no promise now.
        alone = self._undisturbed.get(len(running).bit_length(), each)
        rooms = []
        for sequence in running:
            tokens = sequence.generated + sequence.drawing
            own = self._own.get(sequence)
            first = firsts.get(sequence, at) if own is None else own.first
            slack = first + tokens * self.tpot - (at + decode)
            if slack + (sequence.undrawn - 1) * (self.tpot - each) < 0:
                continue  # It cannot catch up.
            room = slack - self._lags.raised - min(self._lags.found, tokens * (self.tpot - each) / 2)
            if self.slowdown is not None:
                delay = units if own is None else units + self._units - own.units
                room = min(room, self.slowdown * tokens * alone / self._stretch - delay)
            rooms.append(room)
        return min(rooms, default=math.inf)
