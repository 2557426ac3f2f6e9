"""The engine: continuous batching of requests over one base model.

Its names are loaded when they are asked for, so that the planning modules of this package can be imported without JAX.
"""

from typing import TYPE_CHECKING

from preft_jax.lazy import forwarded

if TYPE_CHECKING:
    from serve.engine.async_engine import AsyncEngine as AsyncEngine
    from serve.engine.completion import Completion as Completion
    from serve.engine.config import EngineConfig as EngineConfig
    from serve.engine.engine import Engine as Engine
    from serve.engine.request import Output as Output
    from serve.engine.request import Request as Request

__all__ = [
    "AsyncEngine",
    "Completion",
    "Engine",
    "EngineConfig",
    "Output",
    "Request",
]

__getattr__ = forwarded(
    __name__,
    {
        "serve.engine.async_engine": ("AsyncEngine",),
        "serve.engine.completion": ("Completion",),
        "serve.engine.config": ("EngineConfig",),
        "serve.engine.engine": ("Engine",),
        "serve.engine.request": (
            "Output",
            "Request",
        ),
    },
)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
