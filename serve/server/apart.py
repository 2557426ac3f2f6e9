"""Two servers share a request: that of the role ``decode`` takes it, and asks that of the role ``prefill``.

    client -> decode server: POST /v1/completions
              decode server -> prefill server: the same, with Accept: application/x-preft-handover
              decode server <- prefill server: handovers, one behind the other
    client <- decode server: tokens

The client's own body and key go to the prefill server, which knows the adapters: it says who may use which, and makes
prompts and edit masks. What it answers when it refuses is what the client is told.
"""

import contextlib
import json
import urllib.parse
from collections.abc import AsyncIterator, Mapping, Sequence

import httpx
from fastapi import Request
from starlette.responses import Response, StreamingResponse

from serve.engine.handover import Handover
from serve.server.failures import ApiError, no_model, retry_after

HANDOVER = "application/x-preft-handover"
"""The type of an answer that holds handovers."""

_PIECE = 2**20
"""Bytes that are sent at once."""

_CONNECT_SECONDS = 5.0

_MOST_ELSE = 2**20
"""Bytes of an answer beside KV, for each prompt: its header, of which samples take up to 0.1 MiB, and its mask."""

_MOST_LISTED = 2**26
"""Bytes of a list of models."""


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
        seconds: how long it may say nothing, while a prompt waits there or is prefilled.
    """

    def __init__(self, url: str, seconds: float = 60.0):
        self.url = url.rstrip("/")
        self._client = httpx.AsyncClient(
            timeout=httpx.Timeout(seconds, connect=_CONNECT_SECONDS),
            limits=httpx.Limits(max_connections=None),
            trust_env=False,
        )

    async def handovers(self, request: Request, num_prompts: int, most_kv: int) -> list[Handover]:
        """Return what it makes of a client's request, one for each prompt.

        Args:
            request: the client's.
            num_prompts: that it holds.
            most_kv: bytes of a prompt's KV.

        Raises:
            ApiError: it refuses the request, cannot be reached, or answers something else.
        """
        most = num_prompts * (most_kv + _MOST_ELSE)
        found = Handover.all_from(await self._ask(request, request.scope["route"].path, HANDOVER, most))
        if len(found) != num_prompts:
            raise _failed(f"the prefill server answered {num_prompts} prompts with {len(found)} handovers")
        return found

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
        content = await self._ask(request, path, "application/json", _MOST_LISTED)
        return Response(content, media_type="application/json")

    async def close(self) -> None:
        """Give its connections up."""
        await self._client.aclose()

    async def _ask(self, request: Request, path: str, accept: str, most: int) -> bytes:
        """Return the body of its answer, which has up to ``most`` bytes."""
        headers = {name: value for name, value in request.headers.items() if name in ("authorization", "content-type")}
        headers |= {"Accept": accept, "Accept-Encoding": "identity"}
        asked = self._client.build_request(
            request.method, self.url + path, content=await request.body(), headers=headers
        )
        try:
            answer = await self._client.send(asked, stream=True)
            async with contextlib.aclosing(answer):
                content = await _read(answer, most if answer.status_code == 200 else _MOST_ELSE)
        except httpx.HTTPError as error:
            raise ApiError(
                503,
                f"the prefill server does not answer ({type(error).__name__}); try again later",
                code="prefill_unreachable",
                headers=retry_after(2),
            ) from error
        if answer.status_code != 200:
            raise _refusal(answer, content)
        return content


async def _read(answer: httpx.Response, most: int) -> bytes:
    parts, size = [], 0
    async for part in answer.aiter_raw():
        size += len(part)
        if size > most:
            raise _failed(
                f"the prefill server's answer has more than {most} bytes; give both roles one --max-model-len"
            )
        parts.append(part)
    return b"".join(parts)


def _failed(message: str, headers: Mapping[str, str] | None = None) -> ApiError:
    return ApiError(503, message, code="prefill_failed", headers=headers)


def _refusal(answer: httpx.Response, content: bytes) -> ApiError:
    """Return what a client is told where the prefill server said no; that it failed is for another time."""
    again = {name: value for name in ("retry-after", "x-should-retry") if (value := answer.headers.get(name))}
    try:
        error = json.loads(content)["error"]
        told = message, code, param = error["message"], error["code"], error["param"]
    except (ValueError, LookupError, TypeError, RecursionError):
        told = message, code, param = None, None, None
    if answer.status_code < 400 or type(message) is not str or not all(isinstance(one, str | None) for one in told):
        return _failed(f"the prefill server answered with status {answer.status_code}", again)
    return ApiError(
        answer.status_code if answer.status_code < 500 else 503, message, code=code, param=param, headers=again
    )
