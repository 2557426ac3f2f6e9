"""A layer of the model: the one definition, over a set of operations.

Sets of operations: ``FusedLayers`` (``models/fused.py``: what lies between two matrix products is one kernel) and
``PlainLayers`` (``models/plain.py``: plain JAX on every backend, differentiable with dense attention). A set says how
residual streams, inputs and outputs of linears look between its operations; the layer only hands them on.
"""

from collections.abc import Callable
from typing import Any, Literal, Protocol

import jax

from preft_jax.config import ModelConfig
from preft_jax.models.params import Params

QKV = ("q", "k", "v")
GATE_UP = ("gate", "up")

SAVED = "matmul"
"""Name of what is kept with ``remat="cheap"``."""

Remat = Literal["none", "cheap", "full"]
"""What a backward pass computes again: nothing; norms, rotations, attention and activations, but no matrix product with
a weight; or whole layers."""

_POLICIES = {
    "cheap": jax.checkpoint_policies.save_only_these_names(SAVED),
    "full": jax.checkpoint_policies.nothing_saveable,
}


class Layers(Protocol):
    """The operations that layers are made of, on one batch.

    ``layer`` is a layer's number, ``w`` its weights. Every operation applies the edits of its sites.
    """

    def begin(self, embed_VD: jax.Array, tokens: jax.Array) -> Any:
        """Return the residual stream of tokens."""
        ...

    def norm(self, layer: int, w: Params, name: str, stream: Any, sites: tuple[str, ...]) -> tuple[Any, Any]:
        """Return the stream, and its RMS norm by the weight ``name`` as the linears ``sites`` read it."""
        ...

    def project(self, layer: int, w: Params, h: Any, sites: tuple[str, ...]) -> Any:
        """Return the outputs of linears that read the same ``h``."""
        ...

    def attend(self, layer: int, w: Params, qkv: Any) -> Any:
        """Norm the heads of q and k (where the model does), rotate them, keep keys and values, attend.

        Returns what ``o`` reads.
        """
        ...

    def gate(self, layer: int, w: Params, gate_up: Any) -> Any:
        """Return ``silu(gate) * up`` as ``down`` reads it."""
        ...

    def add(self, layer: int, w: Params, stream: Any, h: Any, site: str) -> Any:
        """Return the stream with the output of linear ``site`` added, which reads ``h``."""
        ...

    def end(self, layer: int, stream: Any) -> Any:
        """Return the stream with the edits of ``block`` added: a layer's last operation."""
        ...

    def final_norm(self, weight_D: jax.Array, stream: Any) -> jax.Array:
        """Return the normed stream ``[..., D]`` that the output head reads."""
        ...


def decoder_layer(layers: Layers, layer: int, w: Params, stream: Any) -> Any:
    """Run one layer on a residual stream and return it: attention, then a gated MLP, each behind a norm."""
    with jax.named_scope("attention"):
        stream, h = layers.norm(layer, w, "attn_norm", stream, QKV)
        mixed = layers.attend(layer, w, layers.project(layer, w, h, QKV))
        stream = layers.add(layer, w, stream, mixed, "o")
    with jax.named_scope("mlp"):
        stream, h = layers.norm(layer, w, "mlp_norm", stream, GATE_UP)
        h = layers.gate(layer, w, layers.project(layer, w, h, GATE_UP))
        stream = layers.add(layer, w, stream, h, "down")
        return layers.end(layer, stream)


def hidden(layers: Layers, params: Params, tokens: jax.Array, *, remat: Remat = "none") -> jax.Array:
    """Run all layers on tokens and return the normed stream ``[..., D]`` behind the last one.

    Args:
        layers: the operations, on this batch.
        params: canonical or serving layout.
        tokens: int32, with any leading axes that ``layers`` takes.
        remat: what a backward pass computes again instead of finding it in memory, see ``Remat``.
    """
    stream = layers.begin(params["embed"], tokens)
    for i, w in enumerate(params["layers"]):

        def layer(stream: Any, w: Params = w, i: int = i) -> Any:
            return decoder_layer(layers, i, w, stream)

        stream = checkpointed(layer, remat)(stream)
    return layers.final_norm(params["norm"], stream)


def checkpointed[**P, T](function: Callable[P, T], remat: Remat) -> Callable[P, T]:
    """Return a function of layers whose backward pass computes again what ``remat`` says."""
    return function if remat == "none" else jax.checkpoint(function, policy=_POLICIES[remat])


def head_norms(config: ModelConfig, w: Params) -> dict[str, Any]:
    """Return the arguments of kernels that norm the heads of q and k, of a layer with weights ``w``."""
    return {"q_norm_C": w["q_norm"], "k_norm_C": w["k_norm"], "eps": config.rms_norm_eps} if config.qk_norm else {}
