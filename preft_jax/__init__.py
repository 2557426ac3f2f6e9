"""Adapters that act on the prompt only, so that decoding is the plain base model however many users there are.

``load_model``, ``load_adapter`` and ``generate`` are all that most programs need; see the README's example. Names are
loaded when they are asked for, so that plain host code (errors, edit masks, plans of the engine) imports without JAX.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from preft_jax.adapters.adapter import Adapter as Adapter
    from preft_jax.adapters.adapter import fold as fold
    from preft_jax.adapters.config import AdapterConfig as AdapterConfig
    from preft_jax.adapters.fold import LowRankEdit as LowRankEdit
    from preft_jax.adapters.init import init_adapter as init_adapter
    from preft_jax.adapters.init import random_adapter as random_adapter
    from preft_jax.config import PRESETS as PRESETS
    from preft_jax.config import ModelConfig as ModelConfig
    from preft_jax.errors import AdapterError as AdapterError
    from preft_jax.errors import ConfigError as ConfigError
    from preft_jax.errors import ModelError as ModelError
    from preft_jax.errors import PreftError as PreftError
    from preft_jax.errors import RequestError as RequestError
    from preft_jax.errors import ShapeError as ShapeError
    from preft_jax.io.adapter_files import load_adapter as load_adapter
    from preft_jax.io.adapter_files import save_adapter as save_adapter
    from preft_jax.io.adapter_limits import AdapterLimits as AdapterLimits
    from preft_jax.loading import Model as Model
    from preft_jax.loading import load_model as load_model
    from preft_jax.models.modules import Llama as Llama
    from preft_jax.sampling.parameters import SamplingParams as SamplingParams
    from serve.generate import Completion as Completion
    from serve.generate import generate as generate

__version__ = "0.1.0"

__all__ = [
    "PRESETS",
    "Adapter",
    "AdapterConfig",
    "AdapterError",
    "AdapterLimits",
    "Completion",
    "ConfigError",
    "Llama",
    "LowRankEdit",
    "Model",
    "ModelConfig",
    "ModelError",
    "PreftError",
    "RequestError",
    "SamplingParams",
    "ShapeError",
    "fold",
    "generate",
    "init_adapter",
    "load_adapter",
    "load_model",
    "random_adapter",
    "save_adapter",
]

_WHERE = {
    "preft_jax.adapters.adapter": ("Adapter", "fold"),
    "preft_jax.adapters.config": ("AdapterConfig",),
    "preft_jax.adapters.fold": ("LowRankEdit",),
    "preft_jax.adapters.init": ("init_adapter", "random_adapter"),
    "preft_jax.config": ("PRESETS", "ModelConfig"),
    "preft_jax.errors": ("AdapterError", "ConfigError", "ModelError", "PreftError", "RequestError", "ShapeError"),
    "preft_jax.io.adapter_files": ("load_adapter", "save_adapter"),
    "preft_jax.io.adapter_limits": ("AdapterLimits",),
    "preft_jax.loading": ("Model", "load_model"),
    "preft_jax.models.modules": ("Llama",),
    "preft_jax.sampling.parameters": ("SamplingParams",),
    # ``generate`` runs on the serving engine.
    "serve.generate": ("Completion", "generate"),
}
_MODULE_OF = {name: module for module, names in _WHERE.items() for name in names}


def __dir__() -> list[str]:
    return sorted([*globals(), *_MODULE_OF])


def __getattr__(name: str) -> Any:
    module = _MODULE_OF.get(name)
    if module is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if not module.startswith("preft_jax.errors"):
        _check_kernels()
    return getattr(importlib.import_module(module), name)


def _check_kernels() -> None:
    """Say so if another installed package hides the one that this project brings."""
    try:
        importlib.import_module("kernels.types")
    except ImportError as error:
        if (error.name or "").startswith("kernels"):
            raise ImportError(
                "preft-jax brings a package named 'kernels', and another installed package of that name hides it; "
                "uninstall that one (pip uninstall kernels), or put preft-jax before it on the path"
            ) from error
        raise
