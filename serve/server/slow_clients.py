"""Connections that may not dawdle: a request must arrive whole, and an answer be read, within some seconds.

Where there are many of them, those that dawdle go first (``connections.py``).
"""

import asyncio
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from serve.server.connections import Connections
from serve.server.middleware import STREAMED


def timed_protocol(
    request_seconds: float,
    read_seconds: float,
    connections: Connections[H11Protocol],
    *,
    upload_seconds: float | None = None,
) -> type[H11Protocol]:
    """Return uvicorn's HTTP/1.1 protocol with two limits, at which it drops the connection, and a book of connections.

    Args:
        request_seconds: from a connection's or a request's first byte until the request is there, body included.
        read_seconds: that a client may leave an answer unread while the buffers are full.
        connections: says which one is dropped when there are too many.
        upload_seconds: that a body may take from its headers on where the route receives it as it comes
            (``middleware.STREAMED``); None: as others.
    """

    class TimedProtocol(H11Protocol):
        """uvicorn's protocol with two more timers."""

        def __init__(self, *args: Any, **options: Any):
            super().__init__(*args, **options)
            self._arriving: asyncio.TimerHandle | None = None
            self._unread: asyncio.TimerHandle | None = None
            self._uploading: object = None

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(transport)
            self._arriving = self.loop.call_later(request_seconds, self._drop)
            dropped = connections.open(self, self.client[0] if self.client else None)
            if dropped is not None:
                dropped.transport.abort()

        def connection_lost(self, exc: Exception | None) -> None:
            _cancel(self._arriving)
            _cancel(self._unread)
            connections.close(self)
            super().connection_lost(exc)

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            self._note()
            if self._is_arriving:
                if self._arriving is None:
                    self._arriving = self.loop.call_later(request_seconds, self._drop)
                if upload_seconds is not None and self.scope is not self._uploading and _is_upload(self):
                    self._uploading = self.scope
                    _cancel(self._arriving)
                    self._arriving = self.loop.call_later(upload_seconds, self._drop)
            else:
                _cancel(self._arriving)
                self._arriving = None

        def on_response_complete(self) -> None:
            super().on_response_complete()
            self._note()

        @property
        def _is_arriving(self) -> bool:
            return self.conn.their_state in (h11.IDLE, h11.SEND_BODY)

        def _note(self) -> None:
            if self._is_arriving:
                connections.idle(self)
            else:
                connections.busy(self)

        def pause_writing(self) -> None:
            super().pause_writing()
            self._unread = self.loop.call_later(read_seconds, self._drop)

        def resume_writing(self) -> None:
            _cancel(self._unread)
            super().resume_writing()

        def _drop(self) -> None:
            if not self.transport.is_closing():
                self.logger.warning("dropped a connection that took too long")
            self.transport.abort()

    return TimedProtocol


def _is_upload(protocol: H11Protocol) -> bool:
    """Whether a body comes that its route receives itself."""
    if protocol.conn.their_state is not h11.SEND_BODY:
        return False
    return protocol.scope["method"] == "POST" and protocol.scope["path"] in STREAMED


def _cancel(timer: asyncio.TimerHandle | None) -> None:
    if timer is not None:
        timer.cancel()
