"""``/v1/completions`` and ``/v1/chat/completions``: from a body to requests, and from outputs to an answer."""

import asyncio
import json
import logging
import secrets
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from typing import Annotated, Any

from fastapi import Depends, FastAPI
from fastapi import Request as HttpRequest
from starlette.responses import Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from preft_jax.errors import PreftError
from preft_jax.text.chat import EncodedPrompt
from serve.engine.async_engine import OutputStream
from serve.engine.completion import Completion
from serve.engine.handover import Handover
from serve.engine.request import Output, Request
from serve.server.answers import ChatShape, CompletionShape, Sample, Shape, TokenTexts, usage
from serve.server.apart import check_asks_for_handover, handover_response
from serve.server.auth import Identity
from serve.server.bodies import Bodies
from serve.server.failures import ApiError, retry_after, to_api_error
from serve.server.middleware import unless_gone
from serve.server.protocol import ChatBody, CompletionBody, as_dicts
from serve.server.serving import Serving
from serve.store.names import Registered

_log = logging.getLogger("preft.server")

_FAILED = "the request failed in the server, whose log says why; it can be sent again"

_LONG_TEXT = 20_000
"""Characters from which on a text is tokenised in another thread."""

_STREAMED = {200: {"content": {"application/json": {}, "text/event-stream": {}}}}


def add_generation(app: FastAPI, serving: Serving, bodies: Bodies, errors: dict[int | str, Any]) -> None:
    """Add both routes to an app."""
    texts = TokenTexts(serving.model.tokenizer)

    @app.post("/v1/completions", responses={**_STREAMED, **errors}, response_class=Response)
    async def completions(
        request: HttpRequest, body: Annotated[CompletionBody, Depends(bodies.of(CompletionBody))]
    ) -> Response:
        """Complete texts or token ids."""
        return await _answer(serving, texts, request, body, body.prompt)

    @app.post("/v1/chat/completions", responses={**_STREAMED, **errors}, response_class=Response)
    async def chat_completions(
        request: HttpRequest, body: Annotated[ChatBody, Depends(bodies.of(ChatBody))]
    ) -> Response:
        """Answer a chat."""
        return await _answer(serving, texts, request, body, [as_dicts(body.messages)])


async def _answer(
    serving: Serving, texts: TokenTexts, request: HttpRequest, body: CompletionBody | ChatBody, prompts: Sequence[Any]
) -> Response:
    started, facts, identity = serving.clock(), request.state.facts, request.state.identity
    if serving.hands_over:
        check_asks_for_handover(request)
    adapter = None if serving.prefill is not None else serving.adapter(body.model, identity)
    facts["model"] = body.model
    if serving.prefill is not None:
        serving.engine.check_open(len(prompts), identity.tenant)
        asked = serving.prefill.handovers(request, len(prompts), serving.max_model_len * _token_bytes(serving))
        handovers = await unless_gone(request.receive, asyncio.create_task(asked))
        requests = _taken_over(serving, body, handovers, identity)
    elif sum(len(part) for prompt in prompts for part in _parts(prompt)) > _LONG_TEXT:
        requests = await asyncio.to_thread(_make_requests, serving, body, prompts, adapter, identity)
    else:
        requests = _make_requests(serving, body, prompts, adapter, identity)
    kind = ChatShape if isinstance(body, ChatBody) else CompletionShape
    shape = kind(model=body.model, created=int(serving.wall_clock()), texts=texts, logprobs=body.num_logprobs)
    stream = await unless_gone(request.receive, asyncio.create_task(serving.engine.open(requests)))
    job = Job(serving, shape, requests, stream, started, facts)
    if serving.hands_over:
        return handover_response(await unless_gone(request.receive, asyncio.create_task(job.handovers())))
    if body.stream:
        return EventStream(job.events(body.include_usage), job.close)
    return _json(await unless_gone(request.receive, asyncio.create_task(job.whole())))


