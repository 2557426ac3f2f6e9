"""Paged attention in plain JAX."""

import jax
import jax.numpy as jnp

_MASKED = -1e30
_QUERY_BLOCK = 32


def _dot(x: jax.Array, y: jax.Array, axis: int) -> jax.Array:
    """Multiply ``x [N, K, G, Q, ...]`` with ``y [N, K, ...]`` over x's last axis and y's ``axis``, in float32.

    ``einsum`` would swap x and y: their transposed copies made decoding slower.
    """
    dimensions = (((4,), (axis,)), ((0, 1), (0, 1)))
    return jax.lax.dot_general(x, y, dimensions, preferred_element_type=jnp.float32)


def paged_attention(
    q_THC: jax.Array,
    kv_PSJC: jax.Array,
    page_table_BP: jax.Array,
    query_start_B1: jax.Array,
    kv_len_B: jax.Array,
    *,
    max_query_len: int,
    scale: float,
) -> jax.Array:
    """Causal attention of packed, ragged queries over a paged KV cache; see ``kernels.api.paged_attention``.

    Each request's queries are cut into blocks of at most ``_QUERY_BLOCK``, and each block looks at its request's keys:
    the work is that of the tokens there are, however unequal the requests.
    """
    num_tokens, heads, channels = q_THC.shape
    batch = kv_len_B.shape[0]
    page_size, kv_heads = kv_PSJC.shape[1], kv_PSJC.shape[2] // 2
    size = min(_QUERY_BLOCK, max_query_len)
    num_blocks = min(batch * -(-max_query_len // size), num_tokens // size + batch)

    query_len_B = query_start_B1[1:] - query_start_B1[:-1]
    block_end_B = jnp.cumsum(-(-query_len_B // size))
    block_N = jnp.arange(num_blocks, dtype=jnp.int32)
    request_N = jnp.minimum(jnp.searchsorted(block_end_B, block_N, side="right"), batch - 1)
    first_block_B = block_end_B - -(-query_len_B // size)
    offset_NQ = ((block_N - first_block_B[request_N]) * size)[:, None] + jnp.arange(size, dtype=jnp.int32)

    kv_len_N = kv_len_B[request_N]
    key_S = jnp.arange(page_table_BP.shape[1] * page_size, dtype=jnp.int32)
    last_key_NQ = (kv_len_B - query_len_B)[request_N][:, None] + offset_NQ
    visible_NQS = (key_S <= last_key_NQ[..., None]) & (key_S < kv_len_N[:, None, None])

    # Beyond its last key a request reads that key again, so that what other slots hold never gets here. Keys and values
    # have a gather each: each is then fused with its conversion, where a shared one would be stored and read again.
    read_NS = jnp.minimum(key_S, jnp.maximum(kv_len_N[:, None] - 1, 0))
    page_NS = jnp.take_along_axis(page_table_BP[request_N], read_NS // page_size, axis=1)
    head_K1 = 2 * jnp.arange(kv_heads, dtype=jnp.int32)[:, None]
    slot_N1S = page_NS[:, None], (read_NS % page_size)[:, None]
    k_NKSC = kv_PSJC[*slot_N1S, head_K1].astype(q_THC.dtype)
    v_NKSC = kv_PSJC[*slot_N1S, head_K1 + 1].astype(q_THC.dtype)

    row_NQ = jnp.clip(query_start_B1[request_N][:, None] + offset_NQ, 0, num_tokens - 1)
    q_NQKGC = q_THC[row_NQ].reshape(num_blocks, size, kv_heads, heads // kv_heads, channels)
    q_NKGQC = q_NQKGC.transpose(0, 2, 3, 1, 4)
    scores_NKGQS = _dot(q_NKGQC, k_NKSC, 3) * scale
    scores_NKGQS = jnp.where(visible_NQS[:, None, None], scores_NKGQS, _MASKED)
    weights_NKGQS = jax.nn.softmax(scores_NKGQS, axis=-1).astype(q_THC.dtype)
    out_NKGQC = _dot(weights_NKGQS, v_NKSC, 2).astype(q_THC.dtype)
    out_NQHC = out_NKGQC.transpose(0, 3, 1, 2, 4).reshape(num_blocks, size, heads, channels)

    token_T = jnp.arange(num_tokens, dtype=jnp.int32)
    request_T = jnp.minimum(jnp.searchsorted(query_start_B1[1:], token_T, side="right"), batch - 1)
    offset_T = token_T - query_start_B1[request_T]
    block_T = jnp.clip(first_block_B[request_T] + offset_T // size, 0, num_blocks - 1)
    real_T = token_T < query_start_B1[-1]
    return jnp.where(real_T[:, None, None], out_NQHC[block_T, offset_T % size], jnp.zeros((), q_THC.dtype))
