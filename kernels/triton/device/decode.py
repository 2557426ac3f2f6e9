"""Device code of the decode edit."""

import triton
import triton.language as tl


@triton.jit
def shrink_row_kernel(x_ptr, a_ptr, page_ptr, part_out, B: tl.constexpr, D: tl.constexpr, E: tl.constexpr,
                BD: tl.constexpr):  # fmt: skip
    """A program: a row by BD columns of x; leaves a part of s."""
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    r = tl.arange(0, 16)
    d = part * BD + tl.arange(0, BD)
    x = tl.load(x_ptr + row * D + d)
    for entry in range(E):
        page = tl.load(page_ptr + row * E + entry).to(tl.int64)
        if page != 0:
            a = tl.load(a_ptr + page * (16 * D) + d[:, None] * 16 + r[None, :]).to(x.dtype)
            s = tl.sum(x.to(tl.float32)[:, None] * a.to(tl.float32), 0)
            tl.store(part_out + ((part * B + row) * E + entry) * 16 + r, s)


@triton.jit
def expand_row_kernel(part_ptr, y_ptr, c_ptr, b_ptr, page_ptr, out_ptr, B: tl.constexpr, F: tl.constexpr,
                WIDTH: tl.constexpr, COLUMN: tl.constexpr, E: tl.constexpr, PARTS: tl.constexpr, PB: tl.constexpr,
                BF: tl.constexpr):  # fmt: skip
    """A program: a row by BF of the F columns of y from COLUMN on; adds up the parts of s."""
    row = tl.program_id(0).to(tl.int64)
    f = tl.program_id(1) * BF + tl.arange(0, BF)
    r = tl.arange(0, 16)
    part = tl.arange(0, PB)
    y = tl.load(y_ptr + row * WIDTH + COLUMN + f)
    acc = y.to(tl.float32)
    for entry in range(E):
        page = tl.load(page_ptr + row * E + entry).to(tl.int64)
        if page != 0:
            b = tl.load(b_ptr + page * (16 * F) + r[:, None] * F + f[None, :]).to(y.dtype)
            at = ((part * B + row) * E + entry)[:, None] * 16 + r[None, :]
            s = tl.sum(tl.load(part_ptr + at, mask=(part < PARTS)[:, None], other=0.0), 0)
            s += tl.load(c_ptr + page * 16 + r).to(tl.float32)
            acc += tl.sum(s.to(y.dtype).to(tl.float32)[:, None] * b.to(tl.float32), 0)
    tl.store(out_ptr + row * WIDTH + COLUMN + f, acc.to(y.dtype))


@triton.jit
def edit_row_kernel(x_ptr, y_ptr, a_ptr, c_ptr, b_ptr, page_ptr, out_ptr, D: tl.constexpr, F: tl.constexpr,
              WIDTH: tl.constexpr, COLUMN: tl.constexpr, BD: tl.constexpr, BF: tl.constexpr):  # fmt: skip
    """A program: a row from end to end, with one page."""
    row = tl.program_id(0).to(tl.int64)
    r = tl.arange(0, 16)
    page = tl.load(page_ptr + row).to(tl.int64)
    live = page != 0
    dtype: tl.constexpr = y_ptr.dtype.element_ty
    acc = tl.zeros([BD, 16], tl.float32)
    for at in tl.static_range(0, D, BD):
        d = at + tl.arange(0, BD)
        x = tl.load(x_ptr + row * D + d)
        a = tl.load(a_ptr + page * (16 * D) + d[:, None] * 16 + r[None, :], mask=live, other=0.0).to(x.dtype)
        acc += x.to(tl.float32)[:, None] * a.to(tl.float32)
    s = tl.sum(acc, 0) + tl.load(c_ptr + page * 16 + r).to(tl.float32)
    s = tl.where(live, s, 0.0).to(dtype).to(tl.float32)
    for at in tl.static_range(0, F, BF):
        f = at + tl.arange(0, BF)
        at_y = row * WIDTH + COLUMN + f
        y = tl.load(y_ptr + at_y).to(tl.float32)
        b = tl.load(b_ptr + page * (16 * F) + r[:, None] * F + f[None, :], mask=live, other=0.0).to(dtype)
        y += tl.sum(s[:, None] * b.to(tl.float32), 0)
        tl.store(out_ptr + at_y, y.to(dtype))
