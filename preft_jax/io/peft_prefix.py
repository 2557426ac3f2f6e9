"""Between a learned prefix and Hugging Face PEFT's files for one (``PREFIX_TUNING``).

PEFT has one tensor ``prompt_embeddings [m, 2 * L * K * C]``: of each position the keys and the values of each layer, in
turns. Keys stand in the cache as they are there, so they are rotated already, and PEFT gives the prompt the positions
behind them: both as here.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from preft_jax.adapters.adapter import Adapter
from preft_jax.adapters.config import AdapterConfig, adapter_shapes
from preft_jax.config import ModelConfig
from preft_jax.errors import AdapterError, ConfigError, reject_unknown, shown
from preft_jax.io.tensor_checks import Shape
from preft_jax.shapes import PREFIX

PEFT_TYPE = "PREFIX_TUNING"
TENSOR = "prompt_embeddings"

_SIZES = ("num_virtual_tokens", "num_layers", "token_dim", "num_attention_heads")
_WITHOUT_EFFECT = (
    "peft_type", "auto_mapping", "peft_version", "revision", "inference_mode", "base_model_name_or_path",
    "encoder_hidden_size", "prefix_projection",
)  # fmt: skip
"""Keys of bookkeeping, and of the projection, which PEFT has applied to the tensor that it saves."""


def contents_of_prefix(config: AdapterConfig) -> dict[str, Any]:
    """Return the ``adapter_config.json`` of a prefix; PEFT finds the sizes that are null in its model."""
    return {
        "peft_type": PEFT_TYPE, "task_type": "CAUSAL_LM", "auto_mapping": None, "revision": None,
        "base_model_name_or_path": config.base_model, "inference_mode": True, "num_virtual_tokens": config.rank,
        "num_transformer_submodules": 1, "num_layers": None, "token_dim": None, "num_attention_heads": None,
        "prefix_projection": False, "encoder_hidden_size": None,
    }  # fmt: skip


def tensors_of_prefix(params: Any) -> dict[str, np.ndarray]:
    """Return a prefix's parameters as PEFT has them."""
    leaves = [np.asarray(sites[PREFIX][name], np.float32) for sites in params["layers"] for name in ("k", "v")]
    return {TENSOR: np.concatenate(leaves, axis=1)}


def config_of_prefix(contents: Mapping[str, Any], where: str) -> AdapterConfig:
    """Return the config of a prefix that PEFT saved.

    Raises:
        AdapterError: if it asks for what a prefix here is not.
    """
    sizes = {key: contents.get(key) for key in _SIZES}
    for key, value in sizes.items():
        if value is not None and (type(value) is not int or value < 1):
            raise AdapterError(f"{where}: {key} is {shown(value)}; give an integer of at least 1")
    for key, allowed in (("task_type", (None, "CAUSAL_LM")), ("num_transformer_submodules", (None, 1))):
        if contents.get(key) not in allowed:
            raise AdapterError(f"{where}: {key} is {shown(contents[key])}; only {shown(allowed[1])} is supported")
    known = (*_SIZES, *_WITHOUT_EFFECT, "task_type", "num_transformer_submodules")
    reject_unknown([key for key, value in contents.items() if value], known, what=f"key of {where}", error=AdapterError)
    if sizes["num_virtual_tokens"] is None:
        raise AdapterError(f"{where} lacks 'num_virtual_tokens'; write the adapter with PEFT's save_pretrained")
    base = contents.get("base_model_name_or_path")
    if base is not None and not isinstance(base, str):
        raise AdapterError(f"{where}: base_model_name_or_path is {shown(base)}; give a name")
    try:
        return AdapterConfig(kind="prefix", rank=sizes["num_virtual_tokens"], base_model=base)
    except ConfigError as error:
        raise AdapterError(f"{where}: {error}") from None


def prefix_shape(
    config: AdapterConfig, contents: Mapping[str, Any], model: ModelConfig | None, max_layers: int, where: str
) -> Shape:
    """Return the shape of PEFT's tensor; its width is None without a model.

    Raises:
        AdapterError: if the file does not say how many layers there are, or more than ``max_layers``, without a model;
            or the model's are others.
    """
    layers = contents.get("num_layers")
    if model is None:
        if layers is None or layers > max_layers:
            raise AdapterError(
                f"{where}: num_layers is {shown(layers)}; allowed without a base model: 1 to {max_layers}; load the "
                "adapter for its base model"
            )
        return config.rank, None
    if layers not in (None, model.num_hidden_layers):
        raise AdapterError(f"{where}: num_layers is {layers}; the base model has {model.num_hidden_layers}")
    try:
        adapter_shapes(config, model)
    except ConfigError as error:
        raise AdapterError(f"{where}: {error}") from None
    return config.rank, 2 * model.num_hidden_layers * model.kv_size


def prefix_adapter(config: AdapterConfig, tensor: np.ndarray, num_layers: int, where: str) -> Adapter:
    """Return the adapter of PEFT's tensor.

    Raises:
        AdapterError: if its width is not that of so many layers.
    """
    if tensor.shape[1] % (2 * num_layers):
        raise AdapterError(
            f"{where}: {TENSOR} is {tensor.shape[1]} wide, which is no multiple of 2 x {num_layers} (num_layers)"
        )
    leaves = np.split(tensor.astype(np.float32), 2 * num_layers, axis=1)
    pairs = zip(leaves[::2], leaves[1::2], strict=True)
    return Adapter(config, {"layers": [{PREFIX: {"k": k, "v": v}} for k, v in pairs]})
