"""The edit of a decode step: each row reads its own adapter, so the bytes of A and B are the whole cost.

Linears that read the same rows (q, k and v; gate and up) share a launch. With many rows of one page each a program
takes a whole row of one of them. Otherwise the widths are split over programs, so that few rows fill the GPU too, and a
second kernel adds the parts of the first up in order.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp

from kernels.triton.call import block_of, call, check_dtype, power_of_two, require
from kernels.triton.device.decode import edit_row_kernel, expand_row_kernel, shrink_row_kernel
from kernels.types import PagePool

LINEARS = 3
"""Linears of one launch, those of q, k and v."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """How rows are cut up.

    With 256 columns of A or B for each warp a thread holds all it reads in registers, 16 loads of 16 bytes in flight,
    and sums B up without asking its neighbours.

    Attributes:
        whole: one program takes a row from end to end; else its widths are split over programs of two kernels.
        shrink: columns of x that are read at once, a power of two.
        expand: columns of y.
    """

    whole: bool
    shrink: int
    expand: int

    def warps(self, columns: int) -> int:
        """Return the warps for ``columns`` at once."""
        return max(1, columns // 256)


def config_for(batch: int, sites: int, width_in: int, width_out: int, entries: int) -> Config:
    """Return the configuration: whole rows save a launch, but need programs enough for every multiprocessor.

    ``width_out``: what divides the widths of all linears.
    """
    whole = entries == 1 and batch * sites >= 200
    return Config(
        whole=whole,
        shrink=block_of(width_in, 1024, "the width of x_BD"),
        expand=block_of(width_out, 2048 if whole else 512, "the width of y_BF"),
    )


def decode_edit(
    x_BD: jax.Array,
    y_BF: jax.Array,
    pools: tuple[PagePool, ...],
    pages: tuple[jax.Array, ...],
    *,
    columns: tuple[int, ...],
    config: Config | None = None,
) -> jax.Array:
    """See ``kernels.api.decode_edit``. ``config`` is chosen by the shapes if None. ``y_BF`` is edited in place."""
    check_dtype("x_BD", x_BD)
    check_dtype("y_BF", y_BF)
    require(len(pools) <= LINEARS, f"pools has {len(pools)} linears; a launch takes up to {LINEARS}")
    (batch, width_in), width = x_BD.shape, y_BF.shape[1]
    sites, widths = len(pools), [pool.b_PRF.shape[2] for pool in pools]
    entries = [page_BE.shape[1] for page_BE in pages]
    config = config or config_for(batch, sites, width_in, math.gcd(*widths), max(entries))
    for name, size, divided in (("shrink", config.shrink, [width_in]), ("expand", config.expand, widths)):
        require(all(n % size == 0 for n in divided), f"{name} is {size}, which does not divide {divided}")
    # A launch has arguments for as many linears; what stands for those that are not there is not read.
    spare = LINEARS - sites
    pools += pools[:1] * spare
    pages = tuple(jnp.asarray(page_BE, jnp.int32) for page_BE in (*pages, *[pages[0]] * spare))
    out = jax.ShapeDtypeStruct(y_BF.shape, y_BF.dtype)
    static = {
        f"{name}{n}": value
        for name, values in (("F", widths), ("COLUMN", columns))
        for n, value in enumerate([*values, *[values[0]] * spare])
    }
    if config.whole:
        require(max(entries) == 1, f"pages list {max(entries)} pages a row; whole rows take one")
        arrays = [array for pool, page_BE in zip(pools, pages, strict=True) for array in (*pool, page_BE)]
        (edited,) = call(
            edit_row_kernel, x_BD, y_BF, *arrays, out=[out], grid=(batch, sites), aliases={1: 0},
            warps=config.warps(max(config.shrink, config.expand)),
            D=width_in, WIDTH=width, BD=config.shrink, BF=config.expand, **static,
        )  # fmt: skip
        return edited
    static |= {f"E{n}": count for n, count in enumerate([*entries, *[entries[0]] * spare])}
    parts = width_in // config.shrink
    arrays = [array for pool, page_BE in zip(pools, pages, strict=True) for array in (pool.a_PDR, page_BE)]
    (s_parts,) = call(
        shrink_row_kernel, x_BD, *arrays,
        out=[jax.ShapeDtypeStruct((parts * batch * sum(entries) * 16,), jnp.float32)],
        grid=(batch, parts, sites), warps=config.warps(config.shrink),
        B=batch, D=width_in, PARTS=parts, BD=config.shrink, E0=static["E0"], E1=static["E1"], E2=static["E2"],
    )  # fmt: skip
    arrays = [a for pool, page_BE in zip(pools, pages, strict=True) for a in (pool.c_PR, pool.b_PRF, page_BE)]
    (edited,) = call(
        expand_row_kernel, s_parts, y_BF, *arrays, out=[out], aliases={1: 0},
        grid=(batch, sum(widths) // config.expand), warps=config.warps(config.expand),
        B=batch, WIDTH=width, PARTS=parts, PB=power_of_two(parts), BF=config.expand, **static,
    )  # fmt: skip
    return edited
