"""An engine for asyncio: one thread owns it and runs its steps, requests come in and outputs go out beside that.

What the thread is asked for lies in one inbox, which it empties between two steps; what a step gave goes to the event
loop in one piece.
"""

import asyncio
import collections
import dataclasses
import functools
import logging
import queue
import threading
import time
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

from preft_jax.errors import PreftError, RequestError
from serve.engine.request import Output, Request
from serve.store.names import Registered

_log = logging.getLogger("preft.server")

_SHORTEST_RETRY, _LONGEST_RETRY = 1.0, 60.0
_ABORT_SECONDS = 10.0
"""How long clients may take to read that their requests were given up, and the thread to end its step."""

_ADDED_AT_ONCE = 256
"""Samples after which the thread goes on with its steps before it takes more of the same body."""

_COMPILING_SECONDS = 1.0
"""How long the thread may take to end while it compiles, which nothing can end."""


class Overloaded(PreftError):  # noqa: N818 (a reason to wait, no fault)
    """Too many requests wait; ``retry_after`` seconds later there should be room."""

    def __init__(self, message: str, retry_after: float):
        super().__init__(message)
        self.retry_after = retry_after


class EngineStopped(PreftError):  # noqa: N818 (the same)
    """The engine takes no requests: it is not ready yet, it is being stopped, or it failed."""

    retry_after = 5.0


Item = tuple[int, Output] | Exception | None


class OutputStream:
    """The outputs of requests that were taken together, as ``(number of the request, output)``.

    Iterate until every sample has ended, and close it: whatever has not ended then is cancelled in the engine.
    """

    def __init__(self, owner: "AsyncEngine", requests: Sequence[Request]):
        self.requests = requests
        self._owner = owner
        self._items: asyncio.Queue[Item] = asyncio.Queue()
        self._open_samples = sum(request.n for request in requests)
        self._waiting = set(range(len(requests)))
        self._accepted = False
        self._early: list[Item] = []
        self._closed = False

    @property
    def tenant(self) -> str | None:
        """Whose the requests are."""
        return self.requests[0].tenant if self.requests else None

    @property
    def closed(self) -> bool:
        """Whether nobody listens any more."""
        return self._closed

    @property
    def ended(self) -> bool:
        """Whether nothing is left to come."""
        return self._open_samples == 0

    async def accepted(self) -> None:
        """Wait until the engine has taken the requests; raises its reason if it does not."""
        item = await self._items.get()
        if isinstance(item, Exception):
            self._open_samples = 0
            raise item

    def __aiter__(self) -> "OutputStream":
        return self

    async def __anext__(self) -> tuple[int, Output]:
        if self.ended:
            raise StopAsyncIteration
        item = await self._items.get()
        assert item is not None
        if isinstance(item, Exception):
            self._open_samples = 0
            raise item
        self._open_samples -= item[1].finish_reason is not None
        return item

    def close(self) -> None:
        """Cancel what has not ended."""
        if not self._closed:
            self._closed = True
            self._owner._close(self)

    def _put(self, item: Item) -> None:
        if isinstance(item, tuple):
            self._waiting.discard(item[0])
        elif item is not None:
            self._waiting.clear()
        if isinstance(item, tuple) and not self._accepted:
            self._early.append(item)  # The engine takes a large body in parts, and works meanwhile.
            return
        self._items.put_nowait(item)
        if item is None:
            self._accepted = True
            for early in self._early:
                self._items.put_nowait(early)


@dataclasses.dataclass
class _Running:
    """A request in the engine: whose it is, and how many of its samples have not ended."""

    stream: OutputStream
    number: int
    samples: int


