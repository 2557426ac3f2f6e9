"""Stored layouts of the weights, as named transforms of the canonical tree.

The canonical tree (``preft_jax/models/modules.py``) has one ``[input, output]`` array for each linear. Serving reads
each weight once a step, so it fuses the linears that share an input (``qkv``, ``gate_up``), and can store them as
``[output, input]`` where the backend streams them better that way.
"""

import functools
import itertools
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from preft_jax.errors import ConfigError
from preft_jax.models.linear import JOINED, Quantized, Weight, side_by_side, stored
from preft_jax.models.params import Params


def fused_layout(params: Params, *, transpose: bool, consume: bool = False, shards: int = 1) -> Params:
    """Return the serving tree: q, k, v fused to ``qkv``, gate and up to ``gate_up``, biases likewise.

    Args:
        params: the canonical tree. A serving tree comes back as it is.
        transpose: store linears as ``[output, input]``; those in FP8 are in any case.
        consume: delete the linears of each layer once they are fused, so that the next layer's go where they were:
            else both trees are in memory, and the first leaves it in pieces. ``params`` cannot be used afterwards.
        shards: devices that the fused linears will be cut over. The heads of q, k and v that belong together (a KV
            group), and the channels of gate and up, then stand shard by shard, so that an equal cut gives every device
            the fused linear of its own heads and channels.

    Raises:
        ConfigError: a linear cannot be cut into so many equal parts, or is in FP8 and one to be fused with it is not.
    """
    join = functools.partial(_join, shards=shards)

    def as_asked(weight: jax.Array | Quantized) -> Weight:
        return stored(weight, transpose=transpose)

    def one(layer: Params) -> Params:
        out = {name: value for name, value in layer.items() if name.endswith("norm")}
        for parts, name in JOINED.items():
            out[name] = as_asked(side_by_side([layer[part] for part in parts], join))
            if f"{parts[0]}_bias" in layer:
                out[f"{name}_bias"] = join([layer[f"{part}_bias"] for part in parts], 0)
        for name in ("o", "down"):
            out[name] = as_asked(layer[name])
        if consume:
            jax.block_until_ready(out)
            kept = {id(leaf) for leaf in jax.tree.leaves(out)}
            for leaf in jax.tree.leaves([layer[name] for name in (*itertools.chain(*JOINED), "o", "down")]):
                if isinstance(leaf, jax.Array) and id(leaf) not in kept:
                    leaf.delete()
        return out

    if "qkv" in params["layers"][0]:
        return params
    fused = {**params, "layers": [one(layer) for layer in params["layers"]]}
    if "lm_head" in params:
        fused["lm_head"] = as_asked(params["lm_head"])
    return fused


def _join(parts: Sequence[jax.Array], axis: int, shards: int) -> jax.Array:
    """Join arrays on an axis: of each shard its part of every array, one shard after the other."""
    for part in parts:
        if part.shape[axis] % shards:
            raise ConfigError(f"a linear of width {part.shape[axis]} cannot be cut into {shards} equal parts")
    if shards == 1:
        return jnp.concatenate(parts, axis)
    # Parts that are cut over devices along this axis stay where they are: no device sees another's.
    cut = [part.reshape(*part.shape[:axis], shards, -1, *part.shape[axis + 1 :]) for part in parts]
    joined = jnp.concatenate(cut, axis + 1)
    return joined.reshape(*joined.shape[:axis], -1, *joined.shape[axis + 2 :])
