"""``ModelConfig``: the shape of a Llama-family model, from a preset or from a Hugging Face ``config.json``."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from preft_jax.errors import ConfigError, did_you_mean
from preft_jax.models.family import LAYER_OPTIONS
from preft_jax.models.registry import family
from preft_jax.rope import DEFAULT_THETA, Llama3Rope, RopeScaling, rope_from_hf, rope_to_hf
from preft_jax.shapes import LINEAR_SITES


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Shape and constants of a Llama-family decoder; field names are Hugging Face's.

    What a family's layers have besides (``qkv_bias``, ``qk_norm``, ``sliding_window``: most keys that a query sees) is
    said by its record, ``models/family.py``.
    Instances are hashable, so a config can be a static argument of a jitted function.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rope_theta: float = DEFAULT_THETA
    rope_scaling: RopeScaling | None = None
    rms_norm_eps: float = 1e-5
    tie_word_embeddings: bool = False
    qkv_bias: bool = False
    qk_norm: bool = False
    sliding_window: int | None = None
    max_position_embeddings: int = 8192
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    model_type: str = "llama"

    def __post_init__(self) -> None:
        for name in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
                     "num_key_value_heads", "head_dim", "max_position_embeddings"):  # fmt: skip
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise ConfigError(f"{name} is {value!r}; it must be an integer of at least 1")
        if self.num_attention_heads % self.num_key_value_heads:
            raise ConfigError(
                f"num_attention_heads is {self.num_attention_heads}, not a multiple of num_key_value_heads "
                f"{self.num_key_value_heads}"
            )
        if self.sliding_window is not None and (not isinstance(self.sliding_window, int) or self.sliding_window < 1):
            raise ConfigError(
                f"sliding_window is {self.sliding_window!r}; give an integer of at least 1, or null to see all keys"
            )
        wrong = [one for one in self.eos_token_ids if isinstance(one, bool) or not isinstance(one, int)]
        if wrong:
            raise ConfigError(f"eos_token_id has {wrong[0]!r}; give an integer or a list of integers, token ids")
        if self.head_dim % 2:
            raise ConfigError(f"head_dim is {self.head_dim}; rotary embeddings need an even number")

    @property
    def q_size(self) -> int:
        """Output width of the query projection."""
        return self.num_attention_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        """Output width of the key projection, and of the value projection."""
        return self.num_key_value_heads * self.head_dim

    def site_shape(self, site: str) -> tuple[int, int]:
        """Return ``(D, F)``, the input and output width of a site (``q`` ... ``down``, ``block``, ``prefix``)."""
        d, f, q, kv = self.hidden_size, self.intermediate_size, self.q_size, self.kv_size
        shapes = {"q": (d, q), "k": (d, kv), "v": (d, kv), "o": (q, d), "gate": (d, f), "up": (d, f), "down": (f, d),
                  "block": (d, d), "prefix": (kv, kv)}  # fmt: skip
        if site not in shapes:
            raise ConfigError(f"unknown site {site!r}{did_you_mean(site, shapes)}; allowed: {', '.join(shapes)}")
        return shapes[site]

    def num_params(self) -> int:
        """Number of weights, norms and biases included, tied embeddings counted once."""
        d = self.hidden_size
        linears = sum(i * o for i, o in map(self.site_shape, LINEAR_SITES))
        per_layer = linears + 2 * d
        per_layer += (self.q_size + 2 * self.kv_size) * self.qkv_bias + 2 * self.head_dim * self.qk_norm
        return self.num_hidden_layers * per_layer + d + self.vocab_size * d * (1 if self.tie_word_embeddings else 2)


_LLAMA3_ROPE = Llama3Rope(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=8192)

PRESETS: Mapping[str, ModelConfig] = {
    "tiny": ModelConfig(
        vocab_size=256, hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, rope_theta=10_000.0, tie_word_embeddings=True,
        max_position_embeddings=1024,
    ),
    "smollm2-135m": ModelConfig(
        vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
        num_key_value_heads=3, head_dim=64, rope_theta=100_000.0, tie_word_embeddings=True,
        max_position_embeddings=8192, bos_token_id=1, eos_token_ids=(2,),
    ),
    "qwen2.5-0.5b": ModelConfig(
        vocab_size=151936, hidden_size=896, intermediate_size=4864, num_hidden_layers=24, num_attention_heads=14,
        num_key_value_heads=2, head_dim=64, rope_theta=1_000_000.0, rms_norm_eps=1e-6, tie_word_embeddings=True,
        qkv_bias=True, max_position_embeddings=32768, eos_token_ids=(151643,), model_type="qwen2",
    ),
    "qwen3-8b": ModelConfig(
        vocab_size=151936, hidden_size=4096, intermediate_size=12288, num_hidden_layers=36, num_attention_heads=32,
        num_key_value_heads=8, head_dim=128, rope_theta=1_000_000.0, rms_norm_eps=1e-6, qk_norm=True,
        max_position_embeddings=40960, eos_token_ids=(151645,), model_type="qwen3",
    ),
    "llama3-8b": ModelConfig(
        vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
        num_key_value_heads=8, head_dim=128, rope_theta=500_000.0, rope_scaling=_LLAMA3_ROPE,
        max_position_embeddings=131072, bos_token_id=128000, eos_token_ids=(128001, 128008, 128009),
    ),
    "llama3-70b": ModelConfig(
        vocab_size=128256, hidden_size=8192, intermediate_size=28672, num_hidden_layers=80, num_attention_heads=64,
        num_key_value_heads=8, head_dim=128, rope_theta=500_000.0, rope_scaling=_LLAMA3_ROPE,
        max_position_embeddings=131072, bos_token_id=128000, eos_token_ids=(128001, 128008, 128009),
    ),
}  # fmt: skip
"""Shapes by name. ``load_model`` gives them random weights, except ``smollm2-135m``, which has real ones."""


def config_from_hf(hf: Mapping[str, Any]) -> ModelConfig:
    """Build a ``ModelConfig`` from the contents of a Hugging Face ``config.json``.

    Raises:
        ConfigError: for another family, a missing field, or an option whose computation is not implemented.
    """
    model_type = hf.get("model_type", "llama")
    record = family(model_type)
    record.check_hf(hf)
    theta, scaling = rope_from_hf(hf)
    eos = hf.get("eos_token_id")
    eos_ids = () if eos is None else tuple(eos) if isinstance(eos, list | tuple) else (eos,)
    try:
        heads = hf["num_attention_heads"]
        return ModelConfig(
            vocab_size=hf["vocab_size"],
            hidden_size=hf["hidden_size"],
            intermediate_size=hf["intermediate_size"],
            num_hidden_layers=hf["num_hidden_layers"],
            num_attention_heads=heads,
            num_key_value_heads=hf.get("num_key_value_heads") or heads,
            head_dim=hf.get("head_dim") or hf["hidden_size"] // heads,
            rope_theta=theta,
            rope_scaling=scaling,
            rms_norm_eps=float(hf.get("rms_norm_eps", 1e-6)),
            tie_word_embeddings=bool(hf.get("tie_word_embeddings", False)),
            **record.layer_options(hf),
            max_position_embeddings=hf.get("max_position_embeddings", 8192),
            bos_token_id=hf.get("bos_token_id"),
            eos_token_ids=eos_ids,
            model_type=model_type,
        )
    except KeyError as error:
        raise ConfigError(
            f"config.json lacks {error.args[0]!r}; is it a causal language model of this family?"
        ) from None


def config_to_hf(config: ModelConfig, dtype: str = "float32") -> dict[str, Any]:
    """Return the ``config.json`` that ``config_from_hf`` reads back to an equal config; ``dtype`` as torch names it."""
    record = family(config.model_type)
    omitted = ("rope_scaling", "eos_token_ids", *(name for name in LAYER_OPTIONS if name not in record.read))
    hf: dict[str, Any] = {
        field.name: getattr(config, field.name) for field in dataclasses.fields(config) if field.name not in omitted
    }
    hf["architectures"] = [record.architecture]
    hf["hidden_act"] = "silu"
    hf["attention_bias"] = False
    hf["dtype"] = dtype
    if config.eos_token_ids:
        hf["eos_token_id"] = list(config.eos_token_ids)
    if config.rope_scaling is not None:
        hf["rope_scaling"] = rope_to_hf(config.rope_scaling)
    return hf
