"""Serving: the engine with its host and device sides, the server, and the programs that load either.

    engine = Engine(model, EngineConfig(max_num_seqs=64, bank_pages=65))
    completions = engine.generate([Request(prompt="Hello", adapter=adapter)])

Names are loaded when they are asked for.
"""

from typing import TYPE_CHECKING

from preft_jax.lazy import forwarded

if TYPE_CHECKING:
    from serve.engine.async_engine import AsyncEngine as AsyncEngine
    from serve.engine.completion import Completion as Completion
    from serve.engine.config import EngineConfig as EngineConfig
    from serve.engine.engine import Engine as Engine
    from serve.engine.handover import Handover as Handover
    from serve.engine.handover import hand_over as hand_over
    from serve.engine.request import Output as Output
    from serve.engine.request import Request as Request
    from serve.store.host import AdapterStore as AdapterStore

__all__ = [
    "AdapterStore",
    "AsyncEngine",
    "Completion",
    "Engine",
    "EngineConfig",
    "Handover",
    "Output",
    "Request",
    "hand_over",
]

__getattr__ = forwarded(
    __name__,
    {
        "serve.engine.async_engine": ("AsyncEngine",),
        "serve.engine.completion": ("Completion",),
        "serve.engine.config": ("EngineConfig",),
        "serve.engine.engine": ("Engine",),
        "serve.engine.handover": (
            "Handover",
            "hand_over",
        ),
        "serve.engine.request": (
            "Output",
            "Request",
        ),
        "serve.store.host": ("AdapterStore",),
    },
)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
