"""Device code of the decode edit: up to three linears that read the same rows, each in programs of its own."""

import triton
import triton.language as tl


@triton.jit
def _shrink_row(x_ptr, a_ptr, page_ptr, part_out, row, part, D: tl.constexpr, E: tl.constexpr, BD: tl.constexpr):
    r = tl.arange(0, 16)
    d = part * BD + tl.arange(0, BD)
    x = tl.load(x_ptr + row * D + d)
    for entry in range(E):
        page = tl.load(page_ptr + row * E + entry).to(tl.int64)
        if page != 0:
            a = tl.load(a_ptr + page * (16 * D) + d[:, None] * 16 + r[None, :]).to(x.dtype)
            s = tl.sum(x.to(tl.float32)[:, None] * a.to(tl.float32), 0)
            tl.store(part_out + entry * 16 + r, s)


@triton.jit
def shrink_row_kernel(
    x_ptr, a0_ptr, page0_ptr, a1_ptr, page1_ptr, a2_ptr, page2_ptr, part_out,
    B: tl.constexpr, D: tl.constexpr, E0: tl.constexpr, E1: tl.constexpr, E2: tl.constexpr, PARTS: tl.constexpr,
    BD: tl.constexpr,
):  # fmt: skip
    """A program: a row by BD columns of x, for one linear; leaves a part of s.

    Parts of a linear lie one after the other, ``[PARTS, B, E, 16]``, those of the next behind them.
    """
    row, part, site = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    at = part * B + row
    if site == 0:
        _shrink_row(x_ptr, a0_ptr, page0_ptr, part_out + at * (E0 * 16), row, part, D, E0, BD)
    elif site == 1:
        part_out += PARTS * B * E0 * 16
        _shrink_row(x_ptr, a1_ptr, page1_ptr, part_out + at * (E1 * 16), row, part, D, E1, BD)
    else:
        part_out += PARTS * B * (E0 + E1) * 16
        _shrink_row(x_ptr, a2_ptr, page2_ptr, part_out + at * (E2 * 16), row, part, D, E2, BD)


@triton.jit
def _expand_row(
    part_ptr, y_ptr, c_ptr, b_ptr, page_ptr, out_ptr, row, block,
    B: tl.constexpr, F: tl.constexpr, E: tl.constexpr, PARTS: tl.constexpr, PB: tl.constexpr, BF: tl.constexpr,
):  # fmt: skip
    """``y_ptr`` and ``out_ptr`` point to the first of the row's F columns."""
    f = block * BF + tl.arange(0, BF)
    r = tl.arange(0, 16)
    part = tl.arange(0, PB)
    y = tl.load(y_ptr + f)
    acc = y.to(tl.float32)
    for entry in range(E):
        page = tl.load(page_ptr + row * E + entry).to(tl.int64)
        if page != 0:
            b = tl.load(b_ptr + page * (16 * F) + r[:, None] * F + f[None, :]).to(y.dtype)
            at = ((part * B + row) * E + entry)[:, None] * 16 + r[None, :]
            s = tl.sum(tl.load(part_ptr + at, mask=(part < PARTS)[:, None], other=0.0), 0)
            s += tl.load(c_ptr + page * 16 + r).to(tl.float32)
            acc += tl.sum(s.to(y.dtype).to(tl.float32)[:, None] * b.to(tl.float32), 0)
    tl.store(out_ptr + f, acc.to(y.dtype))


@triton.jit
def expand_row_kernel(
    part_ptr, y_ptr, c0_ptr, b0_ptr, page0_ptr, c1_ptr, b1_ptr, page1_ptr, c2_ptr, b2_ptr, page2_ptr, out_ptr,
    B: tl.constexpr, WIDTH: tl.constexpr,
    F0: tl.constexpr, COLUMN0: tl.constexpr, E0: tl.constexpr,
    F1: tl.constexpr, COLUMN1: tl.constexpr, E1: tl.constexpr,
    F2: tl.constexpr, COLUMN2: tl.constexpr, E2: tl.constexpr,
    PARTS: tl.constexpr, PB: tl.constexpr, BF: tl.constexpr,
):  # fmt: skip
    """A program: a row by some columns of one linear's output; adds up the parts of s."""
    row, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    first: tl.constexpr = F0 // BF
    second: tl.constexpr = first + F1 // BF
    y_ptr += row * WIDTH
    out_ptr += row * WIDTH
    if block < first:
        _expand_row(part_ptr, y_ptr + COLUMN0, c0_ptr, b0_ptr, page0_ptr, out_ptr + COLUMN0, row, block,
                    B, F0, E0, PARTS, PB, BF)  # fmt: skip
    elif block < second:
        part_ptr += PARTS * B * E0 * 16
        _expand_row(part_ptr, y_ptr + COLUMN1, c1_ptr, b1_ptr, page1_ptr, out_ptr + COLUMN1, row, block - first,
                    B, F1, E1, PARTS, PB, BF)  # fmt: skip
    else:
        part_ptr += PARTS * B * (E0 + E1) * 16
        _expand_row(part_ptr, y_ptr + COLUMN2, c2_ptr, b2_ptr, page2_ptr, out_ptr + COLUMN2, row, block - second,
                    B, F2, E2, PARTS, PB, BF)  # fmt: skip
