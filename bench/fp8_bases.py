"""Base models in FP8 as ``bench.quantization`` compares them: weights, what keeps keys and values, and the adapter."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from kernels.xla.fp8 import FP8, LARGEST_FP8, kept_as
from preft_jax.adapters.edits import PrefixKV
from preft_jax.config import ModelConfig
from preft_jax.models.attention import Attention, dense_attention
from preft_jax.models.forward import edits_of, rope_table
from preft_jax.models.layer import hidden
from preft_jax.models.linear import Quantized
from preft_jax.models.params import Params
from preft_jax.models.plain import PlainLayers
from preft_jax.shapes import LINEAR_SITES


class Base(NamedTuple):
    """Weights, what keys and values are kept in (None: the model's dtype), and the fold of an adapter, if any."""

    params: Params
    kv_dtype: str | None = None
    folded: Any = None


class KeptAttention(NamedTuple):
    """Attention to keys and values as a cache of a dtype keeps them."""

    attention: Attention
    dtype: str

    def attend(
        self, layer: int, q: jax.Array, k: jax.Array, v: jax.Array, window: int | None, prefix: PrefixKV | None = None
    ) -> jax.Array:
        """See ``Attention``."""
        k, v = (kept_as(x, self.dtype).astype(x.dtype) for x in (k, v))
        return self.attention.attend(layer, q, k, v, window, prefix)


def stream(
    config: ModelConfig, kv_dtype: str | None, params: Params, folded: Any, tokens_BS: jax.Array, edited: int
) -> jax.Array:
    """Return the normed stream ``[B, S, D]``; an adapter edits so many tokens of each row."""
    mask_BSG = jnp.zeros((*tokens_BS.shape, 2), bool).at[:, :edited, 0].set(folded is not None)
    edits = edits_of(config, folded, None if folded is None else mask_BSG)
    rope = rope_table(config, jnp.broadcast_to(jnp.arange(tokens_BS.shape[1]), tokens_BS.shape))
    attention: Attention = dense_attention(None, "xla")
    attention = attention if kv_dtype is None else KeptAttention(attention, kv_dtype)
    return hidden(PlainLayers(config, rope, attention, edits), params, tokens_BS)


@jax.jit
def _one_scale(weight_DF: jax.Array) -> Quantized:
    scale = jnp.max(jnp.abs(weight_DF)).astype(jnp.float32) / LARGEST_FP8
    return Quantized((weight_DF.T / scale).astype(FP8), jnp.full(weight_DF.shape[1], scale))


def tensor_wise(params: Params) -> Params:
    """Return canonical parameters with the layers' linears in FP8, each with one scale."""
    layers = [
        {name: _one_scale(leaf) if name in LINEAR_SITES else leaf for name, leaf in layer.items()}
        for layer in params["layers"]
    ]
    return {**params, "layers": layers}
