"""Writing rank pages to a bank: slices updated one after the other."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kernels.xla.fp8 import FP8


def slab_width(d: int, f: int, rank: int, dtype: Any) -> int:
    """Return how many elements of a slab's row are one site's: A, B, and for each rank a float32, in FP8 three."""
    dtype = np.dtype(dtype)
    numbers = 3 if dtype == FP8 else 1
    return rank * (d + f) + numbers * rank * 4 // dtype.itemsize


def write_pages(
    a_LPDR: jax.Array,
    c_LPR: jax.Array,
    b_LPRF: jax.Array,
    slabs: Sequence[jax.Array],
    page_SK: jax.Array,
    *,
    row: int,
    at: int,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """See ``kernels.api.write_pages``."""
    pools = a_LPDR, c_LPR, b_LPRF
    _, _, d, r = a_LPDR.shape
    f = b_LPRF.shape[3]
    for k, slab_LW in enumerate(slabs):
        own_LW = slab_LW[:, at : at + slab_width(d, f, r, slab_LW.dtype)]
        new = [x[:, None].astype(pool.dtype) for x, pool in zip(_page(own_LW, d, r, f), pools, strict=True)]
        # One slice after the other: a scatter of them all takes three times as long on a GPU.
        pools = [jax.lax.dynamic_update_slice_in_dim(p, x, page_SK[row, k], 1) for p, x in zip(pools, new, strict=True)]
    a_LPDR, c_LPR, b_LPRF = pools
    return a_LPDR, c_LPR, b_LPRF


def _page(own_LW: jax.Array, d: int, r: int, f: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Return A, c and B of a page in all layers; A and B in FP8 are multiplied with their scales, in float32."""
    layers, size = len(own_LW), 4 // own_LW.dtype.itemsize
    a, b, bits = jnp.split(own_LW, (r * d, r * (d + f)), axis=1)
    a, b = a.reshape(layers, d, r), b.reshape(layers, r, f)
    shape = (layers, -1, size) if size > 1 else (layers, -1)
    numbers = jax.lax.bitcast_convert_type(bits.reshape(shape), jnp.float32)
    if own_LW.dtype != FP8:
        return a, numbers, b
    c, a_scale, b_scale = jnp.split(numbers, 3, axis=1)
    return a.astype(jnp.float32) * a_scale[:, None], c, b.astype(jnp.float32) * b_scale[..., None]
