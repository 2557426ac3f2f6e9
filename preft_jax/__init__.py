"""Adapters that act on the prompt only, so that decoding is the plain base model however many users there are.

``load_model``, ``load_adapter`` and ``generate`` are all that most programs need; see the README's example, and
docs/library.md for research. Names are loaded when they are asked for, so that plain host code (errors, edit masks,
plans of the engine) imports without JAX.
"""

import importlib
from typing import TYPE_CHECKING, Any

from preft_jax.lazy import forwarded

if TYPE_CHECKING:
    from preft_jax.adapters.adapter import Adapter as Adapter
    from preft_jax.adapters.adapter import fold as fold
    from preft_jax.adapters.config import AdapterConfig as AdapterConfig
    from preft_jax.adapters.edit_mask import extend_edit_mask as extend_edit_mask
    from preft_jax.adapters.edit_mask import make_edit_mask as make_edit_mask
    from preft_jax.adapters.edit_mask import prompt_edit_mask as prompt_edit_mask
    from preft_jax.adapters.edit_mask import sequence_edit_mask as sequence_edit_mask
    from preft_jax.adapters.fold import LowRankEdit as LowRankEdit
    from preft_jax.adapters.fold import fold_params as fold_params
    from preft_jax.adapters.init import init_adapter as init_adapter
    from preft_jax.adapters.init import random_adapter as random_adapter
    from preft_jax.adapters.kinds import register_kind as register_kind
    from preft_jax.adapters.own import adapter_of_edits as adapter_of_edits
    from preft_jax.adapters.own import steering_adapter as steering_adapter
    from preft_jax.adapters.positions import register_positions as register_positions
    from preft_jax.config import PRESETS as PRESETS
    from preft_jax.config import ModelConfig as ModelConfig
    from preft_jax.device.mesh import Placement as Placement
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
    from preft_jax.models.activations import activations as activations
    from preft_jax.models.forward import forward as forward
    from preft_jax.models.forward import hidden_states as hidden_states
    from preft_jax.models.layout import fused_layout as fused_layout
    from preft_jax.models.modules import Llama as Llama
    from preft_jax.prefix import text_prefix as text_prefix
    from preft_jax.rows import Rows as Rows
    from preft_jax.rows import collate as collate
    from preft_jax.sampling.parameters import SamplingParams as SamplingParams
    from preft_jax.scoring import logprobs as logprobs
    from preft_jax.scoring import perplexity as perplexity
    from preft_jax.text.chat import encode_answer as encode_answer
    from preft_jax.text.chat import encode_prompt as encode_prompt
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
    "Placement",
    "PreftError",
    "RequestError",
    "Rows",
    "SamplingParams",
    "ShapeError",
    "activations",
    "adapter_of_edits",
    "collate",
    "encode_answer",
    "encode_prompt",
    "extend_edit_mask",
    "fold",
    "fold_params",
    "forward",
    "fused_layout",
    "generate",
    "hidden_states",
    "init_adapter",
    "load_adapter",
    "load_model",
    "logprobs",
    "make_edit_mask",
    "perplexity",
    "prompt_edit_mask",
    "random_adapter",
    "register_kind",
    "register_positions",
    "save_adapter",
    "sequence_edit_mask",
    "steering_adapter",
    "text_prefix",
]

_forward = forwarded(
    __name__,
    {
        "preft_jax.adapters.adapter": (
            "Adapter",
            "fold",
        ),
        "preft_jax.adapters.config": ("AdapterConfig",),
        "preft_jax.adapters.edit_mask": (
            "extend_edit_mask",
            "make_edit_mask",
            "prompt_edit_mask",
            "sequence_edit_mask",
        ),
        "preft_jax.adapters.fold": (
            "LowRankEdit",
            "fold_params",
        ),
        "preft_jax.adapters.init": (
            "init_adapter",
            "random_adapter",
        ),
        "preft_jax.adapters.kinds": ("register_kind",),
        "preft_jax.adapters.own": ("adapter_of_edits", "steering_adapter"),
        "preft_jax.adapters.positions": ("register_positions",),
        "preft_jax.config": (
            "PRESETS",
            "ModelConfig",
        ),
        "preft_jax.device.mesh": ("Placement",),
        "preft_jax.errors": (
            "AdapterError",
            "ConfigError",
            "ModelError",
            "PreftError",
            "RequestError",
            "ShapeError",
        ),
        "preft_jax.io.adapter_files": (
            "load_adapter",
            "save_adapter",
        ),
        "preft_jax.io.adapter_limits": ("AdapterLimits",),
        "preft_jax.loading": (
            "Model",
            "load_model",
        ),
        "preft_jax.models.activations": ("activations",),
        "preft_jax.models.forward": (
            "forward",
            "hidden_states",
        ),
        "preft_jax.models.layout": ("fused_layout",),
        "preft_jax.models.modules": ("Llama",),
        "preft_jax.prefix": ("text_prefix",),
        "preft_jax.rows": (
            "Rows",
            "collate",
        ),
        "preft_jax.sampling.parameters": ("SamplingParams",),
        "preft_jax.scoring": ("logprobs", "perplexity"),
        "preft_jax.text.chat": (
            "encode_answer",
            "encode_prompt",
        ),
        # ``generate`` runs on the serving engine.
        "serve.generate": (
            "Completion",
            "generate",
        ),
    },
)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def __getattr__(name: str) -> Any:
    if name in __all__ and not name.endswith("Error"):
        _check_kernels()
    return _forward(name)


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
