"""Writing rank pages to a bank: slices updated one after the other."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp


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
    layers, _, d, r = a_LPDR.shape
    f = b_LPRF.shape[3]
    pools = a_LPDR, c_LPR, b_LPRF
    numbers = 4 // a_LPDR.dtype.itemsize
    for k, slab_LW in enumerate(slabs):
        own_LW = slab_LW[:, at : at + r * (d + f + numbers)]
        a, b, c = jnp.split(own_LW, (r * d, r * (d + f)), axis=1)
        shape = (layers, r, numbers) if numbers > 1 else (layers, r)
        c = jax.lax.bitcast_convert_type(c.reshape(shape), jnp.float32)
        new = a.reshape(layers, 1, d, r), c.reshape(layers, 1, r), b.reshape(layers, 1, r, f)
        # One slice after the other: a scatter of them all takes three times as long on a GPU.
        pools = [jax.lax.dynamic_update_slice_in_dim(p, x, page_SK[row, k], 1) for p, x in zip(pools, new, strict=True)]
    a_LPDR, c_LPR, b_LPRF = pools
    return a_LPDR, c_LPR, b_LPRF
