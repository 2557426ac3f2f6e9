"""Device code that writes rank pages to a bank."""

import triton
import triton.language as tl


@triton.jit
def chosen(k, slab0, slab1, slab2, slab3, slab4, slab5, slab6, slab7):
    """Return the slab of number k."""
    slab = slab0
    if k == 1:
        slab = slab1
    if k == 2:
        slab = slab2
    if k == 3:
        slab = slab3
    if k == 4:
        slab = slab4
    if k == 5:
        slab = slab5
    if k == 6:
        slab = slab6
    if k == 7:
        slab = slab7
    return slab


@triton.jit
def write_pages_kernel(
    slab0, slab1, slab2, slab3, slab4, slab5, slab6, slab7, page_ptr, a_in, c_in, b_in, a_out, c_out, b_out,
    P: tl.constexpr, WIDTH: tl.constexpr, AT: tl.constexpr, FIRST: tl.constexpr, A: tl.constexpr, B: tl.constexpr,
    R: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A program: BLOCK words of 32 bits of one slab's row of one layer. Widths are in words; page 0 is not written.

    The page of slab k stands at place ``FIRST + k`` of ``page_ptr``.
    """
    part, layer, k = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    word: tl.constexpr = tl.pointer_type(tl.int32)
    slab = chosen(k, slab0, slab1, slab2, slab3, slab4, slab5, slab6, slab7)
    page = tl.load(page_ptr + FIRST + k).to(tl.int64)
    if page > 0:
        source = slab.to(word) + layer.to(tl.int64) * WIDTH + AT
        place = layer.to(tl.int64) * P + page
        i = part * BLOCK + tl.arange(0, BLOCK)
        values = tl.load(source + i, mask=i < A + B)
        tl.store(a_out.to(word) + place * A + i, values, mask=i < A)
        tl.store(b_out.to(word) + place * B + (i - A), values, mask=(i >= A) & (i < A + B))
        if part == 0:
            r = tl.arange(0, R)
            tl.store(c_out.to(word) + place * R + r, tl.load(source + A + B + r))


@triton.jit
def write_scaled_pages_kernel(
    slab0, slab1, slab2, slab3, slab4, slab5, slab6, slab7, page_ptr, a_in, c_in, b_in, a_out, c_out, b_out,
    P: tl.constexpr, WIDTH: tl.constexpr, AT: tl.constexpr, FIRST: tl.constexpr, A: tl.constexpr, B: tl.constexpr,
    R: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """``write_pages_kernel`` of slabs in FP8: BLOCK numbers become those of the pools' dtype. Widths are in numbers."""
    part, layer, k = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    slab = chosen(k, slab0, slab1, slab2, slab3, slab4, slab5, slab6, slab7)
    page = tl.load(page_ptr + FIRST + k).to(tl.int64)
    if page > 0:
        source = slab + layer.to(tl.int64) * WIDTH + AT
        place = layer.to(tl.int64) * P + page
        i = part * BLOCK + tl.arange(0, BLOCK)
        mask = i < A + B
        numbers = (source + A + B).to(tl.pointer_type(tl.float32))  # Of each rank: c, A's scale, B's scale.
        rank = tl.where(i < A, R + i % R, 2 * R + (i - A) // (B // R))
        x = tl.load(source + i, mask=mask).to(tl.float32) * tl.load(numbers + rank, mask=mask)
        tl.store(a_out + place * A + i, x.to(a_out.dtype.element_ty), mask=i < A)
        tl.store(b_out + place * B + (i - A), x.to(b_out.dtype.element_ty), mask=(i >= A) & mask)
        if part == 0:
            r = tl.arange(0, R)
            tl.store(c_out + place * R + r, tl.load(numbers + r))