class AsyncEngine:
    """Runs ``Engine.step`` in a thread of its own; everything here is for the event loop that called ``start``.

    Args:
        engine: nobody else may use it from ``start`` on.
        max_waiting: most requests that wait for their first token. When others fill the queue, a tenant may still
            have an eighth as many, up to twice as many in all.
        clock: seconds.
    """

    def __init__(self, engine: Any, *, max_waiting: int = 256, clock: Callable[[], float] = time.monotonic):
        self.engine = engine
        self.max_waiting = max_waiting
        self.ready = False
        self.failure: str | None = None
        self._clock = clock
        self._inbox: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._changed = asyncio.Event()
        self._streams: set[OutputStream] = set()
        self._waiting: collections.Counter[str | None] = collections.Counter()
        self._stopping = False
        self._busy_since = 0.0
        self._served = 0
        # Of the thread alone:
        self._running: dict[int, _Running] = {}
        self._later: list[Callable[[], None]] = []
        self._aborted = False
        self._halted = False

    @property
    def alive(self) -> bool:
        """Whether the engine has not failed."""
        return self.failure is None

    @property
    def accepts(self) -> bool:
        """Whether requests are taken."""
        return self.ready and not self._stopping

    @property
    def busy(self) -> bool:
        """Whether the thread has not ended."""
        return self._thread is not None and self._thread.is_alive()

    @property
    def num_waiting(self) -> int:
        """Requests that wait for their first token."""
        return self._waiting.total()

    @property
    def num_open(self) -> int:
        """Streams that are not closed."""
        return len(self._streams)

    @property
    def adapters(self) -> tuple[list[str], list[str]]:
        """Names of adapters of requests that have their first token, and of those that wait for it."""
        running, waiting = set[str](), set[str]()
        for stream in self._streams:
            for number, request in enumerate(stream.requests):
                if isinstance(request.adapter, Registered):
                    (waiting if number in stream._waiting else running).add(request.adapter.name)
        return sorted(running), sorted(waiting)

    # On the event loop

    async def start(self) -> None:
        """Start the thread; it compiles every program, and then ``ready`` is true."""
        self._loop = asyncio.get_running_loop()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    async def open(self, requests: Sequence[Request]) -> OutputStream:
        """Give the engine requests, all of them or none, and return their outputs.

        Raises:
            RequestError, AdapterError: if one of them can never be served.
            Overloaded: if too many wait.
            EngineStopped: if the engine takes no requests.
        """
        stream = OutputStream(self, requests)
        self.check_open(len(requests), stream.tenant)
        self._streams.add(stream)
        if not self.num_waiting:
            self._busy_since, self._served = self._clock(), 0
        self._waiting[stream.tenant] += len(requests)
        self._inbox.put(functools.partial(self._add, stream))
        try:
            await stream.accepted()
        except BaseException:
            stream.close()
            raise
        return stream

    async def generate(self, request: Request) -> AsyncIterator[Output]:
        """Yield a request's outputs until all its samples have ended; closing the iterator cancels it.

        Raises:
            PreftError: as ``open`` does, before the first output.
        """
        stream = await self.open([request])
        try:
            async for _, output in stream:
                yield output
        finally:
            stream.close()

    def wake(self) -> None:
        """Let the engine look whether its background work has something to do now; any thread may call it."""
        self._inbox.put(lambda: None)

    async def stop(self, drain_seconds: float) -> None:
        """Take no more requests, finish those there are for some seconds, give the others up, and end the thread."""
        self._stopping = True
        if not await self._drained(drain_seconds):
            self._inbox.put(self._abort_all)
            await self._drained(_ABORT_SECONDS)
        self._inbox.put(self._halt)
        if self._thread is not None:
            await asyncio.to_thread(self._thread.join, _ABORT_SECONDS if self.ready else _COMPILING_SECONDS)

    async def _drained(self, seconds: float) -> bool:
        """Wait until no stream is open; return whether that came in time."""
        try:
            async with asyncio.timeout(seconds):
                while self.num_open:
                    self._changed.clear()
                    await self._changed.wait()
        except TimeoutError:
            return False
        return True

    def _check_alive(self) -> None:
        if self.failure is not None:
            raise EngineStopped(f"the engine failed and takes no requests: {self.failure}; restart the server")

    def check_open(self, count: int, tenant: str | None) -> None:
        """Check that so many of a tenant's requests would be taken now.

        Raises:
            PreftError: as ``open`` does for what does not lie in the requests themselves.
        """
        self._check_alive()
        if self._stopping:
            raise EngineStopped("the server is shutting down and takes no requests; send them to another one")
        if not self.ready:
            raise EngineStopped("the engine is starting and takes no requests yet; try again in some seconds")
        if count > self.max_waiting:
            raise RequestError(
                f"there are {count} prompts, and at most {self.max_waiting} may wait; send fewer at a time"
            )
        waiting, share = self.num_waiting, max(1, self.max_waiting // 8)
        has_share = self._waiting[tenant] + count <= share and waiting + count <= 2 * self.max_waiting
        if waiting + count > self.max_waiting and not has_share:
            raise Overloaded(
                f"{waiting} requests wait for their first token and at most {self.max_waiting} may; try again later",
                self._retry_after(),
            )

    def _retry_after(self) -> float:
        """Return the seconds that half of those who wait should take, if it goes on as since the last empty queue."""
        each = (self._clock() - self._busy_since) / max(self._served, 1)
        seconds = self.num_waiting / 2 * each if self._served else _SHORTEST_RETRY
        return min(max(seconds, _SHORTEST_RETRY), _LONGEST_RETRY)

    def _close(self, stream: OutputStream) -> None:
        self._streams.discard(stream)
        self._count(stream, len(stream._waiting))
        self._changed.set()
        if not stream.ended:
            self._inbox.put(functools.partial(self._cancel, stream))

    def _count(self, stream: OutputStream, fewer: int) -> None:
        """Note that fewer of a stream's requests wait."""
        self._waiting[stream.tenant] -= fewer
        if not self._waiting[stream.tenant]:
            del self._waiting[stream.tenant]

    def _deliver(self, items: list[tuple[OutputStream, Item]]) -> None:
        for stream, item in items:
            if stream in self._streams:
                before = len(stream._waiting)
                stream._put(item)
                self._count(stream, before - len(stream._waiting))
                self._served += before - len(stream._waiting)

    def _become_ready(self) -> None:
        self.ready = True
        self._changed.set()

    def _fail(self, failure: str) -> None:
        self.failure, self.ready = failure, False
        self._changed.set()
        error = EngineStopped(f"the engine failed: {failure}")
        self._deliver([(stream, error) for stream in self._streams])

    # In the thread

    def _run(self) -> None:
        try:
            _log.info("compiling; requests are refused until it is done, see /ready")
            began = time.monotonic()
            self.engine.warm_up()
            self._tell(self._become_ready)
            _log.info("ready", extra={"facts": {"seconds": round(time.monotonic() - began, 1)}})
            while not self._halted:
                pause = self.engine.pause
                self._take(pause)
                if (pause is not None or self.engine.has_work) and not self._halted:
                    self._send(self.engine.step())
        except BaseException as error:  # Whatever it is, the thread ends here, and that is said.
            _log.exception("the engine failed")
            self._tell(self._fail, f"{type(error).__name__}: {error}")

    def _take(self, pause: float | None) -> None:
        """Do what lies in the inbox, after waiting for something so long; None: as long as it takes."""
        try:
            while True:
                self._inbox.get(block=pause != 0, timeout=pause)()
                pause = 0
        except queue.Empty:
            later, self._later = self._later, []
            for function in later:
                self._inbox.put(function)

    def _tell(self, function: Callable[..., None], *args: Any) -> None:
        assert self._loop is not None
        try:
            self._loop.call_soon_threadsafe(function, *args)
        except RuntimeError:  # The loop is closed: nobody listens any more.
            self._halted = True

    def _add(self, stream: OutputStream, ids: tuple[int, ...] = ()) -> None:
        """Give the engine a stream's requests from the first one that it has not; a large body's in parts."""
        samples = 0
        try:
            while len(ids) < len(stream.requests) and samples < _ADDED_AT_ONCE:
                if self._aborted:
                    raise EngineStopped("the server is shutting down and takes no requests; send them to another one")
                request = stream.requests[len(ids)]
                request_id = self.engine.add(request)
                self._running[request_id] = _Running(stream, len(ids), request.n)
                ids, samples = (*ids, request_id), samples + request.n
        except Exception as error:
            self._cancel(stream)
            self._tell(self._deliver, [(stream, error)])
            return
        if len(ids) == len(stream.requests):
            self._tell(self._deliver, [(stream, None)])
        elif not stream.closed:
            self._later.append(functools.partial(self._add, stream, ids))

    def _cancel(self, stream: OutputStream) -> None:
        for request_id in [found for found, running in self._running.items() if running.stream is stream]:
            del self._running[request_id]
            self.engine.cancel(request_id)

    def _abort_all(self) -> None:
        self._aborted = True
        for request_id in self._running:
            self.engine.cancel(request_id, "the server is shutting down")

    def _halt(self) -> None:
        self._halted = True

    def _send(self, outputs: Sequence[Output]) -> None:
        items: list[tuple[OutputStream, Item]] = []
        for output in outputs:
            running = self._running.get(output.request_id)
            if running is None:
                continue  # Cancelled, and nobody is there to be told.
            items.append((running.stream, (running.number, output)))
            if output.finish_reason is not None:
                running.samples -= 1
                if not running.samples:
                    del self._running[output.request_id]
        if items:
            self._tell(self._deliver, items)
