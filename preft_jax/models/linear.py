"""One type for a weight in any stored layout, and its products. Nobody else asks how a weight is stored.

A layer has one weight for each linear, or one for the linears that read the same input, side by side (``JOINED``).
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from kernels.types import QuantizedRows, Unscaled
from kernels.xla.fp8 import gpu_has_fp8, quantize, scaled
from preft_jax.errors import ConfigError
from preft_jax.models.params import AXES, Params


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Transposed:
    """A linear weight stored as ``[output, input]``."""

    w_FD: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Quantized:
    """A linear weight in FP8: ``w_FD * scale_F[:, None]``, stored as ``[output, input]`` in every layout.

    Attributes:
        w_FD: float8_e4m3fn. Matrix units multiply FP8 best where both operands have the summed axis last.
        scale_F: float32, one for each output.
    """

    w_FD: Any
    scale_F: Any


Weight = jax.Array | Transposed | Quantized
"""A linear weight; an array is ``[input, output]``."""

JOINED: Mapping[tuple[str, ...], str] = {("q", "k", "v"): "qkv", ("gate", "up"): "gate_up"}
"""Linears that read the same input -> the name under which the serving layout has them side by side."""


def linear(x: jax.Array, weight: Weight, dtype: Any = None) -> jax.Array:
    """``x @ weight`` for ``x [..., D]`` and a weight in any layout; ``dtype`` of the result defaults to that of ``x``.

    Backends accumulate bfloat16 products in float32 whatever the result's dtype. Asking for a float32 result and
    rounding it afterwards would make a GPU write and read it once more.

    An FP8 weight is multiplied with ``x`` in FP8, each of whose rows has a float32 scale of its own. What goes back
    through it is that of the product with the dequantised weight, and a weight in FP8 has no gradient.
    """
    if isinstance(weight, Quantized):
        return _fp8_product(x, weight, jnp.dtype(dtype or x.dtype))
    return _product(x, weight, 0, dtype)


def linear_transpose(y: jax.Array, weight: Weight, dtype: Any = None) -> jax.Array:
    """``y @ weight.T`` for ``y [..., F]``: what goes back through a linear; ``dtype`` as in ``linear``."""
    return _product(y, Transposed(dequantized(weight, y.dtype)) if isinstance(weight, Quantized) else weight, 1, dtype)


def _product(x: jax.Array, weight: jax.Array | Transposed, axis: int, dtype: Any) -> jax.Array:
    """Multiply the last axis of ``x`` with the input (0) or the output (1) axis of a weight."""
    w, axis = (weight.w_FD, 1 - axis) if isinstance(weight, Transposed) else (weight, axis)
    contract = (((x.ndim - 1,), (axis,)), ((), ()))
    return jax.lax.dot_general(x, w, contract, preferred_element_type=dtype or x.dtype)


def multiplies_fp8(w: Params, sites: tuple[str, ...], dtype: Any) -> bool:
    """Return whether ``joined`` linears multiply in FP8 and may leave scales to what reads their outputs in ``dtype``.

    Not where the backend takes FP8 numbers in another dtype.
    """
    in_range = jnp.dtype(dtype) in (jnp.bfloat16, jnp.float32)
    return isinstance(w[name_of(sites)], Quantized) and in_range and gpu_has_fp8()


def unscaled_product(x: QuantizedRows, weight: Quantized, dtype: Any, bias_F: jax.Array | None = None) -> Unscaled:
    """Multiply rows in FP8 with a weight in FP8; what reads the product applies the scales and adds the bias."""
    contract = (((x.x_TD.ndim - 1,), (1,)), ((), ()))
    y = jax.lax.dot_general(x.x_TD, weight.w_FD, contract, preferred_element_type=dtype)
    return Unscaled(y, x.scale_T, weight.scale_F, None if bias_F is None else bias_F.astype(jnp.float32))


def quantized(weight: jax.Array | Transposed) -> Quantized:
    """Return a weight in FP8, each output with its own scale."""
    return Quantized(*quantize(weight.w_FD if isinstance(weight, Transposed) else weight.T))


def dequantized(weight: Quantized, dtype: Any) -> jax.Array:
    """Return the numbers that an FP8 weight stands for, ``[output, input]``, rounded to ``dtype`` once."""
    return (weight.w_FD.astype(jnp.float32) * weight.scale_F[:, None]).astype(dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _fp8_product(x: jax.Array, weight: Quantized, dtype: jnp.dtype) -> jax.Array:
    rows = quantize(x)
    if not gpu_has_fp8():
        # These have no product of FP8. Every FP8 number is one of the dtype's, so the products are the same.
        rows = rows._replace(x_TD=rows.x_TD.astype(x.dtype))
        weight = dataclasses.replace(weight, w_FD=weight.w_FD.astype(x.dtype))
    # Before its scales, a product is out of float16's range. As in ``linear``, no wider than the result otherwise.
    wide = dtype if dtype == jnp.bfloat16 else jnp.float32
    return scaled(unscaled_product(rows, weight, wide)).astype(dtype)


def _fp8_forward(x: jax.Array, weight: Quantized, dtype: jnp.dtype) -> tuple[jax.Array, Any]:
    return _fp8_product(x, weight, dtype), (weight, jnp.zeros((), x.dtype))


def _fp8_backward(dtype: jnp.dtype, kept: Any, dy: jax.Array) -> tuple[jax.Array, None]:
    weight, like = kept
    return linear_transpose(dy.astype(like.dtype), weight), None


_fp8_product.defvjp(_fp8_forward, _fp8_backward)


def stored(weight: jax.Array | Quantized, *, transpose: bool) -> Weight:
    """Return a weight that is stored as ``[input, output]``, or as ``[output, input]``; one in FP8 stays as it is."""
    if isinstance(weight, Quantized) or not transpose:
        return weight
    return Transposed(jnp.asarray(weight).T)


def side_by_side(parts: Sequence[Any], join: Callable[[Sequence[jax.Array], int], jax.Array]) -> Any:
    """Join the outputs of weights ``[input, output]`` or in FP8: ``join(arrays, axis)`` joins arrays on an axis.

    Raises:
        ConfigError: some are in FP8 and some are not.
    """
    number = sum(isinstance(part, Quantized) for part in parts)
    if not number:
        return join(parts, 1)
    if number < len(parts):
        raise ConfigError(
            f"{number} of {len(parts)} linears that read the same input are in FP8; all of them must be, or "
            "none, as they are joined"
        )
    return Quantized(join([part.w_FD for part in parts], 0), join([part.scale_F for part in parts], 0))


def output_head(params: Params) -> Weight:
    """Return the weight of the output head: ``lm_head``, or the embeddings where they are tied."""
    return params["lm_head"] if "lm_head" in params else Transposed(params["embed"])


def logical_axes(params: Params) -> Params:
    """Return a tree of parameters' logical axes (``models/params.py``), of any layout: a tuple for each array."""

    def one(name: str, value: Any) -> Any:
        if isinstance(value, Transposed):
            return Transposed(AXES[name][::-1])  # type: ignore[arg-type]
        if isinstance(value, Quantized):
            return Quantized(AXES[name][::-1], AXES[name][1:])  # type: ignore[arg-type]
        return AXES[name]

    outer = {name: one(name, value) for name, value in params.items() if name != "layers"}
    layers = [{name: one(name, value) for name, value in layer.items()} for layer in params["layers"]]
    return {**outer, "layers": layers}


def joined(w: Params, sites: tuple[str, ...]) -> bool:
    """Return whether a layer has these linears side by side in one weight, or is asked for one alone."""
    return len(sites) == 1 or JOINED[sites] in w


def name_of(sites: tuple[str, ...]) -> str:
    """Return the name of the weight that has one linear, or ``joined`` linears side by side."""
    return sites[0] if len(sites) == 1 else JOINED[sites]


def project(w: Params, h: jax.Array, sites: tuple[str, ...]) -> jax.Array:
    """Return the outputs of ``joined`` linears that read ``h [..., D]``, side by side, biases included."""
    name = name_of(sites)
    y = linear(h, w[name])
    return y + w[f"{name}_bias"] if f"{name}_bias" in w else y


def project_each(w: Params, h: jax.Array, sites: tuple[str, ...], widths: tuple[int, ...]) -> tuple[jax.Array, ...]:
    """Return the output of each linear, ``widths`` wide, of a layer in any layout."""
    if not joined(w, sites):
        return tuple(project(w, h, (site,)) for site in sites)
    ends = [sum(widths[: n + 1]) for n in range(len(widths) - 1)]
    return tuple(jnp.split(project(w, h, sites), ends, axis=-1)) if ends else (project(w, h, sites),)
