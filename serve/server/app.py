"""The HTTP app: OpenAI's and vLLM's routes over one engine."""

import asyncio
import contextlib
import inspect
import logging
from collections.abc import AsyncIterator
from typing import Annotated, Any

from fastapi import Depends, FastAPI, Request
from fastapi.openapi.utils import get_openapi
from prometheus_client import CONTENT_TYPE_LATEST
from pydantic import BaseModel
from starlette.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response

import preft_jax
from preft_jax.errors import AdapterError, RequestError
from serve.server.auth import require_figures, shown_owner
from serve.server.bodies import Bodies, add_schemas
from serve.server.exposition import bank_figures, engine_figures
from serve.server.failures import ApiError, add_handlers, retry_after
from serve.server.fine_tuning import add_fine_tuning
from serve.server.generation import add_generation
from serve.server.middleware import Front
from serve.server.page import make_page
from serve.server.protocol import DetokenizeBody, LoadBody, TokenizeBody, UnloadBody, as_dicts
from serve.server.serving import Serving
from serve.store.names import Registered, RegistryError

_log = logging.getLogger("preft.server")

CLOSE_SECONDS = 5.0
"""How long fine-tuning may take to end where the engine's thread has not ended."""


class ErrorDetail(BaseModel):
    """What went wrong."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorAnswer(BaseModel):
    """Every answer that is no success."""

    error: ErrorDetail


ERRORS: dict[int | str, Any] = {
    status: {"model": ErrorAnswer} for status in (400, 401, 403, 404, 405, 408, 409, 413, 415, 429, 500, 503, 507)
}

_TEXT: dict[int | str, Any] = {200: {"content": {"text/plain": {}}}}


def make_app(serving: Serving) -> FastAPI:
    """Return the app; it starts the engine when it starts, and stops it when it ends."""
    bodies = Bodies(serving.max_body_bytes)

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        await serving.engine.start()
        watch = asyncio.create_task(serving.watch())
        yield
        bodies.close()
        watch.cancel()
        await serving.engine.stop(0)
        if serving.prefill is not None:
            await serving.prefill.close()
        # A thread that still compiles holds the jobs; the program ends without them.
        seconds = CLOSE_SECONDS if serving.engine.busy else None
        if serving.tuning is not None and not await asyncio.to_thread(serving.tuning.close, seconds):
            _log.warning("a program of fine-tuning is being compiled: jobs go on from their last state on the disk")

    app = FastAPI(
        title="preft-jax",
        version=preft_jax.__version__,
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
        **_without_telemetry(),
    )
    app.add_middleware(
        Front,
        keys=serving.keys,
        metrics=serving.metrics,
        max_body_bytes=serving.max_body_bytes,
        body_seconds=serving.body_seconds,
        clock=serving.clock,
    )
    add_handlers(app)
    _add_state(app, serving)
    _add_page(app, serving)
    _add_models(app, serving, bodies)
    _add_tokens(app, serving, bodies)
    add_generation(app, serving, bodies, ERRORS)
    add_fine_tuning(app, serving, bodies, ERRORS)
    app.openapi = lambda: _openapi(app)
    return app


def _without_telemetry() -> dict[str, Any]:
    """Return what keeps FastAPI from telling a collector of every request, where it can do so."""
    if "telemetry" not in inspect.signature(FastAPI.__init__).parameters:
        return {}
    return {"telemetry": dict.fromkeys(("tracing", "metrics", "logs", "operation_spans", "auto_configure"), False)}


def _openapi(app: FastAPI) -> dict[str, Any]:
    """Return the schema without FastAPI's own error, 422: ours are 400."""
    if app.openapi_schema is None:
        schema = get_openapi(title=app.title, version=app.version, routes=app.routes)
        add_schemas(schema, app.routes)
        for path in schema["paths"].values():
            for operation in path.values():
                operation["responses"].pop("422", None)
        for unused in ("HTTPValidationError", "ValidationError"):
            schema["components"]["schemas"].pop(unused, None)
        app.openapi_schema = schema
    return app.openapi_schema


def _add_state(app: FastAPI, serving: Serving) -> None:
    engine = serving.engine

    @app.get("/health", responses={503: ERRORS[503]})
    async def health() -> dict[str, str]:
        """Tell whether the engine is alive."""
        if not engine.alive:
            raise ApiError(503, f"the engine failed: {engine.failure}; restart the server", code="engine_failed")
        return {"status": "ok"}

    @app.get("/ready", responses={503: ERRORS[503]})
    async def ready() -> dict[str, str]:
        """Tell whether requests are taken."""
        if not engine.accepts:
            raise ApiError(
                503, "the server takes no requests now; ask again later", code="not_ready", headers=retry_after(2)
            )
        return {"status": "ok"}

    @app.get("/version")
    async def version() -> dict[str, str]:
        """Tell the version."""
        return {"version": preft_jax.__version__}

    @app.get("/metrics", responses={**ERRORS, 200: {"content": {CONTENT_TYPE_LATEST: {}}}}, response_class=Response)
    async def metrics(request: Request) -> Response:
        """Tell everything that is counted, for Prometheus; where there are keys, to the admin."""
        require_figures(serving.keys, request.state.identity)
        return Response(serving.metrics.text(), headers={"Content-Type": CONTENT_TYPE_LATEST})