def _parts(prompt: Any) -> list[Any]:
    """Return the texts, or token ids, of a prompt."""
    return [m["content"] for m in prompt] if prompt and isinstance(prompt[0], dict) else [prompt]


def _make_requests(
    serving: Serving,
    body: CompletionBody | ChatBody,
    prompts: Sequence[Any],
    adapter: Registered | None,
    identity: Identity,
) -> list[Request]:
    """Return the engine's requests, one for each prompt."""
    vocab = serving.model.config.vocab_size
    outside = next((token for token in body.logit_bias if token >= vocab), None)
    if outside is not None:
        raise ApiError(
            400,
            f"logit_bias names the token {outside}; the model has tokens 0 to {vocab - 1}",
            code="invalid_value",
            param="logit_bias",
        )
    encoded = (serving.encode(prompt, add_special_tokens=body.add_special_tokens) for prompt in prompts)
    return [_make_request(serving, body, prompt, adapter, identity) for prompt in encoded]


def _make_request(
    serving: Serving,
    body: CompletionBody | ChatBody,
    prompt: EncodedPrompt,
    adapter: Registered | None,
    identity: Identity,
) -> Request:
    prefix = 0 if adapter is None else adapter.config.prefix_length
    length = prefix + len(prompt.token_ids)
    limit = body.limit or max(1, serving.max_model_len - length)
    if length + limit > serving.max_model_len:
        what = f"the prompt has {length - prefix} tokens and {limit} are asked for"
        raise serving.too_long(f"{what}, behind a learned prefix of {prefix}" if prefix else what)
    return Request(
        prompt=prompt,
        adapter=adapter,
        sampling=body.sampling(),
        max_tokens=limit,
        n=body.n,
        stop=tuple(body.stop),
        logprobs=body.num_logprobs,
        priority=body.priority,
        seed=secrets.randbits(32),
        tenant=identity.tenant,
        cache_salt=serving.cache_salt(identity, body.cache_salt),
    )


def _token_bytes(serving: Serving) -> int:
    """Return the bytes of a token's KV."""
    config, kv_dtype = serving.model.config, serving.engine.engine.runner.kv_dtype
    return config.num_hidden_layers * 2 * config.num_key_value_heads * config.head_dim * kv_dtype.itemsize


def _taken_over(
    serving: Serving, body: CompletionBody | ChatBody, handovers: Sequence[Handover], identity: Identity
) -> list[Request]:
    """Return the engine's requests for what another server prefilled."""
    requests = []
    for handover in handovers:
        prompt = EncodedPrompt(handover.prompt.token_ids, ())
        requests.append(handover.request(_make_request(serving, body, prompt, None, identity)))
    return requests


