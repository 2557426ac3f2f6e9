"""Connections that may not dawdle: a request must arrive whole, and an answer be read, within some seconds.

Where there are many of them, those that dawdle go first (``connections.py``).
"""

import asyncio
import dataclasses
from typing import Any, ClassVar

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from serve.server.connections import Connections
from serve.server.middleware import STREAMED


@dataclasses.dataclass(frozen=True)
class Limits:
    """How long clients may take, and the book of their connections; see ``timed_protocol``."""

    request_seconds: float
    read_seconds: float
    connections: Connections[H11Protocol]
    upload_seconds: float | None = None


def timed_protocol(
    request_seconds: float,
    read_seconds: float,
    connections: Connections[H11Protocol],
    *,
    upload_seconds: float | None = None,
) -> type[H11Protocol]:
    """Return uvicorn's HTTP/1.1 protocol with limits, at which it drops the connection, and a book of connections.

    Args:
        request_seconds: from a connection's or a request's first byte until the request is there, body included.
        read_seconds: that a client may leave an answer unread while the buffers are full.
        connections: says which one is dropped when there are too many.
        upload_seconds: that a body may take from its headers on where the route receives it as it comes
            (``middleware.STREAMED``); None: as others.
    """

    class Limited(TimedProtocol):
        """The protocol of one server."""

        limits = Limits(request_seconds, read_seconds, connections, upload_seconds)

    return Limited


class TimedProtocol(H11Protocol):
    """uvicorn's protocol with two more timers."""

    limits: ClassVar[Limits]

    def __init__(self, *args: Any, **options: Any):
        super().__init__(*args, **options)
        self._arriving: asyncio.TimerHandle | None = None
        self._unread: asyncio.TimerHandle | None = None
        # Of the upload whose time has begun.
        self._upload: object = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Note a new connection; another one may have to go for it."""
        super().connection_made(transport)
        self._arriving = self.loop.call_later(self.limits.request_seconds, self._drop)
        dropped = self.limits.connections.open(self, self.client[0] if self.client else None)
        if dropped is not None:
            dropped.transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget a connection."""
        _cancel(self._arriving)
        _cancel(self._unread)
        self.limits.connections.close(self)
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Take bytes, and begin or end the time of a request."""
        super().data_received(data)
        self._note()
        if not self._is_arriving:
            _cancel(self._arriving)
            self._arriving = None
        elif self.limits.upload_seconds is not None and self.scope is not self._upload and self._is_upload:
            self._upload = self.scope
            _cancel(self._arriving)
            self._arriving = self.loop.call_later(self.limits.upload_seconds, self._drop)
        elif self._arriving is None:
            self._arriving = self.loop.call_later(self.limits.request_seconds, self._drop)

    def on_response_complete(self) -> None:
        """Note that a request was answered."""
        super().on_response_complete()
        self._note()

    def pause_writing(self) -> None:
        """Begin the time of a client who does not read."""
        super().pause_writing()
        self._unread = self.loop.call_later(self.limits.read_seconds, self._drop)

    def resume_writing(self) -> None:
        """End it."""
        _cancel(self._unread)
        super().resume_writing()

    @property
    def _is_arriving(self) -> bool:
        return self.conn.their_state in (h11.IDLE, h11.SEND_BODY)

    @property
    def _is_upload(self) -> bool:
        """Whether a body comes that its route receives itself."""
        if self.conn.their_state is not h11.SEND_BODY:
            return False
        return self.scope["method"] == "POST" and self.scope["path"] in STREAMED

    def _note(self) -> None:
        if self._is_arriving:
            self.limits.connections.idle(self)
        else:
            self.limits.connections.busy(self)

    def _drop(self) -> None:
        if not self.transport.is_closing():
            self.logger.warning("dropped a connection that took too long")
        self.transport.abort()


def _cancel(timer: asyncio.TimerHandle | None) -> None:
    if timer is not None:
        timer.cancel()
