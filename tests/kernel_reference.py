"""The operations of ``kernels.api`` in float64 NumPy, written from their definitions and from nothing in ``kernels``.

Edits go entry by entry of each tile, attention query by query: slow, and plain enough to be checked by eye.
"""

import numpy as np

from bench.edit_case import NORM_EPS


def f64(array):
    return np.asarray(array).astype(np.float64)


def entries(tiles, mask):
    """Yield ``(rows, e, page)``: which tokens entry e of a tile edits, and with which page. Null pages edit nothing."""
    mask = np.asarray(mask)
    page, start, end, group = (np.asarray(array) for array in tiles)
    size = len(mask) // len(page)
    for n, e in np.argwhere(page > 0):
        span = np.arange(n * size + start[n, e], n * size + end[n, e])
        yield span[mask[span, group[n, e]]], e, page[n, e]


def shrink(x, site, mask):
    a, c, _ = map(f64, site.pool)
    s = np.zeros((len(x), site.tiles.page_NE.shape[1], a.shape[2]))
    for rows, e, page in entries(site.tiles, mask):
        s[rows, e] = x[rows] @ a[page] + c[page]
    return s


def expand(edit, y):
    """Add ``s @ B``. What ``s`` holds for a token that its entry does not edit is zero, by the contract of shrink."""
    s, b, out = f64(edit.s_TER), f64(edit.site.pool.b_PRF), y.copy()
    everyone = np.ones((len(y), 2), bool)
    for rows, e, page in entries(edit.site.tiles, everyone):
        out[rows] += s[rows, e] @ b[page]
    return out


def lowrank_edit(x, y, site, mask):
    a, c, b = map(f64, site.pool)
    out = y.copy()
    for rows, _, page in entries(site.tiles, mask):
        out[rows] += (x[rows] @ a[page] + c[page]) @ b[page]
    return out


def lowrank_gradients(x, site, mask, dy, s=None):
    """Return ``(dx, dA, dc, dB)`` for ``dy``, the cotangent of the edited y, page by page by the chain rule.

    With ``s`` given, dB is taken from it rather than from x.
    """
    a, c, b = map(f64, site.pool)
    dx, da, dc, db = np.zeros(x.shape), np.zeros(a.shape), np.zeros(c.shape), np.zeros(b.shape)
    for rows, e, page in entries(site.tiles, mask):
        ds = dy[rows] @ b[page].T
        dx[rows] += ds @ a[page].T
        da[page] += x[rows].T @ ds
        dc[page] += ds.sum(axis=0)
        db[page] += (x[rows] @ a[page] + c[page] if s is None else s[rows, e]).T @ dy[rows]
    return dx, da, dc, db


def norm_shrink(x, edits, block, weight, sites, mask):
    for edit in edits:
        x = expand(edit, x)
    if block is not None:
        x = lowrank_edit(x, x, block, mask)
    h = x / np.sqrt((x * x).mean(axis=1, keepdims=True) + NORM_EPS) * weight
    return x, h, tuple(shrink(h, site, mask) for site in sites)


def head_norm(x, weight):
    return x if weight is None else x / np.sqrt((x * x).mean(axis=-1, keepdims=True) + NORM_EPS) * f64(weight)


