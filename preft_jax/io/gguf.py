"""Models in GGUF files: architecture metadata -> ``ModelConfig``, quantised tensors -> parameters, and the tokenizer.

Supported: the architectures of ``models/registry.py``; tensor types F32, F16, BF16, Q4_0, Q4_1 and Q8_0.

GGUF stores the query and key projections of some families (``Family.gguf_permuted``) with the rows of each head
permuted, so that rotary embeddings act on neighbouring pairs; ours act on halves, as Hugging Face's do, and the
permutation is undone here. Llama 3.1's frequency scaling is stored as a tensor of factors, which is recognised by
recomputing it.
"""

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from preft_jax.config import ModelConfig
from preft_jax.device.mesh import SINGLE, Placement
from preft_jax.errors import ConfigError, ModelError, PreftError, plain, shown
from preft_jax.io.gguf_file import GGUFFile, open_gguf
from preft_jax.io.weights import build_params, check_tensors, tensor_slots
from preft_jax.models.forward import rope_frequencies
from preft_jax.models.registry import GGUF_FAMILIES, family
from preft_jax.quantize import PLAIN, Quantization
from preft_jax.rope import DEFAULT_THETA, LinearRope, Llama3Rope, RopeScaling
from preft_jax.text.tokenizer import gguf_tokenizer

_ROPE_FACTORS = "rope_freqs.weight"

_READ = (
    "context_length", "embedding_length", "block_count", "feed_forward_length", "attention.head_count",
    "attention.head_count_kv", "attention.key_length", "attention.value_length", "attention.layer_norm_rms_epsilon",
    "rope.freq_base", "rope.dimension_count", "rope.scaling.type", "rope.scaling.factor", "rope.scale_linear",
    "rope.scaling.original_context_length",
)  # fmt: skip
_WITHOUT_EFFECT = ("vocab_size", "tensor_data_layout", "rope.scaling.finetuned")
_NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "attention.causal": (True,),
    "rope.scaling.attn_factor": (1.0,),
    "attention.scale": (0.0,),
}
"""Keys of an architecture that change nothing with these values; others of those that are not read must be empty."""


class _Metadata:
    """Typed access to a GGUF file's metadata, with errors that name the key."""

    def __init__(self, path: Path, values: Mapping[str, Any]):
        self.path, self.values = path, values
        self.architecture = str(values.get("general.architecture"))
        if self.architecture not in GGUF_FAMILIES:
            raise ModelError(
                f"{path} has the unsupported architecture {self.architecture!r}; allowed: {', '.join(GGUF_FAMILIES)}"
            )
        self.family = GGUF_FAMILIES[self.architecture]

    def number(self, key: str, kind: type, default: Any = None) -> Any:
        """Return ``{architecture}.{key}`` as ``kind`` (int or float); required unless there is a default."""
        full = f"{self.architecture}.{key}"
        value = self.values.get(full, default)
        if value is None:
            raise ModelError(f"{self.path} lacks the metadata key {full!r}; convert the model again")
        allowed = (int,) if kind is int else (int, float)
        if isinstance(value, bool) or not isinstance(value, allowed) or not math.isfinite(value) or value <= 0:
            raise ModelError(f"{self.path} has {full} = {value!r}; one positive {kind.__name__} is expected")
        return kind(value)

    def value(self, key: str, default: Any = None) -> Any:
        """Return ``{architecture}.{key}`` as it is."""
        return self.values.get(f"{self.architecture}.{key}", default)

    def refuse(self, key: str, allowed: tuple[Any, ...]) -> None:
        """Raise if ``{architecture}.{key}`` is set to something whose computation is not implemented."""
        full = f"{self.architecture}.{key}"
        if full in self.values and self.values[full] not in allowed:
            raise ModelError(
                f"{self.path} has {full} = {self.values[full]!r}, which is not supported; allowed: {allowed}"
            )


def _rope_scaling(file: GGUFFile, meta: _Metadata, config: ModelConfig) -> RopeScaling | None:
    """Return the scaling of rotary frequencies: by a factor, or Llama 3.1's.

    As in llama.cpp a factor without a type is linear, and an old key holds it where the new one is missing.

    Raises:
        ModelError: for another type, both at once, or factors that are not those of the published models' constants.
    """
    meta.refuse("rope.scaling.type", ("none", "linear"))
    linear = None
    if meta.value("rope.scaling.type", "linear") == "linear":
        key = "rope.scaling.factor" if meta.value("rope.scaling.factor") is not None else "rope.scale_linear"
        factor = 1.0 if meta.value(key) in (None, 0) else meta.number(key, float)
        linear = None if factor == 1.0 else LinearRope(factor=factor)
    scaling = _llama3_scaling(file, meta, config)
    if linear is not None and scaling is not None:
        raise ModelError(
            f"{file.path} has both a rotary scaling factor {linear.factor} and factors in {_ROPE_FACTORS!r}; convert "
            "the model again, or load its safetensors"
        )
    return linear or scaling


