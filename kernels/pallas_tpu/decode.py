"""The edit of one token a row, each row with its own list of rank pages: ``decode_edit``.

Every row reads its own A and B pages once and multiplies them with one vector, so the kernel is bound by memory: both
halves run in one step on the vector unit, while Pallas' pipeline copies the pages that the next step names.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels.pallas_tpu.common import (
    SMEM_BUDGET_BYTES,
    VMEM_BUDGET_BYTES,
    check_dtype,
    round_up,
    tiled_bytes,
)
from kernels.types import PagePool, Unsupported
from kernels.xla.lowrank import side_by_side

_CHUNK = 1024
_MOST_SLOTS = 8
_MOST_ROWS = 8


class RowBlocks(NamedTuple):
    """Rows and entries that one grid step handles, and the VMEM that the kernel's blocks then take."""

    rows: int
    slots: int
    vmem_bytes: int


def decode_blocks(
    batch: int, width_in: int, width_out: int, entries: int, rank: int, dtype: Any, page_dtype: Any
) -> RowBlocks:
    """Choose how many rows and pages a grid step takes: at most eight pages, of as many rows as that allows.

    Raises:
        Unsupported: not even one page fits VMEM.
    """
    page = 2 * (tiled_bytes((rank, width_in), page_dtype) + tiled_bytes((rank, width_out), page_dtype))
    row = 2 * (tiled_bytes((1, width_in), dtype) + 2 * tiled_bytes((1, width_out), dtype))
    row += tiled_bytes((1, width_out), jnp.float32)
    for slots in (_MOST_SLOTS, 4, 2, 1):
        if slots > entries:
            continue
        for rows in (_MOST_ROWS // slots, 4, 2, 1):
            need = rows * (row + slots * page)
            if rows * slots <= _MOST_SLOTS and rows <= batch and need <= VMEM_BUDGET_BYTES:
                return RowBlocks(rows, slots, need)
    raise Unsupported(
        f"x_BD has width {width_in} and y_BF {width_out}; one pair of rank pages takes {page + row} bytes of VMEM; "
        f"allowed: {VMEM_BUDGET_BYTES}"
    )


def _chunks(width: int) -> list[slice]:
    return [slice(start, min(start + _CHUNK, width)) for start in range(0, width, _CHUNK)]


def _edit_row(x_ref: Any, c_1R: jax.Array, a_ref: Any, b_ref: Any, sum_ref: Any, row: int) -> None:
    """Add one page's edit of one row to its sum; everything in float32."""
    rank = a_ref.shape[1]
    column = jax.lax.broadcasted_iota(jnp.int32, (rank, rank), 1)
    s_R1 = jnp.sum(
        jnp.where(column == jax.lax.broadcasted_iota(jnp.int32, (rank, rank), 0), c_1R, 0.0), axis=1, keepdims=True
    )
    for lanes in _chunks(a_ref.shape[2]):
        products = a_ref[0, :, lanes].astype(jnp.float32) * x_ref[row, :, lanes].astype(jnp.float32)
        s_R1 += jnp.sum(products, axis=1, keepdims=True)
    for lanes in _chunks(b_ref.shape[2]):
        products = b_ref[0, :, lanes].astype(jnp.float32) * s_R1
        sum_ref[row, :, lanes] += jnp.sum(products, axis=0, keepdims=True)


def _kernel(rows: int, slots: int, page_ref: Any, x_ref: Any, y_ref: Any, c_ref: Any, *refs: Any) -> None:
    """Edit ``rows`` rows with ``slots`` pages each; grid ``(rows, entry group)``."""
    a_refs, b_refs, (out_ref, sum_ref) = refs[: rows * slots], refs[rows * slots : -2], refs[-2:]
    step, group = pl.program_id(0), pl.program_id(1)

    @pl.when(group == 0)
    def _() -> None:
        sum_ref[...] = y_ref[...].astype(jnp.float32)

    for row in range(rows):
        for slot in range(slots):
            at = ((step * rows + row) * pl.num_programs(1) + group) * slots + slot

            @pl.when(page_ref[at] != 0)
            def _(row: int = row, slot: int = slot) -> None:
                i = row * slots + slot
                _edit_row(x_ref, c_ref[row, 0, slot : slot + 1, :], a_refs[i], b_refs[i], sum_ref, row)

    @pl.when(group == pl.num_programs(1) - 1)
    def _() -> None:
        out_ref[...] = sum_ref[...].astype(out_ref.dtype)


def decode_edit(
    x_BD: jax.Array,
    y_BF: jax.Array,
    pools: tuple[PagePool, ...],
    pages: tuple[jax.Array, ...],
    *,
    columns: tuple[int, ...],
) -> jax.Array:
    """See ``kernels.api.decode_edit``.

    Raises:
        Unsupported: a dtype, width or page list that the kernel cannot take.
    """
    return side_by_side(_edit_rows, x_BD, y_BF, pools, pages, columns)


def _edit_rows(x_BD: jax.Array, y_BF: jax.Array, pool: PagePool, page_BE: jax.Array) -> jax.Array:
    (batch, width_in), width_out = x_BD.shape, y_BF.shape[1]
    for name, array in (("x_BD", x_BD), ("y_BF", y_BF), ("pool.a_PDR", pool.a_PDR), ("pool.b_PRF", pool.b_PRF)):
        check_dtype(name, array.dtype)
    rank = pool.b_PRF.shape[1]
    wider = max((x_BD.dtype, y_BF.dtype), key=lambda dtype: dtype.itemsize)
    wider_page = max((pool.a_PDR.dtype, pool.b_PRF.dtype), key=lambda dtype: dtype.itemsize)
    rows, slots, _ = decode_blocks(batch, width_in, width_out, page_BE.shape[1], rank, wider, wider_page)
    padded, entries = round_up(batch, rows), round_up(page_BE.shape[1], slots)
    groups = entries // slots
    if padded * entries * 4 > SMEM_BUDGET_BYTES:
        raise Unsupported(f"page_BE takes {padded * entries * 4} bytes of scalar memory; allowed: {SMEM_BUDGET_BYTES}")
    page_BE = jnp.pad(page_BE.astype(jnp.int32), ((0, padded - batch), (0, entries - page_BE.shape[1])))

    def page_specs(width: int) -> list[pl.BlockSpec]:
        def index_map(row: int, slot: int, b: Any, e: Any, page_ref: Any) -> tuple[Any, ...]:
            return page_ref[((b * rows + row) * groups + e) * slots + slot], 0, 0

        return [
            pl.BlockSpec((1, rank, width), functools.partial(index_map, row, slot))
            for row in range(rows)
            for slot in range(slots)
        ]

    out = pl.pallas_call(
        functools.partial(_kernel, rows, slots),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(padded // rows, groups),
            in_specs=[
                pl.BlockSpec((rows, 1, width_in), lambda b, e, _: (b, 0, 0)),
                pl.BlockSpec((rows, 1, width_out), lambda b, e, _: (b, 0, 0)),
                pl.BlockSpec((rows, 1, slots, rank), lambda b, e, _: (b, e, 0, 0)),
                *page_specs(width_in),
                *page_specs(width_out),
            ],
            out_specs=pl.BlockSpec((rows, 1, width_out), lambda b, e, _: (b, 0, 0)),
            scratch_shapes=[pltpu.VMEM((rows, 1, width_out), jnp.float32)],
        ),
        out_shape=jax.ShapeDtypeStruct((batch, 1, width_out), y_BF.dtype),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary")),
        name="preft_decode_edit",
    )(
        page_BE.reshape(-1),
        x_BD.reshape(batch, 1, width_in),
        y_BF.reshape(batch, 1, width_out),
        pool.c_PR[page_BE].astype(jnp.float32).reshape(padded, groups, slots, rank),
        *[pool.a_PDR.swapaxes(1, 2)] * (rows * slots),
        *[pool.b_PRF] * (rows * slots),
    )
    return out.reshape(batch, width_out)
