"""Loading a server that speaks OpenAI's API, over HTTP with streamed answers."""

import asyncio
import dataclasses
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from typing import Any, NamedTuple

import httpx

from preft_jax.errors import ConfigError, PreftError
from serve.bench.load import LoadRequest
from serve.bench.metrics import LoadResult, RequestRecord

ENDPOINTS = ("/v1/completions", "/v1/chat/completions")

_TIMEOUT = httpx.Timeout(3600.0, connect=30.0)
"""Answers may wait long in a server's queue; a connection must come at once."""

_STATUS = {"abort": "aborted", "error": "failed"}
"""What became of a request whose stream ended so; any other reason completes it."""

_FAILURES = (httpx.HTTPError, httpx.StreamError, httpx.InvalidURL, OSError)


class ServerError(PreftError):
    """A server that cannot be benchmarked."""


class ServedModel(NamedTuple):
    """A model that a server offers; ``parent`` is the base model's id if it is an adapter.

    ``positions`` are those that the adapter edits (``"all"``: generated ones too), where the server tells: ours does.
    """

    id: str
    parent: str | None
    positions: str | None = None


def list_models(
    base_url: str, api_key: str | None = None, *, transport: httpx.BaseTransport | None = None
) -> list[ServedModel]:
    """Return what ``GET /v1/models`` lists.

    Raises:
        ServerError: if the server cannot be reached or does not answer with a list of models.
    """
    url = f"{base_url}/v1/models"
    try:
        with httpx.Client(timeout=30.0, trust_env=False, headers=_headers(api_key), transport=transport) as client:
            response = client.get(url)
        if response.status_code != 200:
            raise ServerError(f"{url} answered {response.status_code}: {_message(response.content)}; check --base-url")
        return [ServedModel(card["id"], card.get("parent"), card.get("positions")) for card in response.json()["data"]]
    except _FAILURES as error:
        raise ServerError(f"cannot reach {url}: {_name(error)}; check --base-url and that the server runs") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ServerError(f"{url} did not answer with a list of models; check --base-url") from error


def _headers(api_key: str | None) -> dict[str, str]:
    return {} if api_key is None else {"Authorization": f"Bearer {api_key}"}


def _name(error: Exception) -> str:
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__


def _message(body: bytes) -> str:
    """Return what an error answer says, from OpenAI's form of it or as it stands, cut to one short line."""
    text = body.decode(errors="replace")
    try:
        found = json.loads(text)
        found = found.get("error", found)
        text = found["message"] if isinstance(found, dict) else str(found)
    except (ValueError, KeyError, AttributeError):
        pass
    return " ".join(str(text).split())[:200]


class _ChunkError(Exception):
    """A chunk of a stream that is not what the API promises, or says that the request failed."""


class _Chunk(NamedTuple):
    """What one chunk of a stream says."""

    has_output: bool
    finish_reason: str | None
    usage: Mapping[str, Any] | None


def _read_chunk(data: str) -> _Chunk:
    """Read a chunk of either endpoint.

    A chat's first chunk names the role and a last one the finish reason: neither is output if its text is empty. Other
    empty texts are: a token whose bytes are not yet a character.
    """
    try:
        chunk = json.loads(data)
        if chunk.get("error"):
            raise _ChunkError(f"the server reported an error: {_message(data.encode())}")
        choices, usage = chunk.get("choices") or [], chunk.get("usage")
        if not choices:
            return _Chunk(False, None, usage)
        reason, delta = choices[0].get("finish_reason"), choices[0].get("delta")
        if delta is None:
            return _Chunk(bool(choices[0]["text"]) or reason is None, reason, usage)
        content = delta.get("content") or delta.get("reasoning_content") or delta.get("reasoning")
        silent = reason is not None or "role" in delta or not delta
        return _Chunk(bool(content) or not silent, reason, usage)
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise _ChunkError(f"the stream holds a malformed chunk: {data[:80]!r}") from error


async def _events(response: httpx.Response) -> AsyncIterator[str]:
    """Yield the data of each server-sent event; lines end at newlines only, as JSON may hold other line separators."""
    rest = b""
    async for part in response.aiter_bytes():
        *lines, rest = (rest + part).split(b"\n")
        for line in lines:
            if line.startswith(b"data:"):
                yield line[5:].decode(errors="replace").strip(" \r")
    if rest.startswith(b"data:"):
        yield rest[5:].decode(errors="replace").strip(" \r")


@dataclasses.dataclass
class _Answer:
    """A streamed answer while it comes in; times in seconds after it was asked for."""

    times: list[float] = dataclasses.field(default_factory=list)
    finish_reason: str | None = None
    prompt_tokens: int | None = None
    completion_tokens: int | None = None

    async def read(self, response: httpx.Response, elapsed: Callable[[], float]) -> None:
        """Take a whole stream.

        Raises:
            _ChunkError: if it is malformed or ends before the answer does.
        """
        ended, done = 0.0, False
        async for data in _events(response):
            if data == "[DONE]":
                done = True
                break
            chunk = _read_chunk(data)
            if chunk.has_output:
                self.times.append(elapsed())
            if chunk.finish_reason is not None:
                self.finish_reason, ended = chunk.finish_reason, elapsed()
            self._count(chunk.usage)
        if self.finish_reason is None and not (done and self.times):
            raise _ChunkError("the stream ended before the answer did")
        if not self.times:
            self.times.append(ended)

    def _count(self, usage: Mapping[str, Any] | None) -> None:
        if usage is None:
            return
        counts = [
            usage.get(name) if isinstance(usage, Mapping) else None for name in ("prompt_tokens", "completion_tokens")
        ]
        if not all(isinstance(count, int) for count in counts):
            raise _ChunkError(f"the stream holds a malformed usage: {str(usage)[:80]!r}")
        self.prompt_tokens, self.completion_tokens = counts


