"""Stored layouts of the weights, as named transforms of the canonical tree.

The canonical tree (``preft_jax/models/modules.py``) has one ``[input, output]`` array for each linear. Serving reads
each weight once a step, so it fuses the linears that share an input (``qkv``, ``gate_up``), and can store them as
``[output, input]`` where the backend streams them better that way.
"""

import itertools

import jax
import jax.numpy as jnp

from preft_jax.models.linear import Transposed
from preft_jax.models.params import Params

FUSED = {"qkv": ("q", "k", "v"), "gate_up": ("gate", "up")}


def fused_layout(params: Params, *, transpose: bool, consume: bool = False) -> Params:
    """Return the serving tree: q, k, v fused to ``qkv``, gate and up to ``gate_up``, biases likewise.

    Args:
        params: the canonical tree. A serving tree comes back as it is.
        transpose: store linears as ``[output, input]``.
        consume: delete the linears of each layer once they are fused, so that the next layer's go where they were:
            else both trees are in memory, and the first leaves it in pieces. ``params`` cannot be used afterwards.
    """

    def stored(w_DF: jax.Array) -> jax.Array | Transposed:
        return Transposed(jnp.asarray(w_DF).T) if transpose else w_DF

    def one(layer: Params) -> Params:
        out = {name: value for name, value in layer.items() if name.endswith("norm")}
        for name, parts in FUSED.items():
            out[name] = stored(jnp.concatenate([layer[part] for part in parts], axis=1))
        for name in ("o", "down"):
            out[name] = stored(layer[name])
        if "q_bias" in layer:
            out["qkv_bias"] = jnp.concatenate([layer["q_bias"], layer["k_bias"], layer["v_bias"]])
        if consume:
            jax.block_until_ready(out)
            for name in (*itertools.chain(*FUSED.values()), *(("o", "down") if transpose else ())):
                if isinstance(layer[name], jax.Array):
                    layer[name].delete()
        return out

    if "qkv" in params["layers"][0]:
        return params
    fused = {**params, "layers": [one(layer) for layer in params["layers"]]}
    if "lm_head" in params:
        fused["lm_head"] = stored(params["lm_head"])
    return fused