def _llama3_scaling(file: GGUFFile, meta: _Metadata, config: ModelConfig) -> Llama3Rope | None:
    """Recognise Llama 3.1's scaling in the tensor of what each rotary frequency is divided by."""
    if _ROPE_FACTORS not in file.tensors:
        return None
    factors = file.read(_ROPE_FACTORS)
    stored = meta.number("rope.scaling.original_context_length", int, default=8192)
    if factors.shape == (config.head_dim // 2,) and np.isfinite(factors).all() and factors.max() >= 1.0:
        if np.allclose(factors, 1.0):
            return None
        for original in dict.fromkeys((stored, 8192)):
            scaling = Llama3Rope(
                factor=round(float(factors.max()), 3),
                low_freq_factor=1.0,
                high_freq_factor=4.0,
                original_max_position_embeddings=original,
            )
            scaled = rope_frequencies(dataclasses.replace(config, rope_scaling=scaling))
            if np.allclose(factors, rope_frequencies(config) / scaled, rtol=1e-4):
                return scaling
    raise ModelError(
        f"{file.path} has rotary frequency factors in {_ROPE_FACTORS!r} that are not Llama 3.1's with low_freq_factor "
        f"1, high_freq_factor 4 and original length {stored}; load the model's safetensors instead"
    )


def _refuse_unsupported(meta: _Metadata, head_dim: int) -> None:
    meta.refuse("rope.dimension_count", (head_dim,))
    meta.refuse("attention.key_length", (head_dim,))
    meta.refuse("attention.value_length", (head_dim,))
    for full, value in meta.values.items():
        architecture, _, key = full.partition(".")
        if architecture != meta.architecture or key in (*_READ, *_WITHOUT_EFFECT):
            continue
        allowed = _NEUTRAL.get(key, ())
        if value not in allowed if key in _NEUTRAL else _is_set(value):
            raise ModelError(
                f"{meta.path} has {plain(full)} = {shown(value)}, which may change what the model computes and is not "
                f"supported{f'; allowed: {allowed}' if allowed else ''}; load the model's safetensors instead"
            )


def _is_set(value: Any) -> bool:
    return bool(np.any(value)) if isinstance(value, np.ndarray | list) else bool(value)


def _token_id(meta: _Metadata, key: str) -> int | None:
    value = meta.values.get(f"tokenizer.ggml.{key}")
    if value is not None and (isinstance(value, bool) or not isinstance(value, int)):
        raise ModelError(f"{meta.path} has tokenizer.ggml.{key} = {value!r}; a token id is expected")
    return value


def read_config(file: GGUFFile) -> ModelConfig:
    """Build a ``ModelConfig`` from a GGUF file's metadata; the vocabulary's size is that of the embedding.

    Raises:
        ModelError: for another architecture, a missing or impossible value, or an option that is not implemented.
    """
    meta = _Metadata(file.path, file.metadata)
    heads = meta.number("attention.head_count", int)
    hidden = meta.number("embedding_length", int)
    head_dim = meta.number("attention.key_length", int, default=hidden // max(heads, 1))
    _refuse_unsupported(meta, head_dim)
    names = meta.family.gguf_names
    embedding = file.tensors.get(names["embed"])
    if embedding is None:
        raise ModelError(f"{file.path} has no tensor {names['embed']!r}; is it a whole model?")
    layers = meta.number("block_count", int)
    if layers > len(file.tensors):
        raise ModelError(f"{file.path} claims {layers} layers and has {len(file.tensors)} tensors; get the file again")
    eos = tuple(_token_id(meta, f"{name}_token_id") for name in ("eos", "eot", "eom"))
    try:
        config = ModelConfig(
            vocab_size=embedding.shape[0],
            hidden_size=hidden,
            intermediate_size=meta.number("feed_forward_length", int),
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=meta.number("attention.head_count_kv", int, default=heads),
            head_dim=head_dim,
            rope_theta=meta.number("rope.freq_base", float, default=DEFAULT_THETA),
            # Stored as float32: 9.999999747e-06 was written as 1e-5.
            rms_norm_eps=float(f"{meta.number('attention.layer_norm_rms_epsilon', float):.6g}"),
            tie_word_embeddings=names["lm_head"] not in file.tensors,
            **meta.family.layer_options({}),
            max_position_embeddings=meta.number("context_length", int),
            bos_token_id=_token_id(meta, "bos_token_id"),
            eos_token_ids=tuple(dict.fromkeys(token for token in eos if token is not None)),
            model_type=meta.family.model_type,
        )
        return dataclasses.replace(config, rope_scaling=_rope_scaling(file, meta, config))
    except ConfigError as error:
        raise ModelError(f"{file.path}: {error}") from error


def unpermute_rows(weight: np.ndarray, heads: int) -> np.ndarray:
    """Undo GGUF's order of a query or key projection ``[heads * C, D]``: pairs side by side back to two halves."""
    return weight.reshape(heads, -1, 2, weight.shape[-1]).swapaxes(1, 2).reshape(weight.shape)


def load_gguf(
    path: Path, dtype: Any, quantization: Quantization = PLAIN, placement: Placement = SINGLE
) -> tuple[ModelConfig, dict[str, Any], Any]:
    """Load ``(config, params, tokenizer)`` from a GGUF file, parameters dequantised to ``dtype``, then quantised anew.

    The tokenizer is a transformers ``PreTrainedTokenizerFast``, or ``None`` if the file has none.

    Raises:
        ModelError: if the file is damaged, or is a model or tokenizer of a kind that is not supported.
    """
    file = open_gguf(path)
    try:
        config = read_config(file)
        record = family(config.model_type)
        slots = tensor_slots(config, record.gguf_names)
        found = {name: info.shape for name, info in file.tensors.items() if name != _ROPE_FACTORS}
        check_tensors(slots, found, str(path))
        heads = {}
        if record.gguf_permuted:
            heads = {"q": config.num_attention_heads, "k": config.num_key_value_heads}

        def read(name: str) -> np.ndarray:
            site = slots[name].path[-1]
            weight = file.read(name)
            return unpermute_rows(weight, heads[site]) if site in heads else weight

        tokenizer = gguf_tokenizer(file.metadata, config.vocab_size, str(path))
        return config, build_params(config, slots, read, dtype, quantization, placement), tokenizer
    except PreftError:
        raise
    except Exception as error:
        # Metadata of the wrong type can fail anywhere in the packages underneath.
        raise ModelError(f"cannot read GGUF file {path}: {type(error).__name__}: {error}") from error
