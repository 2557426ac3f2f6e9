"""Adapters that act on the prompt only, so that decoding is the plain base model however many users there are.

``load_model``, ``load_adapter`` and ``generate`` are all that most programs need; see the README's example.
"""

import importlib
from typing import TYPE_CHECKING, Any

try:
    import kernels.types as _ours  # noqa: F401
except ImportError as error:
    if (error.name or "").startswith("kernels"):
        raise ImportError(
            "preft-jax brings a package named 'kernels', and another installed package of that name hides it; "
            "uninstall that one (pip uninstall kernels), or put preft-jax before it on the path"
        ) from error
    raise

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
from preft_jax.io.adapter_files import load_adapter as load_adapter
from preft_jax.io.adapter_files import save_adapter as save_adapter
from preft_jax.io.adapter_limits import AdapterLimits as AdapterLimits
from preft_jax.loading import Model as Model
from preft_jax.loading import load_model as load_model
from preft_jax.models.modules import Llama as Llama
from preft_jax.sampling.parameters import SamplingParams as SamplingParams

if TYPE_CHECKING:
    from serve.generate import Completion as Completion
    from serve.generate import generate as generate

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """Load ``generate`` and ``Completion``, which run on the serving engine, when they are asked for."""
    if name in ("generate", "Completion"):
        return getattr(importlib.import_module("serve.generate"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
