"""Device code of the fused operations."""

import triton
import triton.language as tl

from kernels.triton.device.common import (
    add_edit,
    any_page,
    finish_shrink,
    load_a,
    load_b,
    load_pages,
    load_product,
    load_s,
    rounded_row,
    store_zeros,
)


@triton.jit
def _stream(
    x_ptr, add_ptr, add_row, add_column, es0, eb0, ep0, es1, eb1, ep1, base, d, row, live, tile,
    D: tl.constexpr, ADD: tl.constexpr, SCALED: tl.constexpr,
    EDITS: tl.constexpr, E0: tl.constexpr, E1: tl.constexpr, EB0: tl.constexpr, EB1: tl.constexpr,
):  # fmt: skip
    """Return columns ``d`` of the residual stream with what is added to it, rounded once."""
    x = tl.load(x_ptr + base + d[None, :], mask=live[:, None], other=0.0)
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    if ADD or EDITS > 0:
        y = x.to(tl.float32)
        if ADD:
            y += load_product(
                add_ptr, base + d[None, :], add_row, row[:, None], add_column, d[None, :], live[:, None],
                live[:, None], None, SCALED,
            ).to(tl.float32)  # fmt: skip
        if EDITS > 0:
            y = add_edit(y, es0, eb0, ep0, row, live, tile, d, D, E0, EB0, dtype)
        if EDITS > 1:
            y = add_edit(y, es1, eb1, ep1, row, live, tile, d, D, E1, EB1, dtype)
        x = y.to(dtype)
    return x


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
    squares = tl.zeros([BT, BD], tl.float32)
    for start in tl.range(begin, end, BD, num_stages=STAGES):
        d = start + tl.arange(0, BD)
        x = _stream(x_ptr, add_ptr, add_row, add_column, es0, eb0, ep0, es1, eb1, ep1, base, d, row,
                    live, tile, D, ADD, SCALED, EDITS, EE0, EE1, EEB0, EEB1)  # fmt: skip
        if BLOCK:
            y = add_edit(x.to(tl.float32), block_s, block_b, block_page, row, live, tile, d, D, BE, BEB, dtype)
            x = y.to(dtype)
        if WRITE:
            tl.store(x_out + base + d[None, :], x, mask=live[:, None])
        x32 = x.to(tl.float32)
        squares += x32 * x32
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
        for start in tl.range(0, D, BD, num_stages=STAGES):
            d = start + tl.arange(0, BD)
            x = _stream(x_ptr, add_ptr, add_row, add_column, es0, eb0, ep0, es1, eb1, ep1, base, d, row,
                        live, tile, D, ADD, SCALED, EDITS, EE0, EE1, EEB0, EEB1)  # fmt: skip
            acc = tl.dot(x, load_a(block_a, page, d, D, BE, dtype), acc, input_precision="tf32x3")
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
        y = load_product(add_ptr, at, add_row, row, add_column, d, d < D, None, d < D, SCALED)
        x = (x.to(tl.float32) + y.to(tl.float32)).to(dtype)
        tl.store(x_out + at, x, mask=d < D)
    x32 = x.to(tl.float32)
    scale = tl.rsqrt(tl.sum(x32 * x32, 0) / D + EPS)
    weight = tl.load(weight_ptr + d, mask=d < D, other=0.0).to(tl.float32)
    h = ((x32 * scale).to(dtype).to(tl.float32) * weight).to(dtype)
    if FP8:
        rounded, own = rounded_row(h.to(tl.float32))
        tl.store(h_out + at, rounded, mask=d < D)
        tl.store(scale_out + row, own)
    else:
        tl.store(h_out + at, h, mask=d < D)


@triton.jit
def quantize_kernel(x_ptr, x_out, scale_out, D: tl.constexpr, BD: tl.constexpr):
    """A program: one row, in registers."""
    d = tl.arange(0, BD)
    row = tl.program_id(0)
    at = row.to(tl.int64) * D + d
    rounded, scale = rounded_row(tl.load(x_ptr + at, mask=d < D, other=0.0).to(tl.float32))
    tl.store(x_out + at, rounded, mask=d < D)
    tl.store(scale_out + row, scale)


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


