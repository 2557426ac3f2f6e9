"""Device code of rotation and of the gated activation, with the edits that fall there."""

import triton
import triton.language as tl

from kernels.triton.device.common import (
    add_edit,
    any_page,
    load_a,
    load_b,
    load_pages,
    load_product,
    load_s,
    load_scales,
    store_zeros,
)


@triton.jit
def _rope_head(
    qkv_ptr, row_scale, qkv_column, s_ptr, b_ptr, page_ptr, row, live, tile, column, head, F: tl.constexpr,
    WIDTH: tl.constexpr, C: tl.constexpr, E: tl.constexpr, EB: tl.constexpr, EDIT: tl.constexpr, SCALED: tl.constexpr,
):  # fmt: skip
    """Return the two halves of one head in float32, edited."""
    half = tl.arange(0, C // 2)
    base = row.to(tl.int64)[:, None] * WIDTH
    at = column + half[None, :]
    first = load_product(qkv_ptr, base + at, row_scale, qkv_column, at, live[:, None], None, SCALED)
    at += C // 2
    second = load_product(qkv_ptr, base + at, row_scale, qkv_column, at, live[:, None], None, SCALED)
    dtype: tl.constexpr = qkv_ptr.dtype.element_ty
    if EDIT:
        f = head * C + half
        first = add_edit(first, s_ptr, b_ptr, page_ptr, row, live, tile, f, F, E, EB, dtype)
        second = add_edit(second, s_ptr, b_ptr, page_ptr, row, live, tile, f + C // 2, F, E, EB, dtype)
    return first, second


@triton.jit
def _norm_head(a, b, weight_ptr, C: tl.constexpr, EPS: tl.constexpr, dtype: tl.constexpr):
    """Norm the two halves of a head in float32, rounded where RMS norms round."""
    half = tl.arange(0, C // 2)
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
    row_scale = load_scales(qkv_row, row[:, None], live[:, None], SCALED)
    if first_head < H + K:
        cos = tl.load(cos_ptr + table, mask=live[:, None], other=0.0)
        sin = tl.load(sin_ptr + table, mask=live[:, None], other=0.0)
        if first_head < H:
            for n in range(HB):
                head = first_head + n
                a, b = _rope_head(
                    qkv_ptr, row_scale, qkv_column, s0, b0, page0, row, live, tile, head * C, head, H * C,
                    WIDTH, C, E0, EB0, EDIT0, SCALED,
                )  # fmt: skip
                if NORM:
                    a, b = _norm_head(a, b, q_norm, C, EPS, dtype)
                at = q_out + row.to(tl.int64)[:, None] * (H * C) + head * C + half[None, :]
                tl.store(at, (a * cos - b * sin).to(dtype), mask=live[:, None])
                tl.store(at + C // 2, (b * cos + a * sin).to(dtype), mask=live[:, None])
        else:
            slot = tl.load(slot_ptr + row, mask=live, other=-1)
            kept = (slot >= 0) & (slot < SLOTS)
            for n in range(HB):
                head = first_head - H + n
                a, b = _rope_head(
                    qkv_ptr, row_scale, qkv_column, s1, b1, page1, row, live, tile, (H + head) * C, head, K * C,
                    WIDTH, C, E1, EB1, EDIT1, SCALED,
                )  # fmt: skip
                if NORM:
                    a, b = _norm_head(a, b, k_norm, C, EPS, dtype)
                at = kv_out + (slot.to(tl.int64)[:, None] * (2 * K) + 2 * head) * C + half[None, :]
                tl.store(at, (a * cos - b * sin).to(kv_out.dtype.element_ty), mask=kept[:, None])
                tl.store(at + C // 2, (b * cos + a * sin).to(kv_out.dtype.element_ty), mask=kept[:, None])
    else:
        slot = tl.load(slot_ptr + row, mask=live, other=-1)
        kept = (slot >= 0) & (slot < SLOTS)
        for n in range(HB):
            head = first_head - H - K + n
            a, b = _rope_head(
                qkv_ptr, row_scale, qkv_column, s2, b2, page2, row, live, tile, (H + K + head) * C, head, K * C,
                WIDTH, C, E2, EB2, EDIT2, SCALED,
            )  # fmt: skip
            at = kv_out + (slot.to(tl.int64)[:, None] * (2 * K) + 2 * head + 1) * C + half[None, :]
            tl.store(at, a.to(kv_out.dtype.element_ty), mask=kept[:, None])
            tl.store(at + C // 2, b.to(kv_out.dtype.element_ty), mask=kept[:, None])


@triton.jit
def _gate_up(gu_ptr, row_scale, gu_column, at, column, mask, F: tl.constexpr, SCALED: tl.constexpr):
    """Return elements ``at`` of gate, and those of up, in float32."""
    gate = load_product(gu_ptr, at, row_scale, gu_column, column, mask, None, SCALED)
    return gate, load_product(gu_ptr, at + F, row_scale, gu_column, F + column, mask, None, SCALED)


@triton.jit
def _silu_mul(gate, upper):
    """Return SiLU of gate times up. The square of a reciprocal root takes a fraction of a division's instructions."""
    root = tl.rsqrt(1 + tl.exp2(gate * -1.4426950408889634))
    return gate * (root * root) * upper


@triton.jit
def _silu_rows(
    gu_ptr, gu_row, gu_column, gs, gb, gp, us, ub, up, a_ptr, page_ptr, h_out, most_out, part_out, part, row, live,
    tile,
    T: tl.constexpr, F: tl.constexpr, SCALED: tl.constexpr, EDIT0: tl.constexpr, EDIT1: tl.constexpr,
    SHRINK: tl.constexpr, MOST: tl.constexpr,
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
    row_scale = load_scales(gu_row, row[:, None], live[:, None], SCALED)
    most = tl.zeros([BT, BF], tl.float32)
    for start in tl.range(part * RUN, part * RUN + RUN, BF, num_stages=STAGES):
        f = start + tl.arange(0, BF)
        at = row.to(tl.int64)[:, None] * (2 * F) + f[None, :]
        gate, upper = _gate_up(gu_ptr, row_scale, gu_column, at, f[None, :], live[:, None], F, SCALED)
        if EDIT0:
            if E0 == EB0:
                gate = tl.dot(gate_s, load_b(gb, gate_page, f, F, EB0, dtype), gate, input_precision="tf32x3")
            else:
                gate = add_edit(gate, gs, gb, gp, row, live, tile, f, F, E0, EB0, dtype)
        if EDIT1:
            if E1 == EB1:
                upper = tl.dot(up_s, load_b(ub, up_page, f, F, EB1, dtype), upper, input_precision="tf32x3")
            else:
                upper = add_edit(upper, us, ub, up, row, live, tile, f, F, E1, EB1, dtype)
        h32 = _silu_mul(gate, upper)
        h = h32.to(dtype)
        tl.store(h_out + row.to(tl.int64)[:, None] * F + f[None, :], h, mask=live[:, None])
        if MOST:
            most = tl.maximum(most, tl.abs(h32))
        if SHRINK:
            acc = tl.dot(h, load_a(a_ptr, page, f, F, E, dtype), acc, input_precision="tf32x3")
    if MOST:
        tl.store(most_out + row * (F // RUN) + part, tl.max(most, 1).to(dtype).to(tl.float32), mask=live)
    if SHRINK:
        column = tl.arange(0, 16 * E)
        at = (part.to(tl.int64) * T + row)[:, None] * (16 * E) + column[None, :]
        tl.store(part_out + at, acc, mask=live[:, None])


@triton.jit
def silu_mul_plain_kernel(
    gu_ptr, gu_row, gu_column, h_out, most_out,
    T: tl.constexpr, F: tl.constexpr, BT: tl.constexpr, BF: tl.constexpr, SCALED: tl.constexpr, MOST: tl.constexpr,
):  # fmt: skip
    """A program: BT rows by BF columns without edits; with MOST it leaves the largest of them of each row."""
    row = tl.program_id(1) * BT + tl.arange(0, BT)
    f = tl.program_id(0) * BF + tl.arange(0, BF)
    live = (row < T)[:, None]
    at = row.to(tl.int64)[:, None] * F + f[None, :]
    wide = at + row.to(tl.int64)[:, None] * F
    row_scale = load_scales(gu_row, row[:, None], live, SCALED)
    gate, upper = _gate_up(gu_ptr, row_scale, gu_column, wide, f[None, :], live, F, SCALED)
    dtype: tl.constexpr = h_out.dtype.element_ty
    h = _silu_mul(gate, upper)
    tl.store(h_out + at, h.to(dtype), mask=live)
    if MOST:
        most = tl.max(tl.abs(h), 1).to(dtype).to(tl.float32)
        tl.store(most_out + row * (F // BF) + tl.program_id(0), most, mask=row < T)


@triton.jit
def silu_mul_kernel(
    gu_ptr, gu_row, gu_column, gs, gb, gp, us, ub, up, a_ptr, page_ptr, h_out, most_out, part_out,
    T: tl.constexpr, F: tl.constexpr, TILE: tl.constexpr, SCALED: tl.constexpr, EDIT0: tl.constexpr,
    EDIT1: tl.constexpr, SHRINK: tl.constexpr, MOST: tl.constexpr,
    E0: tl.constexpr, E1: tl.constexpr, EB0: tl.constexpr, EB1: tl.constexpr, E: tl.constexpr,
    BT: tl.constexpr, BF: tl.constexpr, RUN: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """A program: BT rows by RUN columns, BF at a time; with SHRINK it leaves a part of the shrink of h, with MOST the
    largest of h in its columns of each row.

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
            gu_ptr, gu_row, gu_column, gs, gb, gp, us, ub, up, a_ptr, page_ptr, h_out, most_out, part_out, part, row,
            live, tile, T, F, SCALED, EDIT0, EDIT1, SHRINK, MOST, E0, E1, EB0, EB1, E, BT, BF, RUN, STAGES,
        )  # fmt: skip
    else:
        _silu_rows(
            gu_ptr, gu_row, gu_column, gs, gb, gp, us, ub, up, a_ptr, page_ptr, h_out, most_out, part_out, part, row,
            live, tile, T, F, SCALED, False, False, False, MOST, E0, E1, EB0, EB1, E, BT, BF, RUN, STAGES,
        )  # fmt: skip
        if SHRINK:
            store_zeros(part_out + part.to(tl.int64) * (T * 16 * E), row, live, E)
