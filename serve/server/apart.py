"""Two servers share a request: that of the role ``decode`` takes it, and asks that of the role ``prefill``.

    client -> decode server: POST /v1/completions
              decode server -> prefill server: the same, with Accept: application/x-preft-handover
              decode server <- prefill server: handovers, one behind the other
    client <- decode server: tokens

The client's own body and key go to the prefill server, which knows the adapters: it says who may use which, and makes
prompts and edit masks. What it answers when it refuses is what the client is told.
"""

import json
import urllib.parse
from collections.abc import AsyncIterator, Sequence

import httpx
from fastapi import Request
from starlette.responses import Response, StreamingResponse

from preft_jax.errors import RequestError
from serve.engine.handover import Handover
from serve.server.failures import ApiError, no_model, retry_after

HANDOVER = "application/x-preft-handover"
"""The type of an answer that holds handovers."""

_PIECE = 2**20
"""Bytes that are sent at once."""

_CONNECT_SECONDS = 5.0


def check_asks_for_handover(request: Request) -> None:
    """Raise ``ApiError``, 400, for a request to a prefill server that asks for something else."""
    if HANDOVER not in request.headers.get("accept", ""):
        raise ApiError(
            400,
            "this server prefills only, for servers that decode; send the request to one of --role decode",
            code="prefill_only",
        )


def handover_response(handovers: Sequence[Handover]) -> Response:
    """Return an answer that holds handovers."""
    parts = [memoryview(part) for handover in handovers for part in handover.to_bytes()]

    async def pieces() -> AsyncIterator[memoryview]:
        for part in parts:
            for at in range(0, len(part), _PIECE):
                yield part[at : at + _PIECE]

    length = {"Content-Length": str(sum(map(len, parts)))}
    return StreamingResponse(pieces(), headers=length, media_type=HANDOVER)


class PrefillServer:
    """The server that prefills for this one.

    Args:
        url: its address, such as ``http://10.0.0.7:8000``.
    """

    def __init__(self, url: str):
        self.url = url.rstrip("/")
        self._client = httpx.AsyncClient(
            timeout=httpx.Timeout(None, connect=_CONNECT_SECONDS),  # A prompt may wait there for long.
            limits=httpx.Limits(max_connections=None),
            trust_env=False,
        )

    async def handovers(self, request: Request) -> list[Handover]:
        """Return what it makes of a client's request, one for each prompt.

        Raises:
            ApiError: it refuses the request, or cannot be reached.
        """
        answer = await self._ask(request, request.scope["route"].path, HANDOVER)
        try:
            return Handover.all_from(answer.content)
        except RequestError as error:
            raise ApiError(
                503, f"the prefill server's answer cannot be read: {error}", code="prefill_failed"
            ) from error

    async def models(self, request: Request, name: str | None = None) -> Response:
        """Return its answer to a client that asks for the list of models, or for one of them.

        Raises:
            ApiError: as ``handovers``; 404 for a name that would lead to another of its routes.
        """
        path = "/v1/models"
        if name is not None:
            if not name.isprintable() or {".", ".."} & set(name.split("/")):
                raise no_model(name)
            path += f"/{urllib.parse.quote(name, safe='')}"
        answer = await self._ask(request, path, "application/json")
        return Response(answer.content, media_type="application/json")

    async def close(self) -> None:
        """Give its connections up."""
        await self._client.aclose()

    async def _ask(self, request: Request, path: str, accept: str) -> httpx.Response:
        headers = {name: value for name, value in request.headers.items() if name in ("authorization", "content-type")}
        try:
            answer = await self._client.request(
                request.method,
                self.url + path,
                content=await request.body(),
                headers={**headers, "Accept": accept},
            )
        except httpx.HTTPError as error:
            raise ApiError(
                503,
                f"the prefill server does not answer ({type(error).__name__}); try again later",
                code="prefill_unreachable",
                headers=retry_after(2),
            ) from error
        if answer.status_code != 200:
            raise _refusal(answer)
        return answer


def _refusal(answer: httpx.Response) -> ApiError:
    """Return what a client is told where the prefill server said no."""
    again = {name: value for name in ("retry-after", "x-should-retry") if (value := answer.headers.get(name))}
    try:
        error = json.loads(answer.content)["error"]
        return ApiError(answer.status_code, error["message"], code=error["code"], param=error["param"], headers=again)
    except (ValueError, KeyError, TypeError):
        message = f"the prefill server answered with status {answer.status_code}"
        return ApiError(503, message, code="prefill_failed", headers=again)
