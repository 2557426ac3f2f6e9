"""Device code of paged attention."""

import triton
import triton.language as tl

from kernels.triton.device.common import load_product, load_scales


@triton.jit
def _from_fp8(x):
    """Return numbers in FP8 as float16, in the layout they were loaded in.

    The compiler moves a conversion of its own behind the change to the layout of a product, and there reads values from
    shared memory byte by byte: they lie across its rows. It does not move what it cannot look into.
    """
    return tl.inline_asm_elementwise(
        "{ .reg .b16 low, high; mov.b32 {low, high}, $2; cvt.rn.f16x2.e4m3x2 $0, low; cvt.rn.f16x2.e4m3x2 $1, high; }",
        "=r,=r,r", [x.to(tl.int8, bitcast=True)], dtype=tl.float16, is_pure=False, pack=4,
    )  # fmt: skip


@triton.jit
def _attend_keys(
    q, kv_ptr, table_ptr, at, last, stop, best, total, acc,
    SCALE: tl.constexpr, K: tl.constexpr, C: tl.constexpr, PAGE: tl.constexpr, BN: tl.constexpr, MASK: tl.constexpr,
    WINDOW: tl.constexpr, FP8: tl.constexpr,
):  # fmt: skip
    """A step of the online softmax: BN keys from ``at`` on; ``kv_ptr`` and ``table_ptr`` of the head and the request.

    With MASK, keys from ``stop`` on and those after the ``last`` of a query are not seen, nor, unless WINDOW is 0,
    those before the WINDOW ones up to it. With FP8, values are converted from it where they are loaded.
    """
    n = at + tl.arange(0, BN)
    c = tl.arange(0, C)
    if PAGE % BN == 0:
        page = tl.load(table_ptr + at // PAGE).to(tl.int64)
        place = page * PAGE + at % PAGE + tl.arange(0, BN)
    elif MASK:
        page = tl.load(table_ptr + n // PAGE, mask=n < stop, other=0).to(tl.int64)
        place = page * PAGE + n % PAGE
    else:
        page = tl.load(table_ptr + n // PAGE).to(tl.int64)
        place = page * PAGE + n % PAGE
    base = kv_ptr + place[:, None] * (2 * K * C) + c[None, :]
    if MASK:
        k = tl.load(base, mask=(n < stop)[:, None], other=0.0)
        v = tl.load(base + C, mask=(n < stop)[:, None], other=0.0)
    else:
        k = tl.load(base)
        v = tl.load(base + C)
    if FP8:  # noqa: SIM108 (Triton compiles both sides of an expression)
        v = _from_fp8(v)
    else:
        v = v.to(q.dtype)
    score = tl.dot(q, tl.trans(k.to(q.dtype)), input_precision="tf32x3")
    if MASK:
        seen = (n[None, :] <= last[:, None]) & (n < stop)[None, :]
        if WINDOW:
            seen = seen & (n[None, :] > last[:, None] - WINDOW)
        score = tl.where(seen, score, float("-inf"))
    log2: tl.constexpr = SCALE * 1.4426950408889634
    new = tl.maximum(best, tl.max(score, 1) * log2)
    weight = tl.exp2(score * log2 - new[:, None])
    old = tl.exp2(best - new)
    total = total * old + tl.sum(weight, 1)
    acc = tl.dot(weight.to(q.dtype), v, acc * old[:, None], input_precision="tf32x3")
    return new, total, acc


@triton.jit
def attend_kernel(
    q_ptr, kv_ptr, table_ptr, request_ptr, offset_ptr, start_ptr, len_ptr, out_ptr, lse_ptr,
    SCALE: tl.constexpr, T: tl.constexpr, H: tl.constexpr, K: tl.constexpr, C: tl.constexpr, PAGE: tl.constexpr,
    WIDTH: tl.constexpr, G: tl.constexpr, GP: tl.constexpr, M: tl.constexpr, BQ: tl.constexpr, BN: tl.constexpr,
    SPLITS: tl.constexpr, WINDOW: tl.constexpr,
):  # fmt: skip
    """A program: BQ queries of one request for the G query heads of one KV head, over a split of the keys."""
    head, split = tl.program_id(0), tl.program_id(2)
    # The last queries see most keys: whoever begins with them has the short ones left to fill the end.
    block = tl.num_programs(1) - 1 - tl.program_id(1)
    request = tl.load(request_ptr + block)
    offset = tl.load(offset_ptr + block)
    start = tl.load(start_ptr + request)
    queries = tl.load(start_ptr + request + 1) - start
    keys = tl.load(len_ptr + request)
    m = tl.arange(0, M)
    c = tl.arange(0, C)
    query = offset + m // GP
    live = (m // GP < BQ) & (query < queries) & (m % GP < G)
    row = (start + query).to(tl.int64) * H + head * G + m % GP
    q = tl.load(q_ptr + row[:, None] * C + c[None, :], mask=live[:, None], other=0.0)
    if kv_ptr.dtype.element_ty == tl.float8e4nv and q.dtype == tl.bfloat16:
        q = q.to(tl.float16)  # What keys and values in FP8 are turned to by one instruction for two.
    prefix = keys - queries
    last = prefix + query
    stop = tl.minimum(keys, prefix + offset + BQ)
    first = 0
    if WINDOW:
        first = tl.maximum(prefix + offset - WINDOW + 1, 0) // BN * BN
    if SPLITS > 1:
        run = tl.cdiv(tl.cdiv(stop - first, BN), SPLITS) * BN
        first += split * run
        stop = tl.minimum(stop, first + run)
    # Up to here every query sees every key of a step.
    whole = first + tl.maximum(tl.minimum(stop, prefix + offset + 1) - first, 0) // BN * BN
    best = tl.full([M], -1.0e30, tl.float32)
    total = tl.zeros([M], tl.float32)
    acc = tl.zeros([M, C], tl.float32)
    table_ptr += request * WIDTH
    kv_ptr += 2 * head * C
    if WINDOW:
        # From here on the last query sees every key of a step, and so do those before it.
        inside = tl.minimum(tl.cdiv(tl.maximum(prefix + offset + BQ - WINDOW, 0), BN) * BN, stop)
        for at in range(first, inside, BN):
            best, total, acc = _attend_keys(
                q, kv_ptr, table_ptr, at, last, stop, best, total, acc, SCALE, K, C, PAGE, BN, True,
                WINDOW, False,
            )  # fmt: skip
        first = tl.maximum(first, inside)
        whole = tl.maximum(first, whole)
    for at in range(first, whole, BN):
        best, total, acc = _attend_keys(
            q, kv_ptr, table_ptr, at, last, stop, best, total, acc, SCALE, K, C, PAGE, BN, False, 0, False
        )
    for at in range(whole, stop, BN):
        best, total, acc = _attend_keys(
            q, kv_ptr, table_ptr, at, last, stop, best, total, acc, SCALE, K, C, PAGE, BN, True,
            WINDOW, False,
        )  # fmt: skip
    if SPLITS > 1:
        at_split = (split.to(tl.int64) * T * H) + row
        tl.store(out_ptr + at_split[:, None] * C + c[None, :], acc, mask=live[:, None])
        tl.store(lse_ptr + at_split * 2, best, mask=live)
        tl.store(lse_ptr + at_split * 2 + 1, total, mask=live)
    else:
        acc = tl.where(total[:, None] == 0, 0.0, acc / total[:, None])  # NaN stays: a request must fail by it.
        tl.store(out_ptr + row[:, None] * C + c[None, :], acc.to(out_ptr.dtype.element_ty), mask=live[:, None])


@triton.jit
def _normed(y, scale, weight_ptr, c, dtype: tl.constexpr):
    """Return channels ``c`` of normed heads in float32, rounded where RMS norms round."""
    weight = tl.load(weight_ptr + c).to(dtype).to(tl.float32)
    return ((y * scale).to(dtype).to(tl.float32) * weight).to(dtype).to(tl.float32)


@triton.jit
def decode_attend_kernel(
    qkv_ptr, qkv_row, qkv_column, cos_ptr, sin_ptr, kv_ptr, table_ptr, position_ptr, q_norm, k_norm,
    out_ptr, lse_ptr, kv_out,
    SCALE: tl.constexpr, B: tl.constexpr, H: tl.constexpr, K: tl.constexpr, C: tl.constexpr, PAGE: tl.constexpr,
    WIDTH: tl.constexpr, G: tl.constexpr, M: tl.constexpr, BN: tl.constexpr, SPLITS: tl.constexpr,
    NORM: tl.constexpr, EPS: tl.constexpr, WINDOW: tl.constexpr, SCALED: tl.constexpr, FP8: tl.constexpr,
):  # fmt: skip
    """A program: the G query heads of one KV head of a row, over a split of the keys before its token.

    The last split rotates the token's own key, writes it and its value to the pool, and attends to them from registers.
    """
    head, row, split = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2)
    dtype: tl.constexpr = qkv_ptr.dtype.element_ty
    position = tl.load(position_ptr + row)
    m = tl.arange(0, M)
    c = tl.arange(0, C)
    # Channel c turns with c + C / 2: first halves subtract, second halves add.
    other = (c + C // 2) % C
    cos = tl.load(cos_ptr + row * (C // 2) + c % (C // 2))
    sin = tl.load(sin_ptr + row * (C // 2) + c % (C // 2))
    sin = tl.where(c < C // 2, -sin, sin)
    token = row * ((H + 2 * K) * C)
    live = m < G
    row_scale = load_scales(qkv_row, row, None, SCALED)
    at_head = (head * G + m)[:, None] * C
    at_q = at_head + c[None, :]
    q = load_product(qkv_ptr, token + at_q, row_scale, qkv_column, at_q, live[:, None], live[:, None], SCALED)
    at_q = at_head + other[None, :]
    q_other = load_product(qkv_ptr, token + at_q, row_scale, qkv_column, at_q, live[:, None], live[:, None], SCALED)
    if NORM:
        scale = tl.rsqrt(tl.sum(q * q, 1) / C + EPS)[:, None]
        q = _normed(q, scale, q_norm, c[None, :], dtype)
        q_other = _normed(q_other, scale, q_norm, other[None, :], dtype)
    q = (q * cos[None, :] + q_other * sin[None, :]).to(dtype)
    if kv_ptr.dtype.element_ty == tl.float8e4nv and dtype == tl.bfloat16:
        q = q.to(tl.float16)
    own = position >= 0
    if SPLITS > 1:
        own = own & (split == SPLITS - 1)
    at_k = (H + head) * C
    own_k = load_product(qkv_ptr, token + at_k + c, row_scale, qkv_column, at_k + c, own, own, SCALED)
    k_other = load_product(qkv_ptr, token + at_k + other, row_scale, qkv_column, at_k + other, own, own, SCALED)
    if NORM:
        scale_k = tl.rsqrt(tl.sum(own_k * own_k, 0) / C + EPS)
        own_k = _normed(own_k, scale_k, k_norm, c, dtype) * cos
        own_k += _normed(k_other, scale_k, k_norm, other, dtype) * sin
    else:
        own_k = own_k * cos
        own_k += k_other * sin
    own_k = own_k.to(kv_ptr.dtype.element_ty)
    own_v = load_product(qkv_ptr, token + at_k + K * C + c, row_scale, qkv_column, at_k + K * C + c, own, own, SCALED)
    own_v = own_v.to(kv_ptr.dtype.element_ty)
    stop = position
    first = 0
    if WINDOW:
        first = tl.maximum(position - WINDOW + 1, 0) // BN * BN
    if SPLITS > 1:
        run = tl.cdiv(tl.cdiv(stop - first, BN), SPLITS) * BN
        first += split * run
        stop = tl.minimum(stop, first + run)
    best = tl.full([M], -1.0e30, tl.float32)
    total = tl.zeros([M], tl.float32)
    acc = tl.zeros([M, C], tl.float32)
    last = tl.zeros([M], tl.int32) + position
    for at in range(first, stop, BN):
        best, total, acc = _attend_keys(
            q, kv_ptr + 2 * head * C, table_ptr + row * WIDTH, at, last, stop, best, total, acc, SCALE, K, C, PAGE, BN,
            True, WINDOW, FP8,
        )  # fmt: skip
    if own:
        page = tl.load(table_ptr + row * WIDTH + position // PAGE).to(tl.int64)
        at_own = kv_out + ((page * PAGE + position % PAGE) * (2 * K) + 2 * head) * C + c
        tl.store(at_own, own_k)
        tl.store(at_own + C, own_v)
        score = tl.sum(q.to(tl.float32) * own_k.to(dtype).to(tl.float32)[None, :], 1) * (SCALE * 1.4426950408889634)
        new = tl.maximum(best, score)
        weight = tl.exp2(score - new)
        old = tl.exp2(best - new)
        total = total * old + weight
        acc = acc * old[:, None] + weight[:, None] * own_v.to(dtype).to(tl.float32)[None, :]
        best = new
    at_out = row * H + head * G + m
    if SPLITS > 1:
        at_split = split.to(tl.int64) * (B * H) + at_out
        tl.store(out_ptr + at_split[:, None] * C + c[None, :], acc, mask=live[:, None])
        tl.store(lse_ptr + at_split * 2, best, mask=live)
        tl.store(lse_ptr + at_split * 2 + 1, total, mask=live)
    else:
        acc = tl.where(total[:, None] == 0, 0.0, acc / total[:, None])  # NaN stays: a request must fail by it.
        tl.store(out_ptr + at_out[:, None] * C + c[None, :], acc.to(out_ptr.dtype.element_ty), mask=live[:, None])


@triton.jit
def combine_kernel(part_ptr, lse_ptr, out_ptr, ROWS: tl.constexpr, C: tl.constexpr, SPLITS: tl.constexpr,
             SP: tl.constexpr):  # fmt: skip
    """A program: one head of one query; weighs the splits by their softmax sums."""
    row = tl.program_id(0).to(tl.int64)
    split = tl.arange(0, SP)
    c = tl.arange(0, C)
    here = split < SPLITS
    at = split * ROWS + row
    best = tl.load(lse_ptr + at * 2, mask=here, other=-1.0e30)
    total = tl.load(lse_ptr + at * 2 + 1, mask=here, other=0.0)
    scale = tl.where(total == 0, 0.0, tl.exp2(best - tl.max(best, 0)))
    part = tl.load(part_ptr + at[:, None] * C + c[None, :], mask=here[:, None], other=0.0)
    part = tl.where((total == 0)[:, None], 0.0, part * scale[:, None])
    weight = tl.sum(total * scale, 0)
    out = tl.where(weight == 0, 0.0, tl.sum(part, 0) / weight)
    tl.store(out_ptr + row * C + c, out.to(out_ptr.dtype.element_ty))
