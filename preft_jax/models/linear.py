"""One type for a weight in any stored layout, and its products. Nobody else asks how a weight is stored.

A layer has one weight for each linear, or one for the linears that read the same input, side by side (``JOINED``).
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from preft_jax.models.params import AXES, Params


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Transposed:
    """A linear weight stored as ``[output, input]``."""

    w_FD: jax.Array


Weight = jax.Array | Transposed
"""A linear weight; an array is ``[input, output]``."""

JOINED: Mapping[tuple[str, ...], str] = {("q", "k", "v"): "qkv", ("gate", "up"): "gate_up"}
"""Linears that read the same input -> the name under which the serving layout has them side by side."""


def linear(x: jax.Array, weight: Weight, dtype: Any = None) -> jax.Array:
    """``x @ weight`` for ``x [..., D]`` and a weight in any layout; ``dtype`` of the result defaults to that of ``x``.

    Backends accumulate bfloat16 products in float32 whatever the result's dtype. Asking for a float32 result and
    rounding it afterwards would make a GPU write and read it once more.
    """
    return _product(x, weight, 0, dtype)


def linear_transpose(y: jax.Array, weight: Weight, dtype: Any = None) -> jax.Array:
    """``y @ weight.T`` for ``y [..., F]``: what goes back through a linear; ``dtype`` as in ``linear``."""
    return _product(y, weight, 1, dtype)


def _product(x: jax.Array, weight: Weight, axis: int, dtype: Any) -> jax.Array:
    """Multiply the last axis of ``x`` with the input (0) or the output (1) axis of a weight."""
    w, axis = (weight.w_FD, 1 - axis) if isinstance(weight, Transposed) else (weight, axis)
    contract = (((x.ndim - 1,), (axis,)), ((), ()))
    return jax.lax.dot_general(x, w, contract, preferred_element_type=dtype or x.dtype)


def stored(w_DF: jax.Array, *, transpose: bool) -> Weight:
    """Return a weight that is stored as ``[input, output]``, or as ``[output, input]``."""
    return Transposed(jnp.asarray(w_DF).T) if transpose else w_DF


def output_head(params: Params) -> Weight:
    """Return the weight of the output head: ``lm_head``, or the embeddings where they are tied."""
    return params["lm_head"] if "lm_head" in params else Transposed(params["embed"])


def logical_axes(params: Params) -> Params:
    """Return a tree of parameters' logical axes (``models/params.py``), of any layout: a tuple for each array."""

    def one(name: str, value: Any) -> Any:
        if isinstance(value, Transposed):
            return Transposed(AXES[name][::-1])  # type: ignore[arg-type]
        return AXES[name]

    outer = {name: one(name, value) for name, value in params.items() if name != "layers"}
    layers = [{name: one(name, value) for name, value in layer.items()} for layer in params["layers"]]
    return {**outer, "layers": layers}


def joined(w: Params, sites: tuple[str, ...]) -> bool:
    """Return whether a layer has these linears side by side in one weight, or is asked for one alone."""
    return len(sites) == 1 or JOINED[sites] in w


def project(w: Params, h: jax.Array, sites: tuple[str, ...]) -> jax.Array:
    """Return the outputs of ``joined`` linears that read ``h [..., D]``, side by side, biases included."""
    name = sites[0] if len(sites) == 1 else JOINED[sites]
    y = linear(h, w[name])
    return y + w[f"{name}_bias"] if f"{name}_bias" in w else y


def project_each(w: Params, h: jax.Array, sites: tuple[str, ...], widths: tuple[int, ...]) -> tuple[jax.Array, ...]:
    """Return the output of each linear, ``widths`` wide, of a layer in any layout."""
    if not joined(w, sites):
        return tuple(project(w, h, (site,)) for site in sites)
    ends = [sum(widths[: n + 1]) for n in range(len(widths) - 1)]
    return tuple(jnp.split(project(w, h, sites), ends, axis=-1)) if ends else (project(w, h, sites),)