def rope_kv(qkv, edits, cos, sin, kv, slots, norms=(None, None)):
    tokens, (pages, size, heads2, channels) = len(qkv), kv.shape
    kv_width = heads2 // 2 * channels
    parts = np.split(qkv, (qkv.shape[1] - 2 * kv_width, qkv.shape[1] - kv_width), axis=1)
    parts = [part if edit is None else expand(edit, part) for part, edit in zip(parts, edits, strict=True)]
    q, k, v = (part.reshape(tokens, -1, channels) for part in parts)

    def rotate(x):
        """Turn the pair of channels (i, i + C / 2) by the token's i-th angle."""
        pairs = (x[..., : channels // 2] + 1j * x[..., channels // 2 :]) * (cos + 1j * sin)[:, None]
        return np.concatenate([pairs.real, pairs.imag], axis=-1)

    kv = kv.copy()
    q, k = (rotate(head_norm(x, weight)) for x, weight in zip((q, k), norms, strict=True))
    for token, slot in enumerate(slots):
        if slot < pages * size:
            kv[slot // size, slot % size, 0::2] = k[token]
            kv[slot // size, slot % size, 1::2] = v[token]
    return q, kv


def silu_mul_shrink(gate_up, edits, sites, mask):
    parts = np.split(gate_up, 2, axis=1)
    gate, up = (part if edit is None else expand(edit, part) for part, edit in zip(parts, edits, strict=True))
    h = gate / (1 + np.exp(-gate)) * up
    return h, tuple(shrink(h, site, mask) for site in sites)


def decode_edit(x, y, pools, pages):
    """Edit outputs of linears side by side, row by row."""
    out, column = y.copy(), 0
    for pool, rows in zip(pools, pages, strict=True):
        a, c, b = map(f64, pool)
        for row, own in enumerate(np.asarray(rows)):
            for page in own[own > 0]:
                out[row, column : column + b.shape[2]] += (x[row] @ a[page] + c[page]) @ b[page]
        column += b.shape[2]
    return out


def edit_op(op, inputs):
    """Return what ``edit_case.run_edit`` should, in float64."""
    x = None if inputs.x_TD is None else f64(inputs.x_TD)
    y = None if inputs.y_TF is None else f64(inputs.y_TF)
    sites, edits, mask = inputs.sites, inputs.edits, inputs.mask_TG
    match op:
        case "shrink":
            return tuple(shrink(x, site, mask) for site in sites)
        case "expand":
            return expand(edits[0], y)
        case "lowrank_edit":
            return lowrank_edit(x, y, sites[0], mask)
        case "norm_shrink":
            return norm_shrink(x, edits, inputs.block, f64(inputs.weight_D), sites, mask)
        case "rope_kv":
            rope = f64(inputs.cos_TX), f64(inputs.sin_TX)
            norms = inputs.q_norm_C, inputs.k_norm_C
            return rope_kv(x, edits, *rope, f64(inputs.kv_PSJC), np.asarray(inputs.slots_T), norms)
        case "silu_mul_shrink":
            return silu_mul_shrink(x, edits, sites, mask)
        case "backward":
            return lowrank_gradients(x, edits[0].site, mask, y, f64(edits[0].s_TER))
        case "decode_edit":
            return decode_edit(x, y, [site.pool for site in sites], inputs.pages)
    raise ValueError(op)


def paged_attention(inputs, scale=None, window=None):
    """Attend request by request; rows of q that belong to no request give zeros."""
    q, kv = f64(inputs.q_THC), f64(inputs.kv_PSJC)
    _, size, heads2, channels = kv.shape
    group = q.shape[1] // (heads2 // 2)
    out = np.zeros(q.shape)
    starts, lengths = np.asarray(inputs.query_start_B1), np.asarray(inputs.kv_len_B)
    for row, (start, end, keys) in enumerate(zip(starts[:-1], starts[1:], lengths, strict=True)):
        if start == end:
            continue
        position = np.arange(keys)
        own = kv[np.asarray(inputs.page_table_BP)[row, position // size], position % size]
        k, v = (np.repeat(own[:, half::2], group, axis=1) for half in (0, 1))
        scores = np.einsum("qhc,shc->hqs", q[start:end], k) * (channels**-0.5 if scale is None else scale)
        own_position = keys - (end - start) + np.arange(end - start)[:, None]
        hidden = (position > own_position) | (position <= own_position - (window or keys))
        scores[:, hidden] = -np.inf
        weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
        out[start:end] = np.einsum("hqs,shc->qhc", weights / weights.sum(axis=-1, keepdims=True), v)
    return out