@triton.jit
def _rope_head(
    qkv_ptr, qkv_row, qkv_column, s_ptr, b_ptr, page_ptr, row, live, tile, column, head, F: tl.constexpr,
    WIDTH: tl.constexpr, C: tl.constexpr, E: tl.constexpr, EB: tl.constexpr, EDIT: tl.constexpr, SCALED: tl.constexpr,
):  # fmt: skip
    """Return the two halves of one head in float32, edited."""
    half = tl.arange(0, C // 2)
    base = row.to(tl.int64)[:, None] * WIDTH
    at = column + half[None, :]
    first = load_product(
        qkv_ptr, base + at, qkv_row, row[:, None], qkv_column, at, live[:, None], live[:, None], None, SCALED
    )
    at += C // 2
    second = load_product(
        qkv_ptr, base + at, qkv_row, row[:, None], qkv_column, at, live[:, None], live[:, None], None, SCALED
    )
    dtype: tl.constexpr = qkv_ptr.dtype.element_ty
    if EDIT:
        f = head * C + half
        first = add_edit(first.to(tl.float32), s_ptr, b_ptr, page_ptr, row, live, tile, f, F, E, EB, dtype).to(dtype)
        second = add_edit(
            second.to(tl.float32), s_ptr, b_ptr, page_ptr, row, live, tile, f + C // 2, F, E, EB, dtype
        ).to(dtype)
    return first, second


@triton.jit
def _norm_head(first, second, weight_ptr, C: tl.constexpr, EPS: tl.constexpr, dtype: tl.constexpr):
    """Return the two halves of a head in float32, its norm rounded where RMS norms round."""
    half = tl.arange(0, C // 2)
    a, b = first.to(tl.float32), second.to(tl.float32)
    scale = tl.rsqrt((tl.sum(a * a, 1) + tl.sum(b * b, 1)) / C + EPS)[:, None]
    weight = tl.load(weight_ptr + half).to(dtype).to(tl.float32)[None, :]
    a = ((a * scale).to(dtype).to(tl.float32) * weight).to(dtype).to(tl.float32)
    weight = tl.load(weight_ptr + C // 2 + half).to(dtype).to(tl.float32)[None, :]
    b = ((b * scale).to(dtype).to(tl.float32) * weight).to(dtype).to(tl.float32)
    return a, b


@triton.jit
def rope_kv_kernel(
    qkv_ptr, qkv_row, qkv_column, cos_ptr, sin_ptr, kv_ptr, slot_ptr, s0, b0, page0, s1, b1, page1, s2, b2, page2,
    q_norm, k_norm,
    q_out, kv_out,
    T: tl.constexpr, H: tl.constexpr, K: tl.constexpr, C: tl.constexpr, SLOTS: tl.constexpr, TILE: tl.constexpr,
    HB: tl.constexpr, EDIT0: tl.constexpr, EDIT1: tl.constexpr, EDIT2: tl.constexpr,
    E0: tl.constexpr, E1: tl.constexpr, E2: tl.constexpr,
    EB0: tl.constexpr, EB1: tl.constexpr, EB2: tl.constexpr, BT: tl.constexpr, NORM: tl.constexpr, EPS: tl.constexpr,
    SCALED: tl.constexpr,
):  # fmt: skip
    """A program: BT rows by HB heads, all of them of q, of k or of v."""
    row = tl.program_id(1) * BT + tl.arange(0, BT)
    live = row < T
    tile = tl.program_id(1) * BT // TILE
    first_head = tl.program_id(0) * HB
    half = tl.arange(0, C // 2)
    WIDTH: tl.constexpr = (H + 2 * K) * C
    dtype: tl.constexpr = q_out.dtype.element_ty
    table = row[:, None] * (C // 2) + half[None, :]
    if first_head < H + K:
        cos = tl.load(cos_ptr + table, mask=live[:, None], other=0.0)
        sin = tl.load(sin_ptr + table, mask=live[:, None], other=0.0)
        if first_head < H:
            for n in range(HB):
                head = first_head + n
                a, b = _rope_head(
                    qkv_ptr, qkv_row, qkv_column, s0, b0, page0, row, live, tile, head * C, head, H * C,
                    WIDTH, C, E0, EB0, EDIT0, SCALED,
                )  # fmt: skip
                if NORM:
                    a, b = _norm_head(a, b, q_norm, C, EPS, dtype)
                else:
                    a, b = a.to(tl.float32), b.to(tl.float32)
                at = q_out + row.to(tl.int64)[:, None] * (H * C) + head * C + half[None, :]
                tl.store(at, (a * cos - b * sin).to(dtype), mask=live[:, None])
                tl.store(at + C // 2, (b * cos + a * sin).to(dtype), mask=live[:, None])
        else:
            slot = tl.load(slot_ptr + row, mask=live, other=-1)
            kept = (slot >= 0) & (slot < SLOTS)
            for n in range(HB):
                head = first_head - H + n
                a, b = _rope_head(
                    qkv_ptr, qkv_row, qkv_column, s1, b1, page1, row, live, tile, (H + head) * C, head, K * C,
                    WIDTH, C, E1, EB1, EDIT1, SCALED,
                )  # fmt: skip
                if NORM:
                    a, b = _norm_head(a, b, k_norm, C, EPS, dtype)
                else:
                    a, b = a.to(tl.float32), b.to(tl.float32)
                at = kv_out + (slot.to(tl.int64)[:, None] * (2 * K) + 2 * head) * C + half[None, :]
                tl.store(at, (a * cos - b * sin).to(dtype).to(kv_out.dtype.element_ty), mask=kept[:, None])
                tl.store(at + C // 2, (b * cos + a * sin).to(dtype).to(kv_out.dtype.element_ty), mask=kept[:, None])
    else:
        slot = tl.load(slot_ptr + row, mask=live, other=-1)
        kept = (slot >= 0) & (slot < SLOTS)
        for n in range(HB):
            head = first_head - H - K + n
            a, b = _rope_head(
                qkv_ptr, qkv_row, qkv_column, s2, b2, page2, row, live, tile, (H + K + head) * C, head, K * C,
                WIDTH, C, E2, EB2, EDIT2, SCALED,
            )  # fmt: skip
            at = kv_out + (slot.to(tl.int64)[:, None] * (2 * K) + 2 * head + 1) * C + half[None, :]
            tl.store(at, a.to(kv_out.dtype.element_ty), mask=kept[:, None])
            tl.store(at + C // 2, b.to(kv_out.dtype.element_ty), mask=kept[:, None])


@triton.jit
def _gate_up(
    gu_ptr, gu_row, gu_column, at, row, column, row_mask, column_mask, F: tl.constexpr, SCALED: tl.constexpr,
):  # fmt: skip
    """Return elements ``at`` of gate, and those of up, in float32; one of the masks is that of the elements."""
    mask = row_mask if column_mask is None else column_mask
    gate = load_product(gu_ptr, at, gu_row, row, gu_column, column, mask, row_mask, column_mask, SCALED)
    upper = load_product(gu_ptr, at + F, gu_row, row, gu_column, F + column, mask, row_mask, column_mask, SCALED)
    return gate.to(tl.float32), upper.to(tl.float32)


@triton.jit
def _silu_rows(
    gu_ptr, gu_row, gu_column, gs, gb, gp, us, ub, up, a_ptr, page_ptr, h_out, part_out, part, row, live, tile,
    T: tl.constexpr, F: tl.constexpr, SCALED: tl.constexpr, EDIT0: tl.constexpr, EDIT1: tl.constexpr,
    SHRINK: tl.constexpr,
    E0: tl.constexpr, E1: tl.constexpr, EB0: tl.constexpr, EB1: tl.constexpr, E: tl.constexpr,
    BT: tl.constexpr, BF: tl.constexpr, RUN: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Edit, multiply and shrink BT rows by RUN columns."""
    dtype: tl.constexpr = gu_ptr.dtype.element_ty
    if EDIT0 and E0 == EB0:
        gate_page = load_pages(gp, tile, 0, E0, EB0)
        gate_s = load_s(gs, row, live, 0, E0, EB0, dtype)
    if EDIT1 and E1 == EB1:
        up_page = load_pages(up, tile, 0, E1, EB1)
        up_s = load_s(us, row, live, 0, E1, EB1, dtype)
    if SHRINK:
        page = load_pages(page_ptr, tile, 0, E, E)
        acc = tl.zeros([BT, 16 * E], tl.float32)
    for start in tl.range(part * RUN, part * RUN + RUN, BF, num_stages=STAGES):
        f = start + tl.arange(0, BF)
        at = row.to(tl.int64)[:, None] * (2 * F) + f[None, :]
        gate, upper = _gate_up(gu_ptr, gu_row, gu_column, at, row[:, None], f[None, :], live[:, None], None, F, SCALED)
        if EDIT0:
            if E0 == EB0:
                gate = tl.dot(gate_s, load_b(gb, gate_page, f, F, EB0, dtype), gate, input_precision="tf32x3")
            else:
                gate = add_edit(gate, gs, gb, gp, row, live, tile, f, F, E0, EB0, dtype)
            gate = gate.to(dtype).to(tl.float32)
        if EDIT1:
            if E1 == EB1:
                upper = tl.dot(up_s, load_b(ub, up_page, f, F, EB1, dtype), upper, input_precision="tf32x3")
            else:
                upper = add_edit(upper, us, ub, up, row, live, tile, f, F, E1, EB1, dtype)
            upper = upper.to(dtype).to(tl.float32)
        h = (gate * tl.sigmoid(gate) * upper).to(dtype)
        tl.store(h_out + row.to(tl.int64)[:, None] * F + f[None, :], h, mask=live[:, None])
        if SHRINK:
            acc = tl.dot(h, load_a(a_ptr, page, f, F, E, dtype), acc, input_precision="tf32x3")
    if SHRINK:
        column = tl.arange(0, 16 * E)
        at = (part.to(tl.int64) * T + row)[:, None] * (16 * E) + column[None, :]
        tl.store(part_out + at, acc, mask=live[:, None])


@triton.jit
def silu_mul_plain_kernel(
    gu_ptr, gu_row, gu_column, h_out,
    T: tl.constexpr, F: tl.constexpr, BT: tl.constexpr, BF: tl.constexpr, SCALED: tl.constexpr,
):  # fmt: skip
    """A program: BT rows by BF columns without edits."""
    row = tl.program_id(1) * BT + tl.arange(0, BT)
    f = tl.program_id(0) * BF + tl.arange(0, BF)
    live = (row < T)[:, None]
    at = row.to(tl.int64)[:, None] * F + f[None, :]
    wide = at + row.to(tl.int64)[:, None] * F
    gate, upper = _gate_up(gu_ptr, gu_row, gu_column, wide, row[:, None], f[None, :], live, None, F, SCALED)
    tl.store(h_out + at, (gate * tl.sigmoid(gate) * upper).to(h_out.dtype.element_ty), mask=live)


@triton.jit
def silu_mul_fp8_kernel(
    gu_ptr, gu_row, gu_column, h_out, scale_out, F: tl.constexpr, BF: tl.constexpr, SCALED: tl.constexpr,
):  # fmt: skip
    """A program: one row without edits, in registers, rounded to FP8; its scale is left."""
    f = tl.arange(0, BF)
    row = tl.program_id(0)
    at = row.to(tl.int64) * F + f
    wide = row.to(tl.int64) * (2 * F) + f
    gate, upper = _gate_up(gu_ptr, gu_row, gu_column, wide, row, f, None, f < F, F, SCALED)
    h = (gate * tl.sigmoid(gate) * upper).to(gu_ptr.dtype.element_ty)
    rounded, scale = rounded_row(h.to(tl.float32))
    tl.store(h_out + at, rounded, mask=f < F)
    tl.store(scale_out + row, scale)


@triton.jit
def silu_mul_kernel(
    gu_ptr, gu_row, gu_column, gs, gb, gp, us, ub, up, a_ptr, page_ptr, h_out, part_out,
    T: tl.constexpr, F: tl.constexpr, TILE: tl.constexpr, SCALED: tl.constexpr, EDIT0: tl.constexpr,
    EDIT1: tl.constexpr, SHRINK: tl.constexpr, E0: tl.constexpr, E1: tl.constexpr, EB0: tl.constexpr, EB1: tl.constexpr,
    E: tl.constexpr,
    BT: tl.constexpr, BF: tl.constexpr, RUN: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """A program: BT rows by RUN columns, BF at a time; with SHRINK it leaves a part of the shrink of h.

    A tile without pages takes a leaner way.
    """
    part = tl.program_id(0)
    row = tl.program_id(1) * BT + tl.arange(0, BT)
    live = row < T
    tile = tl.program_id(1) * BT // TILE
    some = tl.full([], 0, tl.int64)
    if EDIT0:
        some = tl.maximum(some, any_page(gp, tile, E0))
    if EDIT1:
        some = tl.maximum(some, any_page(up, tile, E1))
    if SHRINK:
        some = tl.maximum(some, any_page(page_ptr, tile, E))
    if some > 0:
        _silu_rows(
            gu_ptr, gu_row, gu_column, gs, gb, gp, us, ub, up, a_ptr, page_ptr, h_out, part_out, part, row, live, tile,
            T, F, SCALED, EDIT0, EDIT1, SHRINK, E0, E1, EB0, EB1, E, BT, BF, RUN, STAGES,
        )  # fmt: skip
    else:
        _silu_rows(
            gu_ptr, gu_row, gu_column, gs, gb, gp, us, ub, up, a_ptr, page_ptr, h_out, part_out, part, row, live, tile,
            T, F, SCALED, False, False, False, E0, E1, EB0, EB1, E, BT, BF, RUN, STAGES,
        )  # fmt: skip
        if SHRINK:
            store_zeros(part_out + part.to(tl.int64) * (T * 16 * E), row, live, E)