class HttpTarget:
    """Loads a server. A request counts from when it is sent: at its arrival, or once ``max_concurrency`` allows it.

    Token counts are those of the server's ``usage``; without it every chunk counts as a token, and the record says so.
    """

    def __init__(
        self,
        base_url: str,
        model_names: Callable[[int | None], str],
        *,
        endpoint: str = ENDPOINTS[0],
        api_key: str | None = None,
        decode: Callable[[list[int]], str] | None = None,
        ignore_eos: bool = True,
        max_concurrency: int | None = None,
        clock: Callable[[], float] = time.perf_counter,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ):
        """Make a target.

        Args:
            base_url: such as ``http://127.0.0.1:8000``.
            model_names: from a request's adapter number (None: the base model) to the model's name on the server.
            endpoint: one of ``ENDPOINTS``.
            api_key: sent as a bearer token.
            decode: from token ids to text; a chat needs it, completions send token ids.
            ignore_eos: ask for exactly ``max_tokens`` tokens (a parameter of vLLM's and ours, not OpenAI's).
            max_concurrency: most requests at one time.
            clock: in seconds.
            sleep: waits some seconds.
        """
        if endpoint not in ENDPOINTS:
            raise ConfigError(f"--endpoint is {endpoint!r}; allowed: {', '.join(ENDPOINTS)}")
        if endpoint == ENDPOINTS[1] and decode is None:
            raise ConfigError("a chat's prompts are text, and there is no tokenizer to decode tokens with")
        self._url = base_url.rstrip("/") + endpoint
        self._model_names = model_names
        self._decode = decode if endpoint == ENDPOINTS[1] else None
        self._headers = _headers(api_key)
        self._ignore_eos = ignore_eos
        self._max_concurrency = max_concurrency
        self._clock = clock
        self._sleep = sleep

    def run(self, requests: Sequence[LoadRequest], on_done: Callable[[], None] = lambda: None) -> LoadResult:
        """See ``Target``."""
        return asyncio.run(self._run(requests, on_done))

    def counters(self) -> dict[str, float]:
        """Return nothing: a server is known by its answers only."""
        return {}

    async def _run(self, requests: Sequence[LoadRequest], on_done: Callable[[], None]) -> LoadResult:
        slots = asyncio.Semaphore(self._max_concurrency or max(len(requests), 1))
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
        # Proxies that the environment names would be measured too.
        async with httpx.AsyncClient(timeout=_TIMEOUT, limits=limits, trust_env=False, headers=self._headers) as client:
            start = self._clock()

            async def one(request: LoadRequest) -> RequestRecord:
                await self._sleep(max(0.0, request.arrival - (self._clock() - start)))
                async with slots:
                    record = await self._send(client, request, start)
                on_done()
                return record

            records = await asyncio.gather(*(one(request) for request in requests))
            return LoadResult(records, self._clock() - start)

    async def _send(self, client: httpx.AsyncClient, request: LoadRequest, start: float) -> RequestRecord:
        sent = self._clock()
        answer = _Answer()
        status, error = "failed", None
        try:
            async with client.stream("POST", self._url, json=self._body(request)) as response:
                code = response.status_code
                if code == 200:
                    await answer.read(response, lambda: self._clock() - sent)
                    status = _STATUS.get(answer.finish_reason or "", "completed")
                    if status == "failed":
                        error = "the server ended the answer with finish_reason 'error'"
                else:
                    status = "rejected" if 400 <= code < 500 or code == 503 else "failed"
                    error = f"HTTP {code}: {_message(await response.aread())}"
        except (*_FAILURES, _ChunkError) as failure:
            status, error = "failed", str(failure) if isinstance(failure, _ChunkError) else _name(failure)
        return RequestRecord(
            prompt_len=len(request.prompt) if answer.prompt_tokens is None else answer.prompt_tokens,
            output_len=len(answer.times) if answer.completion_tokens is None else answer.completion_tokens,
            sent=sent - start,
            times=tuple(answer.times),
            adapter=request.user,
            status=status,
            error=error,
            estimated=status == "completed" and answer.completion_tokens is None,
        )

    def _body(self, request: LoadRequest) -> dict[str, Any]:
        body: dict[str, Any] = {
            "model": self._model_names(request.user),
            "max_tokens": request.max_tokens,
            "temperature": 0.0,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        if self._ignore_eos:
            body["ignore_eos"] = True
        if self._decode is None:
            return body | {"prompt": request.prompt}
        return body | {"messages": [{"role": "user", "content": self._decode(request.prompt)}]}
