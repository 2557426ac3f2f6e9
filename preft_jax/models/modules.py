"""The Llama family as flax.nnx modules: they own the model's names, shapes and initialisation.

Everything that is jitted or differentiated takes the plain tree that ``module_params`` makes of a module:

    {"embed" [V, D],
     "layers": [{"q" [D, H*C], "k", "v" [D, K*C], "o" [H*C, D], "gate", "up" [D, F], "down" [F, D],
                 "attn_norm", "mlp_norm" [D], ("q_bias", "k_bias", "v_bias"), ("q_norm", "k_norm" [C])}],
     "norm" [D], ("lm_head" [D, V])}

Linear weights are ``[input, output]``. Biases exist with ``qkv_bias`` (Qwen2.5), head norms with ``qk_norm`` (Qwen3),
and ``lm_head`` unless the embeddings are tied.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from preft_jax.config import ModelConfig
from preft_jax.models.params import Params
from preft_jax.shapes import LINEAR_SITES


def _linear_init(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    """Normal, standard deviation 0.02, drawn in float32 and then cast: one seed is one model, rounded, in every
    dtype.
    """
    return (0.02 * jax.random.normal(key, shape, jnp.float32)).astype(dtype)


class Layer(nnx.Module):
    """One decoder layer: attention and a gated MLP, each after an RMS norm and added to the residual stream."""

    def __init__(self, config: ModelConfig, dtype: jnp.dtype, *, rngs: nnx.Rngs):
        for site in LINEAR_SITES:
            setattr(self, site, nnx.Param(_linear_init(rngs.params(), config.site_shape(site), dtype)))
        self.attn_norm = nnx.Param(jnp.ones(config.hidden_size, dtype))
        self.mlp_norm = nnx.Param(jnp.ones(config.hidden_size, dtype))
        if config.qkv_bias:
            for site, size in (("q", config.q_size), ("k", config.kv_size), ("v", config.kv_size)):
                setattr(self, f"{site}_bias", nnx.Param(jnp.zeros(size, dtype)))
        if config.qk_norm:
            self.q_norm = nnx.Param(jnp.ones(config.head_dim, dtype))
            self.k_norm = nnx.Param(jnp.ones(config.head_dim, dtype))


class Llama(nnx.Module):
    """A Llama-family causal language model.

    Calling it on ``tokens_BS`` (int32) returns ``logits_BSV`` (float32) of the plain base model.
    """

    def __init__(self, config: ModelConfig, *, dtype: Any = jnp.float32, rngs: nnx.Rngs):
        dtype = jnp.dtype(dtype)
        self.config = config
        shape = (config.vocab_size, config.hidden_size)
        self.embed = nnx.Param(_linear_init(rngs.params(), shape, dtype))
        self.layers = nnx.List([Layer(config, dtype, rngs=rngs) for _ in range(config.num_hidden_layers)])
        self.norm = nnx.Param(jnp.ones(config.hidden_size, dtype))
        if not config.tie_word_embeddings:
            self.lm_head = nnx.Param(_linear_init(rngs.params(), shape[::-1], dtype))

    def __call__(self, tokens_BS: jax.Array) -> jax.Array:
        """Return float32 ``logits_BSV``."""
        from preft_jax.models.forward import train_forward

        return train_forward(self.config, module_params(self), tokens_BS)


def module_params(module: Llama) -> Params:
    """Return a module's parameters as the plain tree that serving and training functions take (no copy)."""
    pure = nnx.to_pure_dict(nnx.state(module, nnx.Param))
    layers = pure.pop("layers")
    return {**pure, "layers": [layers[i] for i in range(len(layers))]}


def _init(key: jax.Array, config: ModelConfig, dtype: Any) -> Params:
    return module_params(Llama(config, dtype=dtype, rngs=nnx.Rngs(params=key)))


def init_params(config: ModelConfig, key: jax.Array, dtype: Any = jnp.float32) -> Params:
    """Return random weights (normal, standard deviation 0.02; norms one, biases zero), made on the default device."""
    return _init(key, config, jnp.dtype(dtype))


@functools.cache
def _abstract(config: ModelConfig, dtype: Any) -> Params:
    return jax.eval_shape(functools.partial(_init, config=config, dtype=dtype), jax.random.key(0))


def abstract_params(config: ModelConfig, dtype: Any = jnp.float32) -> Params:
    """Return the parameter tree of a config as ``jax.ShapeDtypeStruct`` leaves, without making any array."""
    return jax.tree.map(lambda leaf: leaf, _abstract(config, jnp.dtype(dtype)))
