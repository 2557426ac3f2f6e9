"""Device code of the unfused edit."""

import triton
import triton.language as tl

from kernels.triton.device.common import add_edit, finish_shrink, load_a, load_pages


@triton.jit
def shrink_kernel(
    x_ptr, a0, c0, page0, own0, a1, c1, page1, own1, a2, c2, page2, own2, s0, s1, s2,
    T: tl.constexpr, D: tl.constexpr, TILE: tl.constexpr, SITES: tl.constexpr, E: tl.constexpr, EB: tl.constexpr,
    BT: tl.constexpr, BD: tl.constexpr, PARTS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """A program: BT rows, all of the width or a part of it, EB entries of up to three sites.

    A tile without pages is not read.
    """
    row = tl.program_id(0) * BT + tl.arange(0, BT)
    entry = tl.program_id(1) * EB
    part = tl.program_id(2)
    live = row < T
    tile = tl.program_id(0) * BT // TILE
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    p0 = load_pages(page0, tile, entry, E, EB)
    p1 = load_pages(page1, tile, entry, E, EB)
    p2 = load_pages(page2, tile, entry, E, EB)
    acc0 = tl.zeros([BT, 16 * EB], tl.float32)
    acc1 = tl.zeros([BT, 16 * EB], tl.float32)
    acc2 = tl.zeros([BT, 16 * EB], tl.float32)
    RUN: tl.constexpr = D // PARTS
    stop = part * RUN + tl.where(tl.max(tl.maximum(tl.maximum(p0, p1), p2)) > 0, RUN, 0)
    for start in tl.range(part * RUN, stop, BD, num_stages=STAGES):
        d = start + tl.arange(0, BD)
        x = tl.load(x_ptr + row.to(tl.int64)[:, None] * D + d[None, :], mask=live[:, None], other=0.0)
        acc0 = tl.dot(x, load_a(a0, p0, d, D, EB, dtype), acc0, input_precision="tf32x3")
        if SITES > 1:
            acc1 = tl.dot(x, load_a(a1, p1, d, D, EB, dtype), acc1, input_precision="tf32x3")
        if SITES > 2:
            acc2 = tl.dot(x, load_a(a2, p2, d, D, EB, dtype), acc2, input_precision="tf32x3")
    if PARTS == 1:
        finish_shrink(acc0, c0, page0, own0, s0, row, live, tile, entry, E, EB)
        if SITES > 1:
            finish_shrink(acc1, c1, page1, own1, s1, row, live, tile, entry, E, EB)
        if SITES > 2:
            finish_shrink(acc2, c2, page2, own2, s2, row, live, tile, entry, E, EB)
    else:
        at = (part * T + row)[:, None] * (16 * E) + entry * 16 + tl.arange(0, 16 * EB)[None, :]
        tl.store(s0 + at, acc0, mask=live[:, None])
        if SITES > 1:
            tl.store(s1 + at, acc1, mask=live[:, None])
        if SITES > 2:
            tl.store(s2 + at, acc2, mask=live[:, None])


@triton.jit
def expand_kernel(
    y_ptr, s_ptr, b_ptr, page_ptr, out_ptr,
    T: tl.constexpr, F: tl.constexpr, TILE: tl.constexpr, E: tl.constexpr, EB: tl.constexpr,
    BT: tl.constexpr, BF: tl.constexpr,
):  # fmt: skip
    """A program: BT rows by BF columns of y, all entries."""
    row = tl.program_id(1) * BT + tl.arange(0, BT)
    live = row < T
    f = tl.program_id(0) * BF + tl.arange(0, BF)
    offset = row.to(tl.int64)[:, None] * F + f[None, :]
    y = tl.load(y_ptr + offset, mask=live[:, None], other=0.0)
    tile = tl.program_id(1) * BT // TILE
    new = add_edit(y.to(tl.float32), s_ptr, b_ptr, page_ptr, row, live, tile, f, F, E, EB, y.dtype)
    tl.store(out_ptr + offset, new.to(y.dtype), mask=live[:, None])
