"""What every request passes first: its id, its key and its body are checked, and one line of the log tells its end."""

import asyncio
import contextlib
import logging
import re
import time
import uuid
from collections.abc import Callable
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve.server.auth import Keys
from serve.server.exposition import ServerMetrics
from serve.server.failures import ApiError

OPEN_PATHS = frozenset({"/", "/health", "/ready", "/version"})
"""Paths that need no key."""

STREAMED = frozenset({"/v1/files"})
"""Paths whose routes receive the bodies of their POSTs themselves, as they come."""

_PROBES = frozenset({"/health", "/ready", "/metrics", "/stats"})
"""Routes that machines ask again and again; the log has them at debug level."""

_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")
_BODIES = ("POST", "PUT", "PATCH")

_log = logging.getLogger("preft.server")


class Front:
    """ASGI middleware, the outermost.

    Args:
        app: what comes behind it.
        keys: who is let in.
        metrics: count answers.
        max_body_bytes: most bytes of a body.
        body_seconds: how long one may take to arrive.
        clock: seconds.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        keys: Keys,
        metrics: ServerMetrics,
        max_body_bytes: int,
        body_seconds: float,
        clock: Callable[[], float] = time.monotonic,
    ):
        self._app = app
        self._keys = keys
        self._metrics = metrics
        self._max_body_bytes = max_body_bytes
        self._body_seconds = body_seconds
        self._clock = clock

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        state = scope.setdefault("state", {})
        given = headers.get("x-request-id", "")
        request_id = state["request_id"] = given if _ID.fullmatch(given) else uuid.uuid4().hex
        facts: dict[str, Any] = {"id": request_id, "method": scope["method"], "route": "none", "status": 0}
        state["facts"] = facts
        started = self._clock()

        async def answer(message: Message) -> None:
            if message["type"] == "http.response.start":
                facts["status"] = message["status"]
                own = MutableHeaders(scope=message)
                own["X-Request-Id"] = request_id
                own["X-Content-Type-Options"] = "nosniff"
            await send(message)

        try:
            await self._serve(scope, headers, receive, answer)
        finally:
            route = scope.get("route")
            facts["route"] = getattr(route, "path", "none")
            facts["seconds"] = round(self._clock() - started, 6)
            self._metrics.answered(facts["route"], facts["status"])
            level = logging.DEBUG if facts["route"] in _PROBES and facts["status"] < 500 else logging.INFO
            _log.log(level, "request", extra={"facts": facts})

    async def _serve(self, scope: Scope, headers: Headers, receive: Receive, answer: Send) -> None:
        try:
            scope["state"]["identity"] = None
            _check_framing(scope, headers)
            if scope["path"] not in OPEN_PATHS:
                authorization = headers.get("authorization")
                identity = self._keys.identify(None if authorization is None else authorization.encode("latin-1"))
                scope["state"]["identity"] = identity
                scope["state"]["facts"]["user"] = identity.user
            if scope["method"] == "POST" and scope["path"] in STREAMED:
                _check_encoding(headers)
            elif scope["method"] in _BODIES:
                receive = await self._with_body(headers, receive)
            await self._app(scope, receive, answer)
        except ApiError as error:
            if not scope["state"]["facts"]["status"]:
                if scope["path"] in STREAMED:
                    error.headers |= _CLOSE  # What comes of the body is not waited for.
                await error.response()(scope, receive, answer)
        except Exception:
            _log.exception("failure", extra={"facts": {"id": scope["state"]["request_id"]}})
            if not scope["state"]["facts"]["status"]:
                await ApiError(500, "the server failed; its log says why", code="internal_error").response()(
                    scope, receive, answer
                )
            else:
                raise

    async def _with_body(self, headers: Headers, receive: Receive) -> Receive:
        """Read the whole body; return what gives it to the app."""
        _check_encoding(headers)
        declared = headers.get("content-length", "0")
        try:
            async with asyncio.timeout(self._body_seconds):
                body = await self._read(receive, int(declared) if declared.isdecimal() else 0, headers)
        except TimeoutError:
            raise ApiError(
                408, f"the body did not arrive within {self._body_seconds:g} s", code="timeout", headers=_CLOSE
            ) from None
        if body and headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
            raise ApiError(
                415, "the body's Content-Type is not application/json; send JSON and say so", code="not_json"
            )
        return _replay(body, receive)

    async def _read(self, receive: Receive, declared: int, headers: Headers) -> bytes:
        parts: list[bytes] = []
        size, most, more = 0, self._max_body_bytes, True
        waits = headers.get("expect", "").lower() == "100-continue"
        if declared > most and waits:
            raise self._too_large()
        while more and size <= 8 * most:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise ApiError(499, "the client went away", code="disconnected")
            size += len(message.get("body", b""))
            more = message.get("more_body", False)
            if size <= most:
                parts.append(message.get("body", b""))
            else:  # Read on, and forget it: a client that is cut off while it sends does not see why.
                parts.clear()
        if size > most:
            raise self._too_large()
        return b"".join(parts)

    def _too_large(self) -> ApiError:
        return ApiError(
            413,
            f"the body has more than {self._max_body_bytes} bytes; send less",
            code="body_too_large",
            headers=_CLOSE,
        )


_CLOSE = {"Connection": "close"}


def _check_framing(scope: Scope, headers: Headers) -> None:
    """Refuse a request of which two readers could see different ends; the connection is closed, so nothing follows."""
    if "transfer-encoding" in headers and ("content-length" in headers or scope["http_version"] == "1.0"):
        what = "Content-Length" if "content-length" in headers else "HTTP/1.0"
        raise ApiError(
            400,
            f"the request has a Transfer-Encoding beside {what}, so that its end is not certain; send one of them",
            code="bad_framing",
            headers=_CLOSE,
        )


def _check_encoding(headers: Headers) -> None:
    """Refuse a body that would have to be decoded."""
    encodings = [name.strip().lower() for name in ",".join(headers.getlist("content-encoding")).split(",")]
    if unknown := [name for name in encodings if name not in ("", "identity")]:
        raise ApiError(
            415,
            f"the body's Content-Encoding is {ascii(unknown[0])[:80]}; send the body as it is, without one",
            code="encoding_not_supported",
            headers={"Accept-Encoding": "identity", **_CLOSE},
        )


def _replay(body: bytes, receive: Receive) -> Receive:
    given = False

    async def again() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return again


async def unless_gone[T](receive: Receive, work: "asyncio.Task[T]") -> T:
    """Return what ``work`` gives; it is cancelled if the client goes away before.

    Raises:
        ApiError: 499, which nobody sees but the log, if the client went away.
    """

    async def gone() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    watch = asyncio.create_task(gone())
    try:
        await asyncio.wait((work, watch), return_when=asyncio.FIRST_COMPLETED)
        if work.done():
            return work.result()
        raise ApiError(499, "the client went away", code="disconnected")
    finally:
        for task in (work, watch):
            task.cancel()
            with contextlib.suppress(BaseException):
                await task
