"""Writing rank pages to a bank, in place, as fast as memory copies."""

from collections.abc import Sequence

import jax

from kernels.triton.call import NO_FP8, call, ceil_div, require, rounds_to_fp8
from kernels.triton.device.pages import write_pages_kernel, write_scaled_pages_kernel
from kernels.xla.fp8 import FP8

MOST = 8
"""Slabs that one kernel writes."""


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
    layers, pages, d, r = a_LPDR.shape
    f, dtype = b_LPRF.shape[3], slabs[0].dtype
    require(len(slabs) <= MOST, f"slabs has {len(slabs)} arrays; it takes up to {MOST}")
    require(dtype != FP8 or rounds_to_fp8(), f"slabs have dtype {dtype}; {NO_FP8}")

    def words(elements: int) -> int:
        """Return the widths of a kernel: words of 32 bits, or numbers in FP8, whose scales lie at whole words."""
        size = elements * dtype.itemsize
        require(size % 4 == 0, f"{elements} elements of {dtype.itemsize} bytes are no whole number of 4 bytes")
        return size if dtype == FP8 else size // 4

    pools = a_LPDR, c_LPR, b_LPRF
    block = 4096
    a, c, b = call(
        write_scaled_pages_kernel if dtype == FP8 else write_pages_kernel,
        *slabs, *[slabs[0]] * (MOST - len(slabs)), page_SK, *pools,
        out=[jax.ShapeDtypeStruct(pool.shape, pool.dtype) for pool in pools],
        aliases={MOST + 1 + n: n for n in range(3)},
        grid=(ceil_div(words(r * (d + f)), block), layers, len(slabs)),
        warps=4,
        P=pages, WIDTH=words(slabs[0].shape[1]), AT=words(at), FIRST=row * len(slabs),
        A=words(r * d), B=words(r * f), R=r, BLOCK=block,
    )  # fmt: skip
    return a, c, b
