"""Reference implementations in plain JAX: readable, correct on every backend, and what the fast kernels are tested
against.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from kernels.types import PagePool, TilePages

_MASKED = -1e30
_QUERY_BLOCK = 32


def _owned(tiles: TilePages, mask_TG: jax.Array) -> jax.Array:
    """Return bool ``[N, tile, E]``: does entry e edit this token?"""
    num_tiles = tiles.page_NE.shape[0]
    tile = mask_TG.shape[0] // num_tiles
    offset = jnp.arange(tile, dtype=jnp.int32)[None, :, None]
    in_span = (tiles.start_NE[:, None, :] <= offset) & (offset < tiles.end_NE[:, None, :])
    switched = jnp.take_along_axis(mask_TG.reshape(num_tiles, tile, -1), tiles.group_NE[:, None, :], axis=2)
    return in_span & switched & (tiles.page_NE[:, None, :] != 0)


def shrink(
    x_TD: jax.Array, pools: Sequence[PagePool], tiles: Sequence[TilePages], mask_TG: jax.Array
) -> tuple[jax.Array, ...]:
    """``m * (x @ A + c)`` for every entry of every tile, for each of the sites that read ``x``; float32 ``[T, E,
    R]``.
    """

    def one(pool: PagePool, tile_pages: TilePages) -> jax.Array:
        num_tiles, entries = tile_pages.page_NE.shape
        x_NID = x_TD.reshape(num_tiles, -1, x_TD.shape[1])
        a_NEDR = pool.a_PDR[tile_pages.page_NE].astype(x_TD.dtype)
        s_NIER = jnp.einsum("nid,nedr->nier", x_NID, a_NEDR, preferred_element_type=jnp.float32)
        s_NIER += pool.c_PR[tile_pages.page_NE].astype(jnp.float32)[:, None]
        s_NIER = jnp.where(_owned(tile_pages, mask_TG)[..., None], s_NIER, 0.0)
        return s_NIER.reshape(x_TD.shape[0], entries, -1)

    return tuple(one(pool, tile_pages) for pool, tile_pages in zip(pools, tiles, strict=True))


def expand(s_TER: jax.Array, y_TF: jax.Array, pool: PagePool, tiles: TilePages) -> jax.Array:
    """``y + s @ B``, summed over the entries of each tile; the dtype of ``y``."""
    num_tiles, entries = tiles.page_NE.shape
    s_NIER = s_TER.reshape(num_tiles, -1, entries, s_TER.shape[2])
    b_NERF = pool.b_PRF[tiles.page_NE].astype(y_TF.dtype)
    delta_NIF = jnp.einsum("nier,nerf->nif", s_NIER.astype(y_TF.dtype), b_NERF, preferred_element_type=jnp.float32)
    return (y_TF.astype(jnp.float32) + delta_NIF.reshape(y_TF.shape)).astype(y_TF.dtype)


def decode_edit(x_BD: jax.Array, y_BF: jax.Array, pool: PagePool, page_BE: jax.Array) -> jax.Array:
    """``y + (x @ A + c) @ B`` with one token and its own list of pages in each row; null pages add nothing."""
    a_BEDR = pool.a_PDR[page_BE].astype(x_BD.dtype)
    s_BER = jnp.einsum("bd,bedr->ber", x_BD, a_BEDR, preferred_element_type=jnp.float32)
    s_BER = jnp.where((page_BE != 0)[..., None], s_BER + pool.c_PR[page_BE].astype(jnp.float32), 0.0)
    b_BERF = pool.b_PRF[page_BE].astype(y_BF.dtype)
    delta_BF = jnp.einsum("ber,berf->bf", s_BER.astype(y_BF.dtype), b_BERF, preferred_element_type=jnp.float32)
    return (y_BF.astype(jnp.float32) + delta_BF).astype(y_BF.dtype)


def paged_attention(
    q_THC: jax.Array,
    k_PSKC: jax.Array,
    v_PSKC: jax.Array,
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
    kv_heads = k_PSKC.shape[2]
    size = min(_QUERY_BLOCK, max_query_len)
    num_blocks = min(batch * -(-max_query_len // size), num_tokens // size + batch)

    query_len_B = query_start_B1[1:] - query_start_B1[:-1]
    block_end_B = jnp.cumsum(-(-query_len_B // size))
    block_N = jnp.arange(num_blocks, dtype=jnp.int32)
    request_N = jnp.minimum(jnp.searchsorted(block_end_B, block_N, side="right"), batch - 1)
    first_block_B = block_end_B - -(-query_len_B // size)
    offset_NQ = ((block_N - first_block_B[request_N]) * size)[:, None] + jnp.arange(size, dtype=jnp.int32)

    kv_len_N = kv_len_B[request_N]
    k_NSKC = k_PSKC[page_table_BP[request_N]].reshape(num_blocks, -1, kv_heads, channels)
    v_NSKC = v_PSKC[page_table_BP[request_N]].reshape(num_blocks, -1, kv_heads, channels)
    key_S = jnp.arange(k_NSKC.shape[1], dtype=jnp.int32)
    last_key_NQ = (kv_len_B - query_len_B)[request_N][:, None] + offset_NQ
    visible_NQS = (key_S <= last_key_NQ[..., None]) & (key_S < kv_len_N[:, None, None])
    v_NSKC = jnp.where((key_S < kv_len_N[:, None])[..., None, None], v_NSKC, jnp.zeros((), v_NSKC.dtype))

    row_NQ = jnp.clip(query_start_B1[request_N][:, None] + offset_NQ, 0, num_tokens - 1)
    q_NQKGC = q_THC[row_NQ].reshape(num_blocks, size, kv_heads, heads // kv_heads, channels)
    scores = jnp.einsum("nqkgc,nskc->nkgqs", q_NQKGC, k_NSKC, preferred_element_type=jnp.float32) * scale
    scores = jnp.where(visible_NQS[:, None, None], scores, _MASKED)
    weights = jax.nn.softmax(scores, axis=-1).astype(v_NSKC.dtype)
    out = jnp.einsum("nkgqs,nskc->nqkgc", weights, v_NSKC, preferred_element_type=jnp.float32)
    out_NQHC = out.reshape(num_blocks, size, heads, channels).astype(q_THC.dtype)

    token_T = jnp.arange(num_tokens, dtype=jnp.int32)
    request_T = jnp.minimum(jnp.searchsorted(query_start_B1[1:], token_T, side="right"), batch - 1)
    offset_T = token_T - query_start_B1[request_T]
    block_T = jnp.clip(first_block_B[request_T] + offset_T // size, 0, num_blocks - 1)
    real_T = token_T < query_start_B1[-1]
    return jnp.where(real_T[:, None, None], out_NQHC[block_T, offset_T % size], jnp.zeros((), q_THC.dtype))
