"""The edit of a decode step: each row reads its own adapter, so the bytes of A and B are the whole cost.

Linears that read the same rows (q, k and v; gate and up) share a launch. Their widths are split over programs, so that
few rows fill the GPU too; a second kernel adds the parts of the first up in order, and edits the outputs in place.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp

from kernels.triton.call import block_of, call, check_dtype, power_of_two, require
from kernels.triton.device.decode import expand_row_kernel, shrink_row_kernel
from kernels.types import PagePool

LINEARS = 3
"""Linears of one launch, those of q, k and v."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """How rows are cut up.

    With 256 columns of A or B for each warp a thread holds all it reads in registers, 16 loads of 16 bytes in flight,
    and sums B up without asking its neighbours.

    Attributes:
        shrink: columns of x that a program takes, a power of two.
        expand: columns of y.
    """

    shrink: int
    expand: int

    @staticmethod
    def warps(columns: int) -> int:
        """Return the warps for ``columns`` at once."""
        return max(1, columns // 256)


def config_for(width_in: int, width_out: int) -> Config:
    """Return the configuration; ``width_out`` is what divides the widths of all linears."""
    return Config(
        shrink=block_of(width_in, 1024, "the width of x_BD"), expand=block_of(width_out, 512, "the width of y_BF")
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
    config = config or config_for(width_in, math.gcd(*widths))
    for name, size, divided in (("shrink", config.shrink, [width_in]), ("expand", config.expand, widths)):
        require(all(n % size == 0 for n in divided), f"{name} is {size}, which does not divide {divided}")
    # A launch has arguments for as many linears; what stands for those that are not there is not read.
    spare = LINEARS - sites
    pools += pools[:1] * spare
    pages = tuple(jnp.asarray(page_BE, jnp.int32) for page_BE in (*pages, *pages[:1] * spare))
    listed = sum(page_BE.shape[1] for page_BE in pages[:sites])
    entries: dict[str, Any] = {f"E{n}": page_BE.shape[1] for n, page_BE in enumerate(pages)}
    parts = width_in // config.shrink
    (s_parts,) = call(
        shrink_row_kernel,
        x_BD, *(array for pool, page_BE in zip(pools, pages, strict=True) for array in (pool.a_PDR, page_BE)),
        out=[jax.ShapeDtypeStruct((parts * batch * listed * 16,), jnp.float32)],
        grid=(batch, parts, sites), warps=config.warps(config.shrink),
        B=batch, D=width_in, PARTS=parts, BD=config.shrink, **entries,
    )  # fmt: skip
    where: dict[str, Any] = {}
    for n, (width_out, column) in enumerate([*zip(widths, columns, strict=True), *[(widths[0], columns[0])] * spare]):
        where |= {f"F{n}": width_out, f"COLUMN{n}": column}
    (edited,) = call(
        expand_row_kernel,
        s_parts, y_BF,
        *(array for pool, page_BE in zip(pools, pages, strict=True) for array in (pool.c_PR, pool.b_PRF, page_BE)),
        out=[jax.ShapeDtypeStruct(y_BF.shape, y_BF.dtype)], aliases={1: 0},
        grid=(batch, sum(widths) // config.expand), warps=config.warps(config.expand),
        B=batch, WIDTH=width, PARTS=parts, PB=power_of_two(parts), BF=config.expand, **entries, **where,
    )  # fmt: skip
    return edited
