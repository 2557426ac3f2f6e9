"""Numbers in FP8: e4m3, that is four bits of exponent, three of mantissa and no infinity (arXiv 2209.05433)."""

from typing import Any

import jax
import jax.numpy as jnp

from kernels.types import Product, QuantizedRows, Unscaled

FP8 = jnp.float8_e4m3fn
LARGEST_FP8 = 448.0


def gpu_has_fp8() -> bool:
    """Return whether the backend is a GPU that multiplies FP8 and rounds to it: Ada, Hopper and later."""
    return jax.default_backend() == "gpu" and float(jax.local_devices()[0].compute_capability) >= 8.9


def quantize(x_TD: jax.Array) -> QuantizedRows:
    """See ``kernels.api.quantize``; any axes may lead ``x``."""
    wide = x_TD.astype(jnp.float32)
    scale_T = jnp.max(jnp.abs(wide), axis=-1) * (1 / LARGEST_FP8)
    scale_T = jnp.where(scale_T == 0, 1.0, scale_T)
    return QuantizedRows((wide / scale_T[..., None]).astype(FP8), scale_T)


def kept_as(x: jax.Array, dtype: Any) -> jax.Array:
    """Return numbers in the dtype of a KV pool; in FP8, without a scale, those beyond its range are its largest."""
    if jnp.dtype(dtype) == FP8:
        x = jnp.clip(x, -LARGEST_FP8, LARGEST_FP8)
    return x.astype(dtype)


def scaled(y: Product) -> jax.Array:
    """Return a product with its scales and bias, in its dtype."""
    if not isinstance(y, Unscaled):
        return y
    wide = y.y_TF.astype(jnp.float32) * y.row_T[..., None] * y.column_F
    return (wide if y.bias_F is None else wide + y.bias_F).astype(y.y_TF.dtype)
