"""Checkpoints that are in FP8: what ``quantization_config`` of ``config.json`` may say.

Read is what llm-compressor writes for compressed-tensors' ``float-quantized`` format with activations that are
quantised as they come, a scale for each token: ``X.weight`` in e4m3 ``[output, input]`` beside ``X.weight_scale``,
one number for each output or one for the whole tensor. Which linears are in FP8 is said by the tensors.
"""

from collections.abc import Mapping
from typing import Any

from preft_jax.errors import ConfigError, plain, shown

_FIELDS: Mapping[str, tuple[Any, ...]] = {
    "quant_method": ("compressed-tensors",),
    "format": ("float-quantized",),
    "quantization_status": ("compressed", "frozen"),
}
_WEIGHTS: Mapping[str, tuple[Any, ...]] = {
    "num_bits": (8,),
    "type": ("float",),
    "strategy": ("channel", "tensor"),
    "symmetric": (True,),
    "dynamic": (False,),
}
_ACTIVATIONS: Mapping[str, tuple[Any, ...]] = {**_WEIGHTS, "strategy": ("token",), "dynamic": (True,)}
"""Fields -> what they may be. Any other field must be empty, unless it changes nothing."""

_CHANGES_NOTHING = {"version", "global_compression_ratio", "ignore", "targets", "config_groups", "observer",
                    "observer_kwargs"}  # fmt: skip

_ADVICE = (
    "of quantised checkpoints, compressed-tensors FP8 is read (float-quantized; weights symmetric per channel or per "
    "tensor, activations dynamic per token): load one of that kind, unquantised safetensors, or a GGUF file"
)


def check_compressed(found: Any) -> None:
    """Raise ``ConfigError`` unless a ``quantization_config`` is of the one kind that is computed here."""
    if not isinstance(found, Mapping):
        raise ConfigError(f"quantization_config is {shown(found)}; {_ADVICE}")
    sparsity = found.get("sparsity_config") or {}
    dense = isinstance(sparsity, Mapping) and sparsity.get("format", "dense") == "dense"
    rest = {name: value for name, value in found.items() if not (name == "sparsity_config" and dense)}
    _check("quantization_config", rest, _FIELDS, required=("quant_method", "format"))
    groups = found.get("config_groups")
    if not isinstance(groups, Mapping) or not groups:
        raise ConfigError(f"quantization_config.config_groups is {shown(groups)}; {_ADVICE}")
    for name, group in groups.items():
        where = f"quantization_config.config_groups.{plain(str(name))}"
        if not isinstance(group, Mapping):
            raise ConfigError(f"{where} is {shown(group)}; {_ADVICE}")
        parts = {"weights": _WEIGHTS, "input_activations": _ACTIVATIONS}
        others = {field: value for field, value in group.items() if field not in parts}
        _check(where, others, {"format": ("float-quantized", None)}, required=())
        for part, allowed in parts.items():
            fields = group.get(part)
            if not isinstance(fields, Mapping):
                raise ConfigError(f"{where}.{part} is {shown(fields)}; {_ADVICE}")
            _check(f"{where}.{part}", fields, allowed, required=tuple(allowed))


def _check(
    where: str, fields: Mapping[str, Any], allowed: Mapping[str, tuple[Any, ...]], required: tuple[str, ...]
) -> None:
    for name in required:
        if name not in fields:
            raise ConfigError(f"{where} lacks {name!r}; {_ADVICE}")
    for name, value in fields.items():
        if name in allowed:
            if value not in allowed[name]:
                those = " or ".join(map(repr, allowed[name]))
                raise ConfigError(f"{where}.{name} is {shown(value)}, and {those} is supported; {_ADVICE}")
        elif value and name not in _CHANGES_NOTHING:
            raise ConfigError(f"{where}.{plain(str(name))} is {shown(value)}, which is not supported; {_ADVICE}")
