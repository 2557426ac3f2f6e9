"""Generating load: requests that arrive over time, sent to a target, and what came back when.

What is loaded is behind ``Target``. ``EngineTarget`` here drives an engine in this process;
``serve.bench.client.HttpTarget`` drives a server. Both return the same records.
"""

import collections
import dataclasses
import heapq
import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from preft_jax.errors import PreftError
from serve.bench.metrics import LoadResult, RequestRecord


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoadRequest:
    """One request of a benchmark.

    Attributes:
        arrival: seconds after the start at which it arrives.
        prompt: token ids.
        max_tokens: tokens to generate.
        user: number of its adapter; None for the base model.
    """

    arrival: float
    prompt: list[int]
    max_tokens: int
    user: int | None = None


def _ignore() -> None:
    pass


class Target(Protocol):
    """Something that can be loaded."""

    def run(self, requests: Sequence[LoadRequest], on_done: Callable[[], None] = _ignore) -> LoadResult:
        """Send requests as they arrive, wait for all of them, and return their records in the given order.

        ``on_done`` is called whenever one has ended. A request that is refused or fails is a record, not an error.
        """
        ...

    def counters(self) -> dict[str, float]:
        """Return what the target counts about itself, by name; empty if nothing can be known."""
        ...


class EngineLike(Protocol):
    """What load needs of an engine."""

    @property
    def has_work(self) -> bool:
        """Whether a request is waiting or running."""
        ...

    def add(self, request: Any) -> int:
        """Take a request and return its id; raises ``PreftError`` if it can never be served."""
        ...

    def step(self) -> Sequence[Any]:
        """Do one step and return what it added to each request, as ``serve.engine.request.Output``."""
        ...

    def cancel(self, request_id: int) -> Any:
        """Give a request up."""
        ...

    @property
    def stats(self) -> Any:
        """Counters, as the fields of a dataclass."""
        ...


@dataclasses.dataclass
class _Flight:
    """A request while it runs."""

    index: int
    request: LoadRequest
    sent: float
    times: list[float] = dataclasses.field(default_factory=list)
    output_len: int = 0

    def record(self, status: str = "completed", error: str | None = None) -> RequestRecord:
        return RequestRecord(
            prompt_len=len(self.request.prompt),
            output_len=self.output_len,
            sent=self.sent,
            times=tuple(self.times),
            adapter=self.request.user,
            status=status,
            error=error,
        )


_STATUS = {"stop": "completed", "length": "completed", "abort": "aborted"}
"""Status of a request by finish reason; any other one is a failure."""


BURST = 64
"""Requests that are submitted between two steps: the engine begins with the first of many that come at once."""


class EngineTarget:
    """Loads an engine in this process: submits what has arrived between its steps, and sleeps while nothing is there.

    A request counts from its arrival, also if a step was running then. While ``max_concurrency`` requests run, others
    wait outside the engine, and count from the moment that one of those ended. Outputs count from the end of the step
    that returned them.
    """

    def __init__(
        self,
        engine: EngineLike,
        make_request: Callable[[LoadRequest], Any],
        *,
        max_concurrency: int | None = None,
        clock: Callable[[], float] = time.perf_counter,
        sleep: Callable[[float], None] = time.sleep,
    ):
        self.engine = engine
        self._make_request = make_request
        self._max_concurrency = max_concurrency
        self._clock = clock
        self._sleep = sleep

    def run(self, requests: Sequence[LoadRequest], on_done: Callable[[], None] = _ignore) -> LoadResult:
        """See ``Target``; if it is interrupted, the requests that run are cancelled."""
        state = _EngineRun(requests, self._max_concurrency, on_done)
        start = self._clock()
        try:
            while state.waiting or state.flights:
                now = self._clock() - start
                for _ in range(BURST):
                    if not state.slots or state.next_arrival() > now + 1e-9:
                        break
                    self._submit(state)
                if state.flights:
                    self._step(state, start)
                elif state.waiting:
                    self._sleep(max(0.0, state.next_arrival() - (self._clock() - start)))
        except BaseException:
            for request_id in state.flights:
                self.engine.cancel(request_id)
            raise
        return LoadResult([state.records[i] for i in range(len(requests))], self._clock() - start)

    def counters(self) -> dict[str, float]:
        """Return the numbers of ``engine.stats``."""
        fields = dataclasses.asdict(self.engine.stats)
        return {name: v for name, v in fields.items() if isinstance(v, int | float) and not isinstance(v, bool)}

    def _submit(self, state: "_EngineRun") -> None:
        index, request = state.waiting.popleft()
        flight = _Flight(index, request, max(request.arrival, heapq.heappop(state.slots)))
        try:
            request_id = self.engine.add(self._make_request(request))
        except PreftError as error:
            state.end(flight, flight.sent, "rejected", str(error))
        else:
            state.flights[request_id] = flight

    def _step(self, state: "_EngineRun", start: float) -> None:
        stuck = not self.engine.has_work
        outputs = [] if stuck else self.engine.step()
        now = self._clock() - start
        for request_id in list(state.flights) if stuck else ():
            state.end(state.flights.pop(request_id), now, "failed", "the engine stopped before this request had ended")
        for output in outputs:
            flight = state.flights.get(output.request_id)
            if flight is None:
                continue
            if output.token_ids or (output.finish_reason is not None and not flight.times):
                flight.times.append(now - flight.sent)
                flight.output_len += len(output.token_ids)
            if output.finish_reason is not None:
                del state.flights[output.request_id]
                state.end(flight, now, _STATUS.get(output.finish_reason, "failed"), output.error)


class _EngineRun:
    """Where the requests of one run are: waiting, in flight by request id, or done.

    ``slots`` is a heap of the times since when each request that may yet be sent could have been: a request is sent at
    its arrival or, if it had to wait for one that ended in a step, at that step's end.
    """

    def __init__(self, requests: Sequence[LoadRequest], max_concurrency: int | None, on_done: Callable[[], None]):
        self.waiting = collections.deque(sorted(enumerate(requests), key=lambda item: item[1].arrival))
        self.flights: dict[int, _Flight] = {}
        self.records: dict[int, RequestRecord] = {}
        self.slots = [0.0] * (max_concurrency or len(requests))
        self._on_done = on_done

    def next_arrival(self) -> float:
        return self.waiting[0][1].arrival if self.waiting else float("inf")

    def end(self, flight: _Flight, now: float, status: str, error: str | None) -> None:
        self.records[flight.index] = flight.record(status, error)
        heapq.heappush(self.slots, now)
        self._on_done()
