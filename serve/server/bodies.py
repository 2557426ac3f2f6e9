"""From a body's bytes to a checked body: how much it may hold, and where the work is done.

A body of some MiB can hold millions of values. They are counted before any is made, and a large body is read in a
thread of its own, one at a time, so that streams go on meanwhile. Of what is wrong, the first is told: the fields are
declared so that checking ends there.
"""

import asyncio
import dataclasses
import json
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from fastapi import Request
from fastapi.routing import APIRoute
from pydantic import BaseModel, ValidationError
from pydantic.json_schema import models_json_schema
from starlette.routing import BaseRoute

from serve.server.failures import UNREADABLE, ApiError, validation_error

SMALL = 2**15
"""Bytes of a body up to which it is read on the event loop: some milliseconds, however wrong it is."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Bounds:
    """How much a body may hold.

    Attributes:
        values: items of lists and objects.
        containers: lists and objects, each of which takes some 100 bytes in memory.
        names: of objects' fields.
    """

    values: int = 2**18
    containers: int = 2**16
    names: int = 2**17

    @classmethod
    def of(cls, max_body_bytes: int) -> "Bounds":
        """Return the bounds of a server: those of 4 MiB, and more where larger bodies are let in."""
        parts = max(1, max_body_bytes >> 22)
        return cls(values=parts * cls.values, containers=parts * cls.containers, names=parts * cls.names)

    def check(self, raw: bytes) -> None:
        """Raise ``ApiError``, 400, if a body holds more; what stands in texts is not counted."""
        text = np.frombuffer(raw.replace(b"\\\\", b"").replace(b'\\"', b""), np.uint8)
        outside = np.bitwise_xor.accumulate((text == ord('"')).view(np.uint8)) == 0

        def count(*characters: str) -> int:
            return sum(int(np.count_nonzero((text == ord(one)) & outside)) for one in characters)

        found = {"values": count(","), "containers": count("[", "{"), "names": count(":")}
        for what, number in found.items():
            if number > getattr(self, what):
                told = {"containers": "lists and objects", "names": "fields of objects"}.get(what, what)
                raise ApiError(
                    400,
                    f"the body holds {number} {told}, and at most {getattr(self, what)} are read; send fewer",
                    code="invalid_body",
                )


def parse[T: BaseModel](raw: bytes, kind: type[T], bounds: Bounds = Bounds()) -> T:
    """Return a checked body.

    Raises:
        ApiError: 400, with the first thing that is wrong.
    """
    if not raw:
        raise ApiError(400, "the body is empty; this endpoint takes a JSON object", code="invalid_body")
    if len(raw) > SMALL:
        bounds.check(raw)
    try:
        data = json.loads(raw.decode("utf-8-sig"))
    except json.JSONDecodeError as error:
        raise ApiError(
            400, f"the body is not valid JSON at character {error.pos}: {error.msg}", code="bad_json"
        ) from None
    except (ValueError, RecursionError):
        raise ApiError(400, UNREADABLE, code="bad_json") from None
    try:
        return kind.model_validate(data)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise validation_error([{**first, "loc": ("body", *first["loc"])}]) from None


class Bodies:
    """Reads the bodies of a server's routes."""

    def __init__(self, max_body_bytes: int):
        self._bounds = Bounds.of(max_body_bytes)
        self._reader = ThreadPoolExecutor(1, "body-reader")

    def of[T: BaseModel](self, kind: type[T]) -> Callable[[Request], Awaitable[T]]:
        """Return the dependency that gives a route its body."""

        async def read(request: Request) -> T:
            raw = await request.body()
            if len(raw) <= SMALL:
                return parse(raw, kind, self._bounds)
            loop = asyncio.get_running_loop()
            return await loop.run_in_executor(self._reader, parse, raw, kind, self._bounds)

        read.body_kind = kind  # type: ignore[attr-defined]
        return read

    def close(self) -> None:
        """End the thread."""
        self._reader.shutdown(wait=False, cancel_futures=True)


def add_schemas(schema: dict[str, Any], routes: list[BaseRoute]) -> None:
    """Add bodies to an OpenAPI schema; FastAPI knows only those that it reads itself."""
    kinds: dict[tuple[str, str], type[BaseModel]] = {}
    for route in routes:
        if isinstance(route, APIRoute):
            for dependency in route.dependant.dependencies:
                kind = getattr(dependency.call, "body_kind", None)
                if kind is not None:
                    kinds |= {(route.path_format, method.lower()): kind for method in route.methods or ()}
    made, definitions = models_json_schema(
        [(kind, "validation") for kind in dict.fromkeys(kinds.values())], ref_template="#/components/schemas/{model}"
    )
    schema.setdefault("components", {}).setdefault("schemas", {}).update(definitions.get("$defs", {}))
    for (path, method), kind in kinds.items():
        content = {"application/json": {"schema": made[(kind, "validation")]}}
        schema["paths"][path][method]["requestBody"] = {"required": True, "content": content}
