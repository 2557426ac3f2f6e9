"""Paged attention in plain JAX."""

import jax
import jax.numpy as jnp

_MASKED = -1e30
_QUERY_BLOCK = 32
_KEY_BLOCK = 128
_QUERIES_TOGETHER = 128


def _dot(x: jax.Array, y: jax.Array, axis: int) -> jax.Array:
    """Multiply ``x [N, K, G, Q, ...]`` with ``y [N, K, ...]`` over x's last axis and y's ``axis``, in float32.

    ``einsum`` would swap x and y: their transposed copies made decoding slower.
    """
    dimensions = (((4,), (axis,)), ((0, 1), (0, 1)))
    return jax.lax.dot_general(x, y, dimensions, preferred_element_type=jnp.float32)


def _read(
    kv_PSJC: jax.Array, table_NP: jax.Array, key_S: jax.Array, kv_len_N: jax.Array, head_K1: jax.Array, dtype: jnp.dtype
) -> tuple[jax.Array, jax.Array]:
    """Read the keys and values ``[N, K, S, C]`` of each block's request at positions ``key_S``; keys' heads given."""
    page_size = kv_PSJC.shape[1]
    # Beyond its last key a request reads that key again, so that what other slots hold never gets here. Keys and
    # values have a gather each: each is then fused with its conversion, where a shared one would be stored and read
    # again.
    read_NS = jnp.minimum(key_S, jnp.maximum(kv_len_N[:, None] - 1, 0))
    page_NS = jnp.take_along_axis(table_NP, read_NS // page_size, axis=1)
    slot_N1S = page_NS[:, None], (read_NS % page_size)[:, None]
    return kv_PSJC[*slot_N1S, head_K1].astype(dtype), kv_PSJC[*slot_N1S, head_K1 + 1].astype(dtype)


def _mix(
    q_NKGQC: jax.Array,
    k_NKSC: jax.Array,
    v_NKSC: jax.Array,
    visible_NQS: jax.Array,
    scale: float,
    state: tuple[jax.Array, ...],
) -> tuple[jax.Array, ...]:
    """Take some keys into the running softmax: its largest score, its sum of weights, its weighted sum of values."""
    most_NKGQ, total_NKGQ, sum_NKGQC = state
    scores_NKGQS = jnp.where(visible_NQS[:, None, None], _dot(q_NKGQC, k_NKSC, 3) * scale, _MASKED)
    new_NKGQ = jnp.maximum(most_NKGQ, scores_NKGQS.max(axis=-1))
    weights_NKGQS = jnp.exp(scores_NKGQS - new_NKGQ[..., None])
    keep_NKGQ = jnp.exp(most_NKGQ - new_NKGQ)
    seen_NKGQC = _dot(weights_NKGQS.astype(q_NKGQC.dtype), v_NKSC, 2)
    return (
        new_NKGQ,
        total_NKGQ * keep_NKGQ + weights_NKGQS.sum(axis=-1),
        sum_NKGQC * keep_NKGQ[..., None] + seen_NKGQC,
    )


def _visible(key_S: jax.Array, last_key_NQ: jax.Array, kv_len_N: jax.Array, window: int | None) -> jax.Array:
    """Return which keys each query sees, bool ``[N, Q, S]``."""
    visible_NQS = (key_S <= last_key_NQ[..., None]) & (key_S < kv_len_N[:, None, None])
    return visible_NQS if window is None else visible_NQS & (key_S > last_key_NQ[..., None] - window)


def _seen(
    last_key_NQ: jax.Array, kv_len_N: jax.Array, num_keys: int, window: int | None
) -> tuple[jax.Array | int, jax.Array]:
    """Return the first key that any query of some blocks sees, and the one after the last."""
    end = jnp.minimum(jnp.minimum(kv_len_N.max(), last_key_NQ.max() + 1), num_keys)
    if window is None:
        return 0, end
    first_N = jnp.where(kv_len_N > 0, last_key_NQ[:, 0] - window + 1, num_keys)
    return jnp.maximum(first_N.min(), 0), end


def paged_attention(
    q_THC: jax.Array,
    kv_PSJC: jax.Array,
    page_table_BP: jax.Array,
    query_start_B1: jax.Array,
    kv_len_B: jax.Array,
    *,
    max_query_len: int,
    scale: float,
    window: int | None = None,
) -> jax.Array:
    """Causal attention of packed, ragged queries over a paged KV cache; see ``kernels.api.paged_attention``.

    Each request's queries are cut into blocks of at most ``_QUERY_BLOCK``. A few blocks at a time look at their
    requests' keys, ``_KEY_BLOCK`` after ``_KEY_BLOCK``, with a running softmax (Milakov and Gimelshein, arXiv
    1805.02867). Both loops end with the last real block and key, and with a window the inner one begins with the first
    key that is seen: the work is that of the tokens there are, however unequal the requests.
    """
    page_table_BP, query_start_B1, kv_len_B = map(jnp.asarray, (page_table_BP, query_start_B1, kv_len_B))
    num_tokens, heads, channels = q_THC.shape
    batch, page_size, kv_heads = kv_len_B.shape[0], kv_PSJC.shape[1], kv_PSJC.shape[2] // 2
    size = min(_QUERY_BLOCK, max_query_len)
    num_blocks = min(batch * -(-max_query_len // size), num_tokens // size + batch)
    together = min(num_blocks, max(1, _QUERIES_TOGETHER // size))
    num_keys = page_table_BP.shape[1] * page_size
    keys = min(_KEY_BLOCK, num_keys)

    query_len_B = query_start_B1[1:] - query_start_B1[:-1]
    block_end_B = jnp.cumsum(-(-query_len_B // size))
    first_block_B = block_end_B - -(-query_len_B // size)
    head_K1 = 2 * jnp.arange(kv_heads, dtype=jnp.int32)[:, None]

    def attend(first: jax.Array, out_NQHC: jax.Array) -> jax.Array:
        block_N = first * together + jnp.arange(together, dtype=jnp.int32)
        request_N = jnp.minimum(jnp.searchsorted(block_end_B, block_N, side="right"), batch - 1)
        offset_NQ = ((block_N - first_block_B[request_N]) * size)[:, None] + jnp.arange(size, dtype=jnp.int32)
        kv_len_N = kv_len_B[request_N]
        last_key_NQ = (kv_len_B - query_len_B)[request_N][:, None] + offset_NQ
        table_NP = page_table_BP[request_N]
        row_NQ = jnp.clip(query_start_B1[request_N][:, None] + offset_NQ, 0, num_tokens - 1)
        q_NQKGC = q_THC[row_NQ].reshape(together, size, kv_heads, heads // kv_heads, channels)
        q_NKGQC = q_NQKGC.transpose(0, 2, 3, 1, 4)

        def look(at: jax.Array, state: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
            key_S = at * keys + jnp.arange(keys, dtype=jnp.int32)
            k_NKSC, v_NKSC = _read(kv_PSJC, table_NP, key_S, kv_len_N, head_K1, q_THC.dtype)
            return _mix(q_NKGQC, k_NKSC, v_NKSC, _visible(key_S, last_key_NQ, kv_len_N, window), scale, state)

        rows = q_NKGQC.shape[:4]
        most_NKGQ = jnp.full(rows, _MASKED, jnp.float32)
        state = (most_NKGQ, jnp.zeros(rows, jnp.float32), jnp.zeros(q_NKGQC.shape, jnp.float32))
        begin, end = _seen(last_key_NQ, kv_len_N, num_keys, window)
        _, total_NKGQ, sum_NKGQC = jax.lax.fori_loop(begin // keys, -(-end // keys), look, state)
        mixed_NKGQC = (sum_NKGQC / jnp.maximum(total_NKGQ, 1e-30)[..., None]).astype(q_THC.dtype)
        mixed_NQHC = mixed_NKGQC.transpose(0, 3, 1, 2, 4).reshape(together, size, heads, channels)
        return jax.lax.dynamic_update_slice(out_NQHC, mixed_NQHC, (first * together, 0, 0, 0))

    groups = -(-num_blocks // together)
    out_NQHC = jnp.zeros((groups * together, size, heads, channels), q_THC.dtype)
    if groups == 1:
        out_NQHC = attend(jnp.int32(0), out_NQHC)
    else:
        out_NQHC = jax.lax.fori_loop(0, jnp.minimum(-(-block_end_B[-1] // together), groups), attend, out_NQHC)

    token_T = jnp.arange(num_tokens, dtype=jnp.int32)
    request_T = jnp.minimum(jnp.searchsorted(query_start_B1[1:], token_T, side="right"), batch - 1)
    offset_T = token_T - query_start_B1[request_T]
    block_T = jnp.clip(first_block_B[request_T] + offset_T // size, 0, num_blocks - 1)
    real_T = token_T < query_start_B1[-1]
    return jnp.where(real_T[:, None, None], out_NQHC[block_T, offset_T % size], jnp.zeros((), q_THC.dtype))
