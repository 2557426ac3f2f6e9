"""The parameters of a model: what each is called, its shape, its axes and how it is drawn. Said once, here.

Everything that is jitted or differentiated takes them as a plain tree:

    {"embed" [V, D],
     "layers": [{"q" [D, H*C], "k", "v" [D, K*C], "o" [H*C, D], "gate", "up" [D, F], "down" [F, D],
                 "attn_norm", "mlp_norm" [D], ("q_bias", "k_bias", "v_bias"), ("q_norm", "k_norm" [C])}],
     "norm" [D], ("lm_head" [D, V])}

Linear weights are ``[input, output]``. Biases exist with ``qkv_bias`` (Qwen2.5), head norms with ``qk_norm`` (Qwen3),
and ``lm_head`` unless the embeddings are tied. The serving layout (``models/layout.py``) has linears that read the same
input side by side: ``qkv`` and ``gate_up``.
"""

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

from preft_jax.config import ModelConfig
from preft_jax.shapes import LINEAR_SITES

Params = dict[str, Any]
"""The plain tree of parameters that jitted and differentiated functions take."""

AXES: Mapping[str, tuple[str, ...]] = {
    "embed": ("vocab", "hidden"),
    "lm_head": ("hidden", "vocab"),
    "norm": ("hidden",),
    "attn_norm": ("hidden",),
    "mlp_norm": ("hidden",),
    "q": ("hidden", "heads"),
    "k": ("hidden", "kv_heads"),
    "v": ("hidden", "kv_heads"),
    "o": ("heads", "hidden"),
    "gate": ("hidden", "mlp"),
    "up": ("hidden", "mlp"),
    "down": ("mlp", "hidden"),
    "q_bias": ("heads",),
    "k_bias": ("kv_heads",),
    "v_bias": ("kv_heads",),
    "q_norm": ("head",),
    "k_norm": ("head",),
    "qkv": ("hidden", "qkv"),
    "gate_up": ("hidden", "mlp"),
    "qkv_bias": ("qkv",),
}
"""The logical axes of each parameter, of the serving layout's too; ``device/mesh.py`` maps them to devices."""


class ParamSpec(NamedTuple):
    """A parameter: its shape, its logical axes, and whether it is drawn (normal) or begins with ones or zeros."""

    shape: tuple[int, ...]
    axes: tuple[str, ...]
    init: Literal["normal", "ones", "zeros"]


def _spec(name: str, shape: tuple[int, ...], init: Literal["normal", "ones", "zeros"]) -> ParamSpec:
    return ParamSpec(shape, AXES[name], init)


def layer_specs(config: ModelConfig) -> dict[str, ParamSpec]:
    """Return the parameters of a layer, in the order in which they are drawn."""
    specs = {site: _spec(site, config.site_shape(site), "normal") for site in LINEAR_SITES}
    specs |= {name: _spec(name, (config.hidden_size,), "ones") for name in ("attn_norm", "mlp_norm")}
    if config.qkv_bias:
        widths = {"q_bias": config.q_size, "k_bias": config.kv_size, "v_bias": config.kv_size}
        specs |= {name: _spec(name, (width,), "zeros") for name, width in widths.items()}
    if config.qk_norm:
        specs |= {name: _spec(name, (config.head_dim,), "ones") for name in ("q_norm", "k_norm")}
    return specs


def outer_specs(config: ModelConfig) -> dict[str, ParamSpec]:
    """Return the parameters around the layers."""
    specs = {
        "embed": _spec("embed", (config.vocab_size, config.hidden_size), "normal"),
        "norm": _spec("norm", (config.hidden_size,), "ones"),
    }
    if not config.tie_word_embeddings:
        specs["lm_head"] = _spec("lm_head", (config.hidden_size, config.vocab_size), "normal")
    return specs
