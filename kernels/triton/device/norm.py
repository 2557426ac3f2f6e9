"""Device code of norms, with the edits of the residual stream and the shrinks of what they give."""

import triton
import triton.language as tl

from kernels.triton.device.common import (
    add_edit,
    any_page,
    finish_shrink,
    load_a,
    load_pages,
    load_product,
    load_scales,
    store_zeros,
)
from kernels.triton.device.fp8 import rounded, scale_of


@triton.jit
def _stream(
    x_ptr, add_ptr, row_scale, add_column, es0, eb0, ep0, es1, eb1, ep1, base, d, row, live, tile,
    D: tl.constexpr, ADD: tl.constexpr, SCALED: tl.constexpr,
    EDITS: tl.constexpr, E0: tl.constexpr, E1: tl.constexpr, EB0: tl.constexpr, EB1: tl.constexpr,
):  # fmt: skip
    """Return columns ``d`` of the residual stream in float32, with what is added to it. ``row_scale``: of what is."""
    y = tl.load(x_ptr + base + d[None, :], mask=live[:, None], other=0.0).to(tl.float32)
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    if ADD:
        y += load_product(add_ptr, base + d[None, :], row_scale, add_column, d[None, :], live[:, None], None, SCALED)
    if EDITS > 0:
        y = add_edit(y, es0, eb0, ep0, row, live, tile, d, D, E0, EB0, dtype)
    if EDITS > 1:
        y = add_edit(y, es1, eb1, ep1, row, live, tile, d, D, E1, EB1, dtype)
    return y


@triton.jit
def _squares(
    x_ptr, add_ptr, add_row, add_column, es0, eb0, ep0, es1, eb1, ep1, block_b, block_page, block_s, x_out, base, row,
    live, tile,
    begin, end,
    D: tl.constexpr, ADD: tl.constexpr, SCALED: tl.constexpr, EDITS: tl.constexpr, BLOCK: tl.constexpr,
    EE0: tl.constexpr, EE1: tl.constexpr,
    EEB0: tl.constexpr, EEB1: tl.constexpr, BE: tl.constexpr, BEB: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr,
    STAGES: tl.constexpr, WRITE: tl.constexpr,
):  # fmt: skip
    """Edit columns ``begin`` to ``end`` of BT rows, write them with WRITE, and return the sum of each row's squares."""
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    row_scale = load_scales(add_row, row[:, None], live[:, None], SCALED)
    squares = tl.zeros([BT, BD], tl.float32)
    for start in tl.range(begin, end, BD, num_stages=STAGES):
        d = start + tl.arange(0, BD)
        y = _stream(x_ptr, add_ptr, row_scale, add_column, es0, eb0, ep0, es1, eb1, ep1, base, d, row,
                    live, tile, D, ADD, SCALED, EDITS, EE0, EE1, EEB0, EEB1)  # fmt: skip
        if BLOCK:
            y = add_edit(y, block_s, block_b, block_page, row, live, tile, d, D, BE, BEB, dtype)
        if WRITE:
            tl.store(x_out + base + d[None, :], y.to(dtype), mask=live[:, None])
        squares += y * y
    return tl.sum(squares, 1)


