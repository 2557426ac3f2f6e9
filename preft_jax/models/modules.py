"""The Llama family as flax.nnx modules: they own the model's names and make its parameters (``models/params.py``)."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from preft_jax.config import ModelConfig
from preft_jax.device.mesh import Placement
from preft_jax.models.params import Params, ParamSpec, layer_specs, outer_specs
from preft_jax.models.shard import shard_config


def _made(spec: ParamSpec, dtype: jnp.dtype, rngs: nnx.Rngs, placement: Placement) -> nnx.Param:
    """Draw a parameter with standard deviation 0.02, in float32 and then cast: one seed is one model, rounded, in every
    dtype and on any devices, each of which draws its part. Norms begin with ones, biases with zeros.
    """
    sharding = placement.sharding(spec.shape, spec.axes)
    if spec.init == "normal":
        return nnx.Param((0.02 * _normal(rngs.params(), spec.shape, sharding)).astype(dtype))
    value = 1 if spec.init == "ones" else 0
    return nnx.Param(jnp.full(spec.shape, value, dtype, device=sharding))


def _normal(key: jax.Array, shape: tuple[int, ...], sharding: jax.sharding.NamedSharding | None) -> jax.Array:
    """Draw numbers where they are to lie; where that is changes none of them."""
    if sharding is None:
        return jax.random.normal(key, shape, jnp.float32)
    return _drawn(shape, sharding)(key)


@functools.cache
def _drawn(shape: tuple[int, ...], sharding: jax.sharding.NamedSharding) -> Any:
    return jax.jit(lambda key: jax.random.normal(key, shape, jnp.float32), out_shardings=sharding)


class Layer(nnx.Module):
    """One decoder layer: attention and a gated MLP, each after an RMS norm and added to the residual stream."""

    def __init__(self, config: ModelConfig, dtype: jnp.dtype, *, rngs: nnx.Rngs, placement: Placement):
        for name, spec in layer_specs(config).items():
            setattr(self, name, _made(spec, dtype, rngs, placement))


class Llama(nnx.Module):
    """A Llama-family causal language model.

    Calling it on ``tokens_BS`` (int32) returns ``logits_BSV`` (float32) of the plain base model.
    """

    def __init__(
        self, config: ModelConfig, *, dtype: Any = jnp.float32, rngs: nnx.Rngs, placement: Placement | None = None
    ):
        dtype, placement = jnp.dtype(dtype), placement or Placement.single()
        self.config = config
        specs = outer_specs(config)
        self.embed = _made(specs["embed"], dtype, rngs, placement)
        layers = range(config.num_hidden_layers)
        self.layers = nnx.List([Layer(config, dtype, rngs=rngs, placement=placement) for _ in layers])
        self.norm = _made(specs["norm"], dtype, rngs, placement)
        if "lm_head" in specs:
            self.lm_head = _made(specs["lm_head"], dtype, rngs, placement)

    def __call__(self, tokens_BS: jax.Array) -> jax.Array:
        """Return float32 ``logits_BSV``."""
        from preft_jax.models.forward import forward

        return forward(self.config, module_params(self), tokens_BS)


def module_params(module: Llama) -> Params:
    """Return a module's parameters as the plain tree that serving and training functions take (no copy)."""
    pure = nnx.to_pure_dict(nnx.state(module, nnx.Param))
    layers = pure.pop("layers")
    return {**pure, "layers": [layers[i] for i in range(len(layers))]}


def _init(key: jax.Array, config: ModelConfig, dtype: Any, placement: Placement | None = None) -> Params:
    return module_params(Llama(config, dtype=dtype, rngs=nnx.Rngs(params=key), placement=placement))


def init_params(
    config: ModelConfig, key: jax.Array, dtype: Any = jnp.float32, placement: Placement | None = None
) -> Params:
    """Return random weights (normal, standard deviation 0.02; norms one, biases zero).

    They are made on the default device, or each part of them on the device of a placement that has it.
    """
    shard_config(config, 1 if placement is None else placement.tensor)
    return _init(key, config, jnp.dtype(dtype), placement)


@functools.cache
def _abstract(config: ModelConfig, dtype: Any) -> Params:
    return jax.eval_shape(functools.partial(_init, config=config, dtype=dtype), jax.random.key(0))


def abstract_params(config: ModelConfig, dtype: Any = jnp.float32) -> Params:
    """Return the parameter tree of a config as ``jax.ShapeDtypeStruct`` leaves, without making any array."""
    return jax.tree.map(lambda leaf: leaf, _abstract(config, jnp.dtype(dtype)))
