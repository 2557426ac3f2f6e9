"""What a family of models is: how its configs and weight files are read, and what its layers have.

Each family is a record in a file of its own in ``models/families``. Nothing else knows a family by name.
"""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

from preft_jax.errors import ConfigError, plain, shown
from preft_jax.models.compressed import check_compressed

HF_MODULES: Mapping[str, str] = {
    "q": "self_attn.q_proj",
    "k": "self_attn.k_proj",
    "v": "self_attn.v_proj",
    "o": "self_attn.o_proj",
    "gate": "mlp.gate_proj",
    "up": "mlp.up_proj",
    "down": "mlp.down_proj",
}
"""Each linear site's module path inside a Hugging Face layer."""

HF_NAMES: Mapping[str, str] = {
    "embed": "model.embed_tokens.weight",
    "norm": "model.norm.weight",
    "lm_head": "lm_head.weight",
    **{site: f"model.layers.{{}}.{module}.weight" for site, module in HF_MODULES.items()},
    "attn_norm": "model.layers.{}.input_layernorm.weight",
    "mlp_norm": "model.layers.{}.post_attention_layernorm.weight",
    **{f"{site}_bias": f"model.layers.{{}}.{HF_MODULES[site]}.bias" for site in ("q", "k", "v")},
    "q_norm": "model.layers.{}.self_attn.q_norm.weight",
    "k_norm": "model.layers.{}.self_attn.k_norm.weight",
}
"""Parameter name in our tree -> tensor name in a Hugging Face model."""

GGUF_NAMES: Mapping[str, str] = {
    "embed": "token_embd.weight",
    "norm": "output_norm.weight",
    "lm_head": "output.weight",
    "q": "blk.{}.attn_q.weight",
    "k": "blk.{}.attn_k.weight",
    "v": "blk.{}.attn_v.weight",
    "o": "blk.{}.attn_output.weight",
    "gate": "blk.{}.ffn_gate.weight",
    "up": "blk.{}.ffn_up.weight",
    "down": "blk.{}.ffn_down.weight",
    "attn_norm": "blk.{}.attn_norm.weight",
    "mlp_norm": "blk.{}.ffn_norm.weight",
    "q_bias": "blk.{}.attn_q.bias",
    "k_bias": "blk.{}.attn_k.bias",
    "v_bias": "blk.{}.attn_v.bias",
    "q_norm": "blk.{}.attn_q_norm.weight",
    "k_norm": "blk.{}.attn_k_norm.weight",
}
"""Parameter name in our tree -> tensor name in a GGUF file."""

MLP_BIAS = "mlp_bias true is not supported; only models without MLP biases are"
ATTENTION_BIAS = "attention_bias true is not supported for model_type {model_type!r}; only Qwen2's q/k/v is"
SLIDING_WINDOW = "use_sliding_window true is not supported; set it to false to attend to everything"
LLAMA_WINDOW = "sliding_window is not supported for model_type {model_type!r}, some tools apply it and others do not; \
set it to null to attend to everything, or model_type to 'mistral'"

REFUSED: Mapping[str, str] = {
    "mlp_bias": MLP_BIAS,
    "attention_bias": ATTENTION_BIAS,
    "use_sliding_window": SLIDING_WINDOW,
}
"""Fields of ``config.json`` that must not be set, for they change what is computed, and what is said of each."""

_CHANGES = re.compile(
    r"rope|rotary|alibi|nope|softcap|multiplier|scalar|_scal(e|ing|ed)$|^scale|experts?(_|$)|moe|(^|_)bias$|qk_?(layer_?)?norm"
    r"|quantization|compression|sliding|window|attention_chunk|sinks?(_|$)|clip|lora_rank|parallel_(attn|residual)|mup"
    r"|shared|hidden_activation|norm_type|bidirectional"
)
"""Names of fields that change what some model computes, as they are found in configs."""

_FACTOR = re.compile(r"multiplier|scal|factor")
"""Names of fields whose value 1 changes nothing."""

