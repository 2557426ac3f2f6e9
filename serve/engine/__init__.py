"""The engine: continuous batching of requests over one base model.

``Engine``, ``AsyncEngine``, ``EngineConfig``, ``Request`` and ``Output`` are found here; they are loaded when they are
asked for, so that the planning modules of this package can be imported without JAX.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from serve.engine.async_engine import AsyncEngine as AsyncEngine
    from serve.engine.config import EngineConfig as EngineConfig
    from serve.engine.engine import Engine as Engine
    from serve.engine.request import Output as Output
    from serve.engine.request import Request as Request

_WHERE = {
    "AsyncEngine": "async_engine",
    "Engine": "engine",
    "EngineConfig": "config",
    "Output": "request",
    "Request": "request",
}


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_WHERE[name]}"), name)
