"""Device code of the backward passes."""

import triton
import triton.language as tl

from kernels.triton.device.common import load_pages, load_s


@triton.jit
def expand_backward_kernel(
    dy_ptr, s_ptr, b_ptr, order_ptr, first_ptr, ds_out, db_out,
    T: tl.constexpr, F: tl.constexpr, TILE: tl.constexpr, E: tl.constexpr, BT: tl.constexpr, BF: tl.constexpr,
):  # fmt: skip
    """A program: a page by BF columns; dB over the tiles that list the page, and a part of their ds."""
    page = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1).to(tl.int64)
    f = part * BF + tl.arange(0, BF)
    r = tl.arange(0, 16)
    dtype: tl.constexpr = dy_ptr.dtype.element_ty
    at_page = page * (16 * F) + r[:, None] * F + f[None, :]
    first = tl.load(first_ptr + page)
    last = tl.load(first_ptr + page + 1)
    acc = tl.zeros([16, BF], tl.float32)
    if last > first:
        b = tl.load(b_ptr + at_page).to(dtype)
        STEPS: tl.constexpr = TILE // BT
        for step in range(first * STEPS, last * STEPS):
            listed = tl.load(order_ptr + step // STEPS)
            row = (listed // E) * TILE + (step % STEPS) * BT + tl.arange(0, BT)
            dy = tl.load(dy_ptr + row.to(tl.int64)[:, None] * F + f[None, :])
            s = tl.load(s_ptr + row[:, None] * (16 * E) + (listed % E) * 16 + r[None, :]).to(dtype)
            acc = tl.dot(tl.trans(s), dy, acc, input_precision="tf32x3")
            ds = tl.dot(dy, tl.trans(b), input_precision="tf32x3")
            tl.store(ds_out + (part * T + row)[:, None] * (16 * E) + (listed % E) * 16 + r[None, :], ds)
    tl.store(db_out + at_page, acc.to(db_out.dtype.element_ty))


@triton.jit
def page_backward_kernel(
    x_ptr, ds_ptr, own_ptr, order_ptr, first_ptr, da_out, dc_out,
    T: tl.constexpr, D: tl.constexpr, TILE: tl.constexpr, E: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """A program: a page by BD columns; dA, and dc in the first, over the tiles that list the page."""
    page = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    d = part * BD + tl.arange(0, BD)
    r = tl.arange(0, 16)
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    first = tl.load(first_ptr + page)
    last = tl.load(first_ptr + page + 1)
    acc = tl.zeros([BD, 16], tl.float32)
    dc = tl.zeros([16], tl.float32)
    STEPS: tl.constexpr = TILE // BT
    for step in range(first * STEPS, last * STEPS):
        listed = tl.load(order_ptr + step // STEPS)
        row = (listed // E) * TILE + (step % STEPS) * BT + tl.arange(0, BT)
        x = tl.load(x_ptr + row.to(tl.int64)[:, None] * D + d[None, :])
        own = tl.load(own_ptr + row * E + listed % E)
        ds = tl.load(ds_ptr + row[:, None] * (16 * E) + (listed % E) * 16 + r[None, :])
        ds = tl.where((own != 0)[:, None], ds, 0.0)
        acc = tl.dot(tl.trans(x), ds.to(dtype), acc, input_precision="tf32x3")
        dc += tl.sum(ds, 0)
    tl.store(da_out + page * (16 * D) + d[:, None] * 16 + r[None, :], acc.to(da_out.dtype.element_ty))
    if part == 0:
        tl.store(dc_out + page * 16 + r, dc.to(dc_out.dtype.element_ty))


@triton.jit
def _add_dx(acc, ds_ptr, own_ptr, a_ptr, page_ptr, row, tile, d, D: tl.constexpr, E: tl.constexpr, EB: tl.constexpr,
            dtype: tl.constexpr):  # fmt: skip
    """Return ``acc + ds @ A^T`` for rows of one tile and columns ``d``."""
    live = row >= 0
    column = tl.arange(0, 16 * EB)
    for entry in range(0, E, EB):
        page = load_pages(page_ptr, tile, entry, E, EB)
        ds = load_s(ds_ptr, row, live, entry, E, EB, tl.float32)
        own = tl.load(own_ptr + row[:, None] * E + entry + (column // 16)[None, :])
        ds = tl.where(own != 0, ds, 0.0).to(dtype)
        at = (page * (16 * D) + column % 16)[:, None] + d[None, :] * 16
        a = tl.load(a_ptr + at, mask=(page > 0)[:, None], other=0.0).to(dtype)
        acc = tl.dot(ds, a, acc, input_precision="tf32x3")
    return acc


@triton.jit
def x_backward_kernel(
    ds0, own0, a0, page0, ds1, own1, a1, page1, ds2, own2, a2, page2, dx_out,
    D: tl.constexpr, TILE: tl.constexpr, SITES: tl.constexpr, E: tl.constexpr, EB: tl.constexpr,
    BT: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """A program: BT rows by BD columns of dx, all entries of up to three sites."""
    row = tl.program_id(1) * BT + tl.arange(0, BT)
    tile = tl.program_id(1) * BT // TILE
    d = tl.program_id(0) * BD + tl.arange(0, BD)
    dtype: tl.constexpr = dx_out.dtype.element_ty
    acc = _add_dx(tl.zeros([BT, BD], tl.float32), ds0, own0, a0, page0, row, tile, d, D, E, EB, dtype)
    if SITES > 1:
        acc = _add_dx(acc, ds1, own1, a1, page1, row, tile, d, D, E, EB, dtype)
    if SITES > 2:
        acc = _add_dx(acc, ds2, own2, a2, page2, row, tile, d, D, E, EB, dtype)
    tl.store(dx_out + row.to(tl.int64)[:, None] * D + d[None, :], acc.to(dtype))