class Job:
    """A body's requests on their way through the engine.

    Args:
        serving: the server.
        shape: of the endpoint's answers.
        requests: one for each prompt.
        stream: their outputs.
        started: when the body was there.
        facts: what the log tells of it.
    """

    def __init__(
        self,
        serving: Serving,
        shape: Shape,
        requests: Sequence[Request],
        stream: OutputStream,
        started: float,
        facts: dict[str, Any],
    ):
        self._serving = serving
        self._shape = shape
        self._stream = stream
        self._started = started
        self._facts = facts
        self._n = requests[0].n
        self._samples = self._unended = len(requests) * self._n
        self._closed = False
        self._tokens = [0] * self._samples
        self._first: dict[int, float] = {}
        self._seen: set[int] = set()
        self._prompt_tokens = sum(len(request.token_ids) for request in requests)
        for request in requests:
            serving.metrics.prompt(len(request.token_ids))

    @property
    def usage(self) -> dict[str, int]:
        """The tokens so far."""
        return usage(self._prompt_tokens, sum(self._tokens))

    async def whole(self) -> dict[str, Any]:
        """Return the answer once all samples have ended.

        Raises:
            ApiError: if one of them failed or was given up.
        """
        samples = [Sample() for _ in range(self._samples)]
        try:
            async for index, output in self._outputs():
                _check_goes_on(output)
                samples[index].add(output)
        finally:
            self.close()
        choices = [self._shape.whole(index, sample) for index, sample in enumerate(samples)]
        return {**self._shape.head(stream=False), "choices": choices, "usage": self.usage}

    async def handovers(self) -> list[Handover]:
        """Return the prefilled requests once all samples have their first tokens.

        Raises:
            ApiError: as ``whole``.
        """
        samples = [Completion() for _ in range(self._samples)]
        try:
            async for index, output in self._outputs():
                _check_goes_on(output)
                samples[index].take(output)
        finally:
            self.close()
        return [Handover.of(samples[at : at + self._n]) for at in range(0, self._samples, self._n)]

    async def events(self, include_usage: bool) -> AsyncGenerator[bytes]:
        """Yield the answer as server-sent events; what fails on the way is the last one before ``[DONE]``."""
        head = self._shape.head(stream=True)
        no_usage: dict[str, Any] = {"usage": None} if include_usage else {}
        try:
            for index in range(self._samples):
                opening = self._shape.opening(index)
                if opening is not None:
                    yield _event({**head, "choices": [opening], **no_usage})
            async for index, output in self._outputs():
                yield _event({**head, "choices": [self._shape.piece(index, output)], **no_usage})
            if include_usage:
                yield _event({**head, "choices": [], "usage": self.usage})
        except ApiError as error:
            yield _event(error.body)
        except PreftError as error:
            yield _event(to_api_error(error).body)
        finally:
            self.close()
        yield b"data: [DONE]\n\n"

    async def _outputs(self) -> AsyncIterator[tuple[int, Any]]:
        """Yield outputs with the index of their choice, noting times and tokens.

        Raises:
            ApiError: if a sample failed.
        """
        async for number, output in self._stream:
            index, now = number * self._n + output.index, self._serving.clock()
            if number not in self._seen:
                self._seen.add(number)
                self._serving.metrics.first_token(now - self._started)
            first = self._first.setdefault(index, now)
            self._tokens[index] += len(output.token_ids)
            if output.finish_reason is not None:
                self._unended -= 1
                self._serving.metrics.ended(output.finish_reason, self._tokens[index], now - self._started, now - first)
                self._facts.setdefault("finish", []).append(output.finish_reason)
            if output.finish_reason == "error":
                # It may tell of paths and of the device.
                _log.error("a request failed", extra={"facts": {"id": self._facts.get("id"), "reason": output.error}})
                raise ApiError(500, _FAILED, code="generation_failed")
            yield index, output

    def close(self) -> None:
        """Give up what has not ended, and note what there was; once is enough, more often does no harm."""
        if self._closed:
            return
        self._closed = True
        self._serving.metrics.gave_up("error" if self._stream.ended else "abort", self._unended)
        if not self._stream.ended:
            self._facts.setdefault("finish", []).append("cancelled")
        self._facts["prompt_tokens"], self._facts["completion_tokens"] = self._prompt_tokens, sum(self._tokens)
        self._stream.close()


def _check_goes_on(output: Output) -> None:
    if output.finish_reason == "abort":
        raise ApiError(503, f"the request was given up: {output.error}", code="aborted", headers=retry_after(5))


class EventStream(StreamingResponse):
    """A stream of events that ends its generator however it ends itself, a client that went away included.

    Where the client is gone before the generator began, ending that does nothing: so ``close`` is called as well.
    """

    media_type = "text/event-stream"

    def __init__(self, events: AsyncGenerator[bytes], close: Callable[[], None]):
        super().__init__(events, headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        self._events = events
        self._close = close

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send it."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            await self._events.aclose()
            self._close()


def _dump(content: dict[str, Any]) -> bytes:
    return json.dumps(content, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode()


def _event(content: dict[str, Any]) -> bytes:
    return b"data: " + _dump(content) + b"\n\n"


def _json(content: dict[str, Any]) -> Response:
    return Response(_dump(content), media_type="application/json")
