"""The edit of a decode step: each row reads its own adapter, so the bytes of A and B are the whole cost.

With many rows of one page each a program takes a whole row. Otherwise the widths are split over programs, so that few
rows fill the GPU too, and a second kernel adds the parts of the first up in order.
"""

import dataclasses

import jax
import jax.numpy as jnp

from kernels.triton.call import block_of, call, check_dtype, power_of_two, require
from kernels.triton.device.decode import edit_row_kernel, expand_row_kernel, shrink_row_kernel
from kernels.types import PagePool


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


def config_for(batch: int, width_in: int, width_out: int, entries: int) -> Config:
    """Return the configuration: whole rows save a launch, but need rows enough for every multiprocessor."""
    whole = entries == 1 and batch >= 200
    return Config(
        whole=whole,
        shrink=block_of(width_in, 1024, "the width of x_BD"),
        expand=block_of(width_out, 2048 if whole else 512, "the width of y_BF"),
    )


def decode_edit(
    x_BD: jax.Array,
    y_BF: jax.Array,
    pool: PagePool,
    page_BE: jax.Array,
    *,
    column: int = 0,
    config: Config | None = None,
) -> jax.Array:
    """See ``kernels.api.decode_edit``. ``config`` is chosen by the shapes if None. ``y_BF`` is edited in place."""
    check_dtype("x_BD", x_BD)
    check_dtype("y_BF", y_BF)
    batch, width_in = x_BD.shape
    width_out = pool.b_PRF.shape[2]
    columns = {"F": width_out, "WIDTH": y_BF.shape[1], "COLUMN": column}
    entries = page_BE.shape[1]
    page_BE = jnp.asarray(page_BE, jnp.int32)
    config = config or config_for(batch, width_in, width_out, entries)
    out = jax.ShapeDtypeStruct(y_BF.shape, y_BF.dtype)
    if config.whole:
        require(entries == 1, f"page_BE lists {entries} pages a row; whole rows take one")
        (edited,) = call(
            edit_row_kernel, x_BD, y_BF, *pool, page_BE, out=[out], grid=(batch,), aliases={1: 0},
            warps=config.warps(max(config.shrink, config.expand)),
            D=width_in, **columns, BD=config.shrink, BF=config.expand,
        )  # fmt: skip
        return edited
    parts = width_in // config.shrink
    (s_UBER,) = call(
        shrink_row_kernel, x_BD, pool.a_PDR, page_BE,
        out=[jax.ShapeDtypeStruct((parts, batch, entries, 16), jnp.float32)],
        grid=(batch, parts), warps=config.warps(config.shrink), B=batch, D=width_in, E=entries, BD=config.shrink,
    )  # fmt: skip
    (edited,) = call(
        expand_row_kernel, s_UBER, y_BF, pool.c_PR, pool.b_PRF, page_BE, out=[out], aliases={1: 0},
        grid=(batch, width_out // config.expand), warps=config.warps(config.expand),
        B=batch, **columns, E=entries, PARTS=parts, PB=power_of_two(parts), BF=config.expand,
    )  # fmt: skip
    return edited