@triton.jit
def _scaled(
    x_ptr, scale, weight_ptr, a0, page0, a1, page1, a2, page2, h_out, base, live, tile, begin, end,
    D: tl.constexpr, SITES: tl.constexpr, E: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Scale columns ``begin`` to ``end`` of BT rows and write them; return their products with A of up to three sites.

    A site that is not there has zeros.
    """
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    p0 = load_pages(page0, tile, 0, E, E)
    p1 = load_pages(page1, tile, 0, E, E)
    p2 = load_pages(page2, tile, 0, E, E)
    acc0 = tl.zeros([BT, 16 * E], tl.float32)
    acc1 = tl.zeros([BT, 16 * E], tl.float32)
    acc2 = tl.zeros([BT, 16 * E], tl.float32)
    for start in tl.range(begin, end, BD, num_stages=STAGES):
        d = start + tl.arange(0, BD)
        x = tl.load(x_ptr + base + d[None, :], mask=live[:, None], other=0.0)
        weight = tl.load(weight_ptr + d).to(tl.float32)
        h = (x.to(tl.float32) * scale[:, None]).to(dtype).to(tl.float32) * weight[None, :]
        h = h.to(dtype)
        tl.store(h_out + base + d[None, :], h, mask=live[:, None])
        if SITES > 0:
            acc0 = tl.dot(h, load_a(a0, p0, d, D, E, dtype), acc0, input_precision="tf32x3")
        if SITES > 1:
            acc1 = tl.dot(h, load_a(a1, p1, d, D, E, dtype), acc1, input_precision="tf32x3")
        if SITES > 2:
            acc2 = tl.dot(h, load_a(a2, p2, d, D, E, dtype), acc2, input_precision="tf32x3")
    return acc0, acc1, acc2


@triton.jit
def _norm_rows(
    x_ptr, add_ptr, add_row, add_column, es0, eb0, ep0, es1, eb1, ep1, block_a, block_c, block_b, block_page, block_own,
    weight_ptr,
    a0, c0, page0, own0, a1, c1, page1, own1, a2, c2, page2, own2,
    x_out, h_out, s0, s1, s2, block_s, row, live, tile,
    D: tl.constexpr, EPS: tl.constexpr, ADD: tl.constexpr, SCALED: tl.constexpr, EDITS: tl.constexpr,
    BLOCK: tl.constexpr,
    SITES: tl.constexpr, EE0: tl.constexpr, EE1: tl.constexpr, BE: tl.constexpr, E: tl.constexpr,
    EEB0: tl.constexpr, EEB1: tl.constexpr, BEB: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr,
    STAGES: tl.constexpr, WRITE: tl.constexpr,
):  # fmt: skip
    """Edit, norm and shrink BT rows; with WRITE the stream is written, changed or not."""
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    base = row.to(tl.int64)[:, None] * D
    if BLOCK:
        page = load_pages(block_page, tile, 0, BE, BE)
        acc = tl.zeros([BT, 16 * BE], tl.float32)
        row_scale = load_scales(add_row, row[:, None], live[:, None], SCALED)
        for start in tl.range(0, D, BD, num_stages=STAGES):
            d = start + tl.arange(0, BD)
            y = _stream(x_ptr, add_ptr, row_scale, add_column, es0, eb0, ep0, es1, eb1, ep1, base, d, row,
                        live, tile, D, ADD, SCALED, EDITS, EE0, EE1, EEB0, EEB1)  # fmt: skip
            acc = tl.dot(y.to(dtype), load_a(block_a, page, d, D, BE, dtype), acc, input_precision="tf32x3")
        finish_shrink(acc, block_c, block_page, block_own, block_s, row, live, tile, 0, BE, BE)
        tl.debug_barrier()
    squares = _squares(
        x_ptr, add_ptr, add_row, add_column, es0, eb0, ep0, es1, eb1, ep1, block_b, block_page, block_s, x_out, base,
        row, live, tile, 0, D,
        D, ADD, SCALED, EDITS, BLOCK, EE0, EE1, EEB0, EEB1, BE, BEB, BT, BD, STAGES, WRITE,
    )  # fmt: skip
    scale = tl.rsqrt(squares / D + EPS)
    if WRITE:
        tl.debug_barrier()
        acc0, acc1, acc2 = _scaled(
            x_out, scale, weight_ptr, a0, page0, a1, page1, a2, page2, h_out, base, live, tile, 0, D,
            D, SITES, E, BT, BD, STAGES,
        )  # fmt: skip
    else:
        acc0, acc1, acc2 = _scaled(
            x_ptr, scale, weight_ptr, a0, page0, a1, page1, a2, page2, h_out, base, live, tile, 0, D,
            D, SITES, E, BT, BD, STAGES,
        )  # fmt: skip
    if SITES > 0:
        finish_shrink(acc0, c0, page0, own0, s0, row, live, tile, 0, E, E)
    if SITES > 1:
        finish_shrink(acc1, c1, page1, own1, s1, row, live, tile, 0, E, E)
    if SITES > 2:
        finish_shrink(acc2, c2, page2, own2, s2, row, live, tile, 0, E, E)


@triton.jit
def norm_kernel(
    x_ptr, add_ptr, add_row, add_column, weight_ptr, x_out, h_out, scale_out,
    D: tl.constexpr, BD: tl.constexpr, EPS: tl.constexpr, ADD: tl.constexpr, SCALED: tl.constexpr, FP8: tl.constexpr,
):  # fmt: skip
    """A program: one row without edits, in registers; with FP8 it is rounded to that, and its scale is left."""
    d = tl.arange(0, BD)
    row = tl.program_id(0)
    at = row.to(tl.int64) * D + d
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    x = tl.load(x_ptr + at, mask=d < D, other=0.0)
    if ADD:
        y = load_product(add_ptr, at, load_scales(add_row, row, None, SCALED), add_column, d, d < D, d < D, SCALED)
        x = (x.to(tl.float32) + y).to(dtype)
        tl.store(x_out + at, x, mask=d < D)
    x32 = x.to(tl.float32)
    scale = tl.rsqrt(tl.sum(x32 * x32, 0) / D + EPS)
    weight = tl.load(weight_ptr + d, mask=d < D, other=0.0).to(tl.float32)
    h = ((x32 * scale).to(dtype).to(tl.float32) * weight).to(dtype)
    if FP8:
        h = h.to(tl.float32)
        own = scale_of(tl.max(tl.abs(h), 0))
        tl.store(h_out + at, rounded(h, own), mask=d < D)
        tl.store(scale_out + row, own)
    else:
        tl.store(h_out + at, h, mask=d < D)


@triton.jit
def norm_shrink_kernel(
    x_ptr, add_ptr, add_row, add_column, es0, eb0, ep0, es1, eb1, ep1, block_a, block_c, block_b, block_page, block_own,
    weight_ptr,
    a0, c0, page0, own0, a1, c1, page1, own1, a2, c2, page2, own2,
    x_out, h_out, s0, s1, s2, block_s,
    T: tl.constexpr, D: tl.constexpr, TILE: tl.constexpr, EPS: tl.constexpr, ADD: tl.constexpr, SCALED: tl.constexpr,
    EDITS: tl.constexpr, BLOCK: tl.constexpr, SITES: tl.constexpr, EE0: tl.constexpr, EE1: tl.constexpr,
    BE: tl.constexpr, E: tl.constexpr,
    EEB0: tl.constexpr, EEB1: tl.constexpr, BEB: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """A program: BT whole rows, in two passes over the width (three with BLOCK); later ones find x in the L2 cache.

    A tile in which only ``block`` has pages, or nothing, takes a leaner way.
    """
    row = tl.program_id(0) * BT + tl.arange(0, BT)
    live = row < T
    tile = tl.program_id(0) * BT // TILE
    WRITE: tl.constexpr = ADD or EDITS > 0 or BLOCK
    some = tl.full([], 0, tl.int64)
    if EDITS > 0:
        some = tl.maximum(some, any_page(ep0, tile, EE0))
    if EDITS > 1:
        some = tl.maximum(some, any_page(ep1, tile, EE1))
    if SITES > 0:
        some = tl.maximum(some, any_page(page0, tile, E))
    if SITES > 1:
        some = tl.maximum(some, any_page(page1, tile, E))
    if SITES > 2:
        some = tl.maximum(some, any_page(page2, tile, E))
    if some > 0:
        _norm_rows(
            x_ptr, add_ptr, add_row, add_column, es0, eb0, ep0, es1, eb1, ep1, block_a, block_c, block_b, block_page,
            block_own,
            weight_ptr, a0, c0, page0, own0, a1, c1, page1, own1, a2, c2, page2, own2,
            x_out, h_out, s0, s1, s2, block_s, row, live, tile,
            D, EPS, ADD, SCALED, EDITS, BLOCK, SITES, EE0, EE1, BE, E, EEB0, EEB1, BEB, BT, BD, STAGES, WRITE,
        )  # fmt: skip
    else:
        _norm_rows(
            x_ptr, add_ptr, add_row, add_column, es0, eb0, ep0, es1, eb1, ep1, block_a, block_c, block_b, block_page,
            block_own,
            weight_ptr, a0, c0, page0, own0, a1, c1, page1, own1, a2, c2, page2, own2,
            x_out, h_out, s0, s1, s2, block_s, row, live, tile,
            D, EPS, ADD, SCALED, 0, BLOCK, 0, EE0, EE1, BE, E, EEB0, EEB1, BEB, BT, BD, STAGES, WRITE,
        )  # fmt: skip
        if SITES > 0:
            store_zeros(s0, row, live, E)
        if SITES > 1:
            store_zeros(s1, row, live, E)
        if SITES > 2:
            store_zeros(s2, row, live, E)


@triton.jit
def norm_edit_part_kernel(
    x_ptr, add_ptr, add_row, add_column, es0, eb0, ep0, es1, eb1, ep1, x_out, square_out,
    T: tl.constexpr, D: tl.constexpr, TILE: tl.constexpr, ADD: tl.constexpr, SCALED: tl.constexpr, EDITS: tl.constexpr,
    EE0: tl.constexpr, EE1: tl.constexpr, EEB0: tl.constexpr, EEB1: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr,
    PARTS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """The first half of a norm, in parts. A program: BT rows by a part of the columns; it leaves their squares' sum."""
    part = tl.program_id(0)
    row = tl.program_id(1) * BT + tl.arange(0, BT)
    live = row < T
    tile = tl.program_id(1) * BT // TILE
    base = row.to(tl.int64)[:, None] * D
    RUN: tl.constexpr = D // PARTS
    WRITE: tl.constexpr = ADD or EDITS > 0
    some = tl.full([], 0, tl.int64)
    if EDITS > 0:
        some = tl.maximum(some, any_page(ep0, tile, EE0))
    if EDITS > 1:
        some = tl.maximum(some, any_page(ep1, tile, EE1))
    at = square_out + part * T + row
    if some > 0:
        squares = _squares(
            x_ptr, add_ptr, add_row, add_column, es0, eb0, ep0, es1, eb1, ep1, x_ptr, x_ptr, x_ptr, x_out, base, row,
            live, tile,
            part * RUN, part * RUN + RUN,
            D, ADD, SCALED, EDITS, False, EE0, EE1, EEB0, EEB1, 1, 1, BT, BD, STAGES, WRITE,
        )  # fmt: skip
        tl.store(at, squares, mask=live)
    else:
        squares = _squares(
            x_ptr, add_ptr, add_row, add_column, es0, eb0, ep0, es1, eb1, ep1, x_ptr, x_ptr, x_ptr, x_out, base, row,
            live, tile,
            part * RUN, part * RUN + RUN,
            D, ADD, SCALED, 0, False, EE0, EE1, EEB0, EEB1, 1, 1, BT, BD, STAGES, WRITE,
        )  # fmt: skip
        tl.store(at, squares, mask=live)


@triton.jit
def norm_shrink_part_kernel(
    x_ptr, square_ptr, weight_ptr, a0, page0, a1, page1, a2, page2, h_out, s0, s1, s2,
    T: tl.constexpr, D: tl.constexpr, TILE: tl.constexpr, EPS: tl.constexpr, SITES: tl.constexpr, E: tl.constexpr,
    BT: tl.constexpr, BD: tl.constexpr, PARTS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """The second half: BT rows by a part of the columns are scaled, and their part of the shrinks is left.

    A tile without pages takes a leaner way.
    """
    part = tl.program_id(0)
    row = tl.program_id(1) * BT + tl.arange(0, BT)
    live = row < T
    tile = tl.program_id(1) * BT // TILE
    base = row.to(tl.int64)[:, None] * D
    RUN: tl.constexpr = D // PARTS
    squares = tl.zeros([BT], tl.float32)
    for other in range(PARTS):
        squares += tl.load(square_ptr + other * T + row, mask=live, other=0.0)
    scale = tl.rsqrt(squares / D + EPS)
    some = tl.full([], 0, tl.int64)
    if SITES > 0:
        some = tl.maximum(some, any_page(page0, tile, E))
    if SITES > 1:
        some = tl.maximum(some, any_page(page1, tile, E))
    if SITES > 2:
        some = tl.maximum(some, any_page(page2, tile, E))
    at = (part * T + row)[:, None] * (16 * E) + tl.arange(0, 16 * E)[None, :]
    if some > 0:
        acc0, acc1, acc2 = _scaled(
            x_ptr, scale, weight_ptr, a0, page0, a1, page1, a2, page2, h_out, base, live, tile,
            part * RUN, part * RUN + RUN, D, SITES, E, BT, BD, STAGES,
        )  # fmt: skip
        if SITES > 0:
            tl.store(s0 + at, acc0, mask=live[:, None])
        if SITES > 1:
            tl.store(s1 + at, acc1, mask=live[:, None])
        if SITES > 2:
            tl.store(s2 + at, acc2, mask=live[:, None])
    else:
        zero, _, _ = _scaled(
            x_ptr, scale, weight_ptr, a0, page0, a1, page1, a2, page2, h_out, base, live, tile,
            part * RUN, part * RUN + RUN, D, 0, E, BT, BD, STAGES,
        )  # fmt: skip
        if SITES > 0:
            tl.store(s0 + at, zero, mask=live[:, None])
        if SITES > 1:
            tl.store(s1 + at, zero, mask=live[:, None])
        if SITES > 2:
            tl.store(s2 + at, zero, mask=live[:, None])
