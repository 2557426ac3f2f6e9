"""The Llama family as flax.nnx modules: they own the model's names and make its parameters (``models/params.py``)."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from preft_jax.config import ModelConfig
from preft_jax.models.params import Params, ParamSpec, layer_specs, outer_specs


def _made(spec: ParamSpec, dtype: jnp.dtype, rngs: nnx.Rngs) -> nnx.Param:
    """Draw a parameter with standard deviation 0.02, in float32 and then cast: one seed is one model, rounded, in every
    dtype. Norms begin with ones, biases with zeros.
    """
    if spec.init == "normal":
        drawn = 0.02 * jax.random.normal(rngs.params(), spec.shape, jnp.float32)
        return nnx.Param(drawn.astype(dtype))
    return nnx.Param(jnp.ones(spec.shape, dtype) if spec.init == "ones" else jnp.zeros(spec.shape, dtype))


class Layer(nnx.Module):
    """One decoder layer: attention and a gated MLP, each after an RMS norm and added to the residual stream."""

    def __init__(self, config: ModelConfig, dtype: jnp.dtype, *, rngs: nnx.Rngs):
        for name, spec in layer_specs(config).items():
            setattr(self, name, _made(spec, dtype, rngs))


class Llama(nnx.Module):
    """A Llama-family causal language model.

    Calling it on ``tokens_BS`` (int32) returns ``logits_BSV`` (float32) of the plain base model.
    """

    def __init__(self, config: ModelConfig, *, dtype: Any = jnp.float32, rngs: nnx.Rngs):
        dtype = jnp.dtype(dtype)
        self.config = config
        specs = outer_specs(config)
        self.embed = _made(specs["embed"], dtype, rngs)
        self.layers = nnx.List([Layer(config, dtype, rngs=rngs) for _ in range(config.num_hidden_layers)])
        self.norm = _made(specs["norm"], dtype, rngs)
        if "lm_head" in specs:
            self.lm_head = _made(specs["lm_head"], dtype, rngs)

    def __call__(self, tokens_BS: jax.Array) -> jax.Array:
        """Return float32 ``logits_BSV``."""
        from preft_jax.models.forward import forward

        return forward(self.config, module_params(self), tokens_BS)


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
