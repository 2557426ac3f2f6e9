"""Errors as OpenAI's API tells them: a status, and ``{"error": {"message", "type", "param", "code"}}``."""

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response

from preft_jax.errors import AdapterError, LimitError, PreftError, RequestError
from serve.engine.async_engine import EngineStopped, Overloaded
from serve.engine.handover import HandoverError
from serve.store.names import RegistryError
from serve.store.uploads import DiskError, FileTooLargeError

_TYPES = {429: "rate_limit_error", 500: "server_error", 503: "server_error", 507: "server_error"}
_CODES = {404: "not_found", 405: "method_not_allowed"}

_LONGEST = 80
"""Characters of a wrong value that a message repeats."""


NOT_AGAIN = {"X-Should-Retry": "false"}
"""Keeps OpenAI's client from asking again at once where that would not help."""

UNREADABLE = (
    "the body cannot be read as JSON: it is not UTF-8, nested too deeply, or holds a number of thousands of digits"
)
"""What is said of a body that Python's JSON refuses without a place."""


class ApiError(Exception):
    """What a client is told instead of an answer."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ):
        super().__init__(message)
        self.status = status
        self.message = message
        self.code = code
        self.param = param
        self.headers = dict(headers or {})

    @property
    def body(self) -> dict[str, Any]:
        """The answer's body."""
        kind = _TYPES.get(self.status, "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> Response:
        """Return the answer. Its JSON is ASCII: messages may repeat text that is no valid Unicode."""
        content = json.dumps(self.body).encode()
        return Response(content, self.status, self.headers, media_type="application/json")


def not_there(what: str, listing: str, *, code: str, param: str) -> ApiError:
    """Return the error of what does not exist or is another tenant's, which must look the same; ``listing``: a path."""
    message = f"the {what}, or your key has no access to it; GET {listing} lists those there are"
    return ApiError(404, message, code=code, param=param)


def no_model(name: str, near: str = "") -> ApiError:
    """Return the error of a model's name that is unknown, or not seen; ``near``: what may have been meant."""
    what = f"model {ascii(name)[:_LONGEST]} does not exist{near}"
    return not_there(what, "/v1/models", code="model_not_found", param="model")


def retry_after(seconds: float) -> dict[str, str]:
    """Return the header that says when to come back."""
    return {"Retry-After": str(max(1, math.ceil(seconds)))}


def to_api_error(error: PreftError) -> ApiError:
    """Return what a client is told of one of the engine's errors."""
    if isinstance(error, Overloaded):
        return ApiError(429, str(error), code="overloaded", headers=retry_after(error.retry_after))
    if isinstance(error, EngineStopped):
        return ApiError(503, str(error), code="unavailable", headers=retry_after(error.retry_after))
    if isinstance(error, RegistryError):
        return ApiError(503, str(error), code="not_stored", headers=retry_after(5))
    if isinstance(error, FileTooLargeError):
        return ApiError(413, str(error), code="file_too_large", param="file")
    if isinstance(error, LimitError):
        return ApiError(429, str(error), code="limit_reached", headers=NOT_AGAIN)
    if isinstance(error, DiskError):
        status, code = (507, "disk_full") if error.full else (500, "disk_failed")
        return ApiError(status, str(error), code=code, headers=NOT_AGAIN)
    if isinstance(error, HandoverError):
        return ApiError(503, f"the prefill server does not fit this one: {error}", code="prefill_failed")
    if isinstance(error, RequestError):
        return ApiError(400, str(error), code="invalid_request")
    if isinstance(error, AdapterError):
        return ApiError(400, str(error), code="adapter_error")
    return ApiError(500, str(error), code="internal_error")


def validation_error(errors: Sequence[Mapping[str, Any]]) -> ApiError:
    """Return what a client is told of the first thing that is wrong with its body or its parameters."""
    error = errors[0]
    where = [part for part in error["loc"][1:] if part != "[key]"]
    context = error.get("ctx") or {}
    param = _path([*where, *([context["field"]] if "field" in context else [])])
    if error["type"] in ("unknown_field", "unsupported_field"):
        return ApiError(400, error["msg"], code=error["type"], param=param)
    if not param:
        return ApiError(400, f"the body is not what this endpoint takes: {error['msg']}", code="invalid_body")
    if error["type"] == "missing":
        return ApiError(400, f"{param} is missing; this endpoint needs it", code="missing_field", param=param)
    message = error["msg"].removeprefix("Value error, ")
    return ApiError(400, f"{param}: {message}{_given(error.get('input'))}", code="invalid_value", param=param)


def _path(parts: Sequence[Any]) -> str:
    text = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in parts)
    return text.removeprefix(".")[:_LONGEST]


def _given(value: Any) -> str:
    """Repeat a wrong number; texts are not repeated, as they may be prompts."""
    return f"; given: {ascii(value)[:_LONGEST]}" if isinstance(value, int | float) else ""


def add_handlers(app: FastAPI) -> None:
    """Let an app answer every error in OpenAI's shape."""

    @app.exception_handler(ApiError)
    async def _api_error(request: Request, error: ApiError) -> Response:
        return error.response()

    @app.exception_handler(PreftError)
    async def _preft_error(request: Request, error: PreftError) -> Response:
        return to_api_error(error).response()

    @app.exception_handler(RequestValidationError)
    async def _validation_error(request: Request, error: RequestValidationError) -> Response:
        return validation_error(error.errors()).response()

    @app.exception_handler(HTTPException)
    async def _http_error(request: Request, error: HTTPException) -> Response:
        message = f"{request.method} {ascii(request.url.path)[1:-1][:_LONGEST]}: {error.detail}"
        code = _CODES.get(error.status_code, "bad_request")
        return ApiError(error.status_code, message, code=code, headers=error.headers).response()