def _add_page(app: FastAPI, serving: Serving) -> None:
    content, headers = make_page(fine_tuning=serving.tuning is not None)

    @app.get("/", response_class=HTMLResponse)
    async def index() -> HTMLResponse:
        """Return the built-in page."""
        return HTMLResponse(content, headers=headers)

    @app.get("/stats", responses=ERRORS)
    async def stats(request: Request) -> dict[str, Any]:
        """Tell the figures that the page shows; where there are keys, to the admin."""
        require_figures(serving.keys, request.state.identity)
        tiers = {**serving.adapters.tiers(), **bank_figures(serving.engine)}
        now = {"time": serving.wall_clock(), "model": serving.names[0]}
        return {**now, **engine_figures(serving.engine), "adapters": tiers}


def _add_models(app: FastAPI, serving: Serving, bodies: Bodies) -> None:
    one_at_a_time = asyncio.Lock()

    def card(adapter: Registered | None, name: str) -> dict[str, Any]:
        return {
            "id": name,
            "object": "model",
            "created": serving.created if adapter is None else int(adapter.created),
            "owned_by": shown_owner(None if adapter is None else adapter.owner),
            "root": serving.names[0] if adapter is None else name,
            "parent": None if adapter is None else serving.names[0],
            "max_model_len": serving.max_model_len,
            "kind": None if adapter is None else adapter.config.kind,
            "positions": None if adapter is None else adapter.config.positions,
        }

    @app.get("/v1/models", responses=ERRORS)
    async def models(request: Request) -> Any:
        """List the base model and the adapters that the key may see."""
        if serving.prefill is not None:
            return await serving.prefill.models(request)
        found = [card(None, name) for name in serving.names]
        found += [card(adapter, adapter.name) for adapter in serving.visible(request.state.identity)]
        return {"object": "list", "data": found}

    @app.get("/v1/models/{name:path}", responses=ERRORS)
    async def model(request: Request, name: str) -> Any:
        """Describe one of them."""
        if serving.prefill is not None:
            return await serving.prefill.models(request, name)
        return card(serving.adapter(name, request.state.identity), name)

    @app.post("/v1/load_lora_adapter", responses={**_TEXT, **ERRORS}, response_class=Response)
    async def load(request: Request, body: Annotated[LoadBody, Depends(bodies.of(LoadBody))]) -> Response:
        """Load an adapter from a directory on the server."""
        serving.loading.check(request.state.identity)
        if body.lora_name in serving.names:
            raise ApiError(
                400,
                f"{body.lora_name!r} is the base model's name; choose another",
                code="name_taken",
                param="lora_name",
            )
        async with one_at_a_time:
            path = await asyncio.to_thread(serving.loading.resolve, body.lora_path)
            await asyncio.to_thread(
                serving.adapters.register,
                body.lora_name,
                str(path),
                replace=body.load_inplace,
                **body.model_dump(include={"owner", "pinned"}, exclude_unset=True),
            )
        return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' added successfully.")

    @app.post("/v1/unload_lora_adapter", responses={**_TEXT, **ERRORS}, response_class=Response)
    async def unload(request: Request, body: Annotated[UnloadBody, Depends(bodies.of(UnloadBody))]) -> Response:
        """Forget an adapter; requests that run end as they would have."""
        serving.loading.check(request.state.identity)
        try:
            await asyncio.to_thread(serving.adapters.unregister, body.lora_name)
        except RegistryError:
            raise  # It is still loaded, and the message says so.
        except AdapterError as error:
            raise ApiError(404, str(error), code="model_not_found", param="lora_name") from error
        return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' removed successfully.")


def _add_tokens(app: FastAPI, serving: Serving, bodies: Bodies) -> None:
    def check_model(name: str | None, request: Request) -> None:
        if serving.prefill is None:  # It alone knows the names, and all have one tokenizer.
            serving.adapter(name or serving.names[0], request.state.identity)

    def tokenized(body: TokenizeBody) -> dict[str, Any]:
        tokenizer = serving.require_tokenizer()
        if body.messages is not None:
            ids = serving.encode(
                as_dicts(body.messages),
                add_generation_prompt=body.add_generation_prompt,
                add_special_tokens=body.add_special_tokens,
            ).token_ids
        else:
            ids = serving.encode_text(body.prompt or "", add_special_tokens=body.add_special_tokens is not False)
        strings = tokenizer.convert_ids_to_tokens(ids) if body.return_token_strs else None
        return {"count": len(ids), "max_model_len": serving.max_model_len, "tokens": ids, "token_strs": strings}

    def detokenized(body: DetokenizeBody) -> dict[str, Any]:
        vocab = serving.model.config.vocab_size
        outside = next((token for token in body.tokens if token >= vocab), None)
        if outside is not None:
            raise RequestError(f"token id {outside} is outside the model's vocabulary; allowed: 0 to {vocab - 1}")
        return {"prompt": serving.require_tokenizer().decode(body.tokens, clean_up_tokenization_spaces=False)}

    @app.post("/tokenize", responses=ERRORS)
    async def tokenize(
        request: Request, body: Annotated[TokenizeBody, Depends(bodies.of(TokenizeBody))]
    ) -> JSONResponse:
        """Turn a text or a chat into token ids."""
        check_model(body.model, request)
        return JSONResponse(await asyncio.to_thread(tokenized, body))

    @app.post("/detokenize", responses=ERRORS)
    async def detokenize(
        request: Request, body: Annotated[DetokenizeBody, Depends(bodies.of(DetokenizeBody))]
    ) -> JSONResponse:
        """Turn token ids into text."""
        check_model(body.model, request)
        return JSONResponse(await asyncio.to_thread(detokenized, body))
