"""Device code of rounding rows to FP8."""

import triton
import triton.language as tl


@triton.jit
def scale_of(most):
    """Return the scales of rows whose largest magnitudes are known."""
    scale = most * (1 / 448)
    return tl.where(scale == 0, 1.0, scale)


@triton.jit
def rounded(x, scale):
    """Return float32 numbers in FP8, by the scales of their rows, which broadcast to them."""
    return tl.math.div_rn(x, scale).to(tl.float8e4nv)


@triton.jit
def quantize_kernel(x_ptr, x_out, scale_out, D: tl.constexpr, BD: tl.constexpr):
    """A program: one row, in registers."""
    d = tl.arange(0, BD)
    row = tl.program_id(0)
    at = row.to(tl.int64) * D + d
    x = tl.load(x_ptr + at, mask=d < D, other=0.0).to(tl.float32)
    scale = scale_of(tl.max(tl.abs(x), 0))
    tl.store(x_out + at, rounded(x, scale), mask=d < D)
    tl.store(scale_out + row, scale)


@triton.jit
def quantize_part_kernel(
    x_ptr, most_ptr, x_out, scale_out,
    T: tl.constexpr, D: tl.constexpr, BLOCKS: tl.constexpr, BB: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """A program: BT rows by BD columns, of rows whose blocks' largest magnitudes are known."""
    row = tl.program_id(1) * BT + tl.arange(0, BT)
    d = tl.program_id(0) * BD + tl.arange(0, BD)
    block = tl.arange(0, BB)
    live = row < T
    mask = live[:, None] & (block < BLOCKS)[None, :]
    most = tl.max(tl.load(most_ptr + row[:, None] * BLOCKS + block[None, :], mask=mask, other=0.0), 1)
    scale = scale_of(most)
    at = row.to(tl.int64)[:, None] * D + d[None, :]
    x = tl.load(x_ptr + at, mask=live[:, None], other=0.0).to(tl.float32)
    tl.store(x_out + at, rounded(x, scale[:, None]), mask=live[:, None])
    if tl.program_id(0) == 0:
        tl.store(scale_out + row, scale, mask=live)
