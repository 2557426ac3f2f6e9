"""Pieces of kernels: the two halves of an edit on a block of rows.

A block of rows lies in one tile, so it has one list of pages. Entries of the list are columns of one matrix product:
column k belongs to entry k // 16. Null pages are not read: their products are with zeros.
"""

import triton
import triton.language as tl


@triton.jit
def load_scales(scale_ptr, at, mask, SCALED: tl.constexpr):
    """Return the scales of rows or columns; 1 if a product is not SCALED. ``mask`` None reads all of them."""
    if SCALED == 0:
        scale = 1.0
    elif mask is None:
        scale = tl.load(scale_ptr + at)
    else:
        scale = tl.load(scale_ptr + at, mask=mask, other=0.0)
    return scale


@triton.jit
def load_product(y_ptr, at, row_scale, column_ptr, column, mask, column_mask, SCALED: tl.constexpr):
    """Return elements ``at`` of a product in float32, with the scales of their rows and columns, and their bias.

    SCALED says how many numbers there are for a column: none, its scale, or its scale and its bias. ``mask`` is of the
    elements, ``column_mask`` of ``column`` (None reads all).
    """
    y = tl.load(y_ptr + at, mask=mask, other=0.0).to(tl.float32)
    if SCALED > 0:
        y = y * row_scale * load_scales(column_ptr, column * SCALED, column_mask, SCALED)
    if SCALED > 1:
        y += load_scales(column_ptr, column * SCALED + 1, column_mask, SCALED)
    return y


@triton.jit
def load_pages(page_ptr, tile, entry, E: tl.constexpr, EB: tl.constexpr):
    """Return the page of each column of ``EB`` entries, int64 ``[16 EB]``."""
    column = tl.arange(0, 16 * EB)
    return tl.load(page_ptr + tile * E + entry + column // 16).to(tl.int64)


@triton.jit
def load_a(a_ptr, page, d, D: tl.constexpr, EB: tl.constexpr, dtype: tl.constexpr):
    """Return A of several pages side by side, ``[len(d), 16 EB]``."""
    column = tl.arange(0, 16 * EB)
    offset = tl.max_contiguous(
        tl.multiple_of((page * (16 * D) + column % 16)[None, :] + d[:, None] * 16, [1, 16]), [1, 16]
    )
    return tl.load(a_ptr + offset, mask=(page > 0)[None, :], other=0.0).to(dtype)


@triton.jit
def load_b(b_ptr, page, f, F: tl.constexpr, EB: tl.constexpr, dtype: tl.constexpr):
    """Return B of several pages below each other, ``[16 EB, len(f)]``."""
    row = tl.arange(0, 16 * EB)
    offset = (page * (16 * F) + (row % 16) * F)[:, None] + f[None, :]
    return tl.load(b_ptr + offset, mask=(page > 0)[:, None], other=0.0).to(dtype)


@triton.jit
def load_s(s_ptr, row, live, entry, E: tl.constexpr, EB: tl.constexpr, dtype: tl.constexpr):
    """Return the shrunk rows of several entries, ``[len(row), 16 EB]``."""
    column = entry * 16 + tl.arange(0, 16 * EB)
    return tl.load(s_ptr + row[:, None] * (16 * E) + column[None, :], mask=live[:, None], other=0.0).to(dtype)


@triton.jit
def add_edit(y, s_ptr, b_ptr, page_ptr, row, live, tile, f, F: tl.constexpr, E: tl.constexpr, EB: tl.constexpr,
             dtype: tl.constexpr):  # fmt: skip
    """Return float32 ``y + s @ B`` for rows of one tile and output columns ``f``."""
    for entry in range(0, E, EB):
        page = load_pages(page_ptr, tile, entry, E, EB)
        s = load_s(s_ptr, row, live, entry, E, EB, dtype)
        y = tl.dot(s, load_b(b_ptr, page, f, F, EB, dtype), y, input_precision="tf32x3")
    return y


@triton.jit
def finish_shrink(s, c_ptr, page_ptr, own_ptr, out_ptr, row, live, tile, entry, E: tl.constexpr, EB: tl.constexpr):
    """Add c, mask, and store float32 ``s [len(row), 16 EB]``."""
    column = tl.arange(0, 16 * EB)
    page = load_pages(page_ptr, tile, entry, E, EB)
    c = tl.load(c_ptr + page * 16 + column % 16, mask=page > 0, other=0.0).to(tl.float32)
    own = tl.load(own_ptr + row[:, None] * E + entry + (column // 16)[None, :], mask=live[:, None], other=0)
    s = tl.where(own != 0, s + c[None, :], 0.0)
    tl.store(out_ptr + row[:, None] * (16 * E) + entry * 16 + column[None, :], s, mask=live[:, None])


@triton.jit
def any_page(page_ptr, tile, E: tl.constexpr):
    """Return the largest page of a tile's list: 0 if it lists none."""
    most = tl.full([], 0, tl.int64)
    for entry in range(E):
        most = tl.maximum(most, tl.load(page_ptr + tile * E + entry).to(tl.int64))
    return most


@triton.jit
def store_zeros(out_ptr, row, live, E: tl.constexpr):
    """Store a shrink of nothing, entry by entry."""
    r = tl.arange(0, 16)
    for entry in range(E):
        at = row[:, None] * (16 * E) + entry * 16 + r[None, :]
        tl.store(out_ptr + at, tl.zeros([row.shape[0], 16], tl.float32), mask=live[:, None])