_READ = ("rope_theta", "rope_scaling", "rope_parameters", "partial_rotary_factor", "max_window_layers",
         "attention_bias", "sliding_window", "quantization_config")  # fmt: skip
"""Those that are read, or that change nothing unless another field says so."""

LAYER_OPTIONS = ("qkv_bias", "qk_norm", "sliding_window")
"""Fields of ``ModelConfig`` that say what a family's layers have."""


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Family:
    """A family of models.

    Attributes:
        model_type: as ``config.json`` names it.
        architecture: the class that ``config.json`` names.
        qkv_bias: have q, k and v biases?
        qk_norm: are the heads of q and k normed?
        read: options of layers that ``config.json`` says -> what holds where it is silent.
        refused: fields of ``config.json`` that must not be set -> the error, which may name ``{model_type}``.
        hf_names: parameter name in our tree -> tensor name in safetensors.
        gguf_architecture: name in a GGUF file; None where there are none of this family.
        gguf_names: parameter name in our tree -> tensor name in a GGUF file.
        gguf_permuted: are the rows of q and k in GGUF files ordered by rotary pairs instead of halves?
    """

    model_type: str
    architecture: str
    qkv_bias: bool = False
    qk_norm: bool = False
    read: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    refused: Mapping[str, str] = dataclasses.field(default_factory=lambda: REFUSED)
    hf_names: Mapping[str, str] = dataclasses.field(default_factory=lambda: HF_NAMES)
    gguf_architecture: str | None
    gguf_names: Mapping[str, str] = dataclasses.field(default_factory=lambda: GGUF_NAMES)
    gguf_permuted: bool = False

    def check_hf(self, hf: Mapping[str, Any]) -> None:
        """Raise ``ConfigError`` for fields of a ``config.json`` that change the computation and are not computed."""
        for field in ("hidden_act", "activation_function"):
            if hf.get(field, "silu") != "silu":
                raise ConfigError(f"{field} {shown(hf[field])} is not supported; allowed: 'silu'")
        for field, message in self.refused.items():
            if hf.get(field):
                raise ConfigError(message.format(model_type=self.model_type))
        if hf.get("quantization_config"):
            check_compressed(hf["quantization_config"])
        for field, value in hf.items():
            neutral = not value or (value == 1 and value is not True and _FACTOR.search(field) is not None)
            if not neutral and _CHANGES.search(field) and field not in (*_READ, *self.refused):
                raise ConfigError(
                    f"{plain(field)} is {shown(value)}, which may change what the model computes and is not known for "
                    f"model_type {self.model_type!r}; remove the field if it changes nothing"
                )
        for field in ("is_causal", "causal"):
            if hf.get(field) is False:
                raise ConfigError(f"{field} false is not supported; a token attends to itself and earlier ones")
        if hf.get("scale_attn_weights") is False:
            raise ConfigError("scale_attn_weights false is not supported; scores are divided by sqrt(head_dim)")
        if hf.get("norm_eps") not in (None, hf.get("rms_norm_eps")):
            raise ConfigError(
                f"norm_eps is {shown(hf['norm_eps'])} and rms_norm_eps is {shown(hf.get('rms_norm_eps'))}; this family "
                "reads rms_norm_eps: give it the value, and remove norm_eps"
            )
        self._check_layer_types(hf)

    def _check_layer_types(self, hf: Mapping[str, Any]) -> None:
        """Raise ``ConfigError`` unless all layers attend alike, as the options say."""
        types = hf.get("layer_types") or ()
        allowed = "sliding_attention" if self.layer_options(hf).get("sliding_window") else "full_attention"
        if not isinstance(types, list | tuple) or any(kind != allowed for kind in types):
            raise ConfigError(
                f"layer_types is {shown(types)}; only models whose layers all have {allowed!r} are supported here"
            )

    def layer_options(self, hf: Mapping[str, Any]) -> dict[str, Any]:
        """Return the fields of a ``ModelConfig`` that say what the layers of a model with this ``config.json`` have."""
        read = {name: hf.get(name, silent) for name, silent in self.read.items()}
        return {"qkv_bias": self.qkv_bias, "qk_norm": self.qk_norm, **read}
