"""Attention over pages of keys and values."""

import math

import jax
import jax.numpy as jnp

from kernels import debug, dispatch
from kernels.checks import (
    check,
    check_array,
    check_head_norms,
    check_heads,
    check_product,
    check_rope,
)
from kernels.types import Product


def paged_attention(
    q_THC: jax.Array,
    kv_PSJC: jax.Array,
    page_table_BP: jax.Array,
    query_start_B1: jax.Array,
    kv_len_B: jax.Array,
    *,
    max_query_len: int,
    scale: float | None = None,
    window: int | None = None,
    implementation: str | None = None,
) -> jax.Array:
    """Causal attention of packed, ragged queries over one shared pool of KV pages (grouped-query attention included).

    Args:
        q_THC: queries of all requests, one request after the other; later rows are padding and give zeros.
        kv_PSJC: KV pool ``[pages, page size, 2K, C]``; its heads are k0 v0 k1 v1 ... The queries' own keys and values
            are already written. Its dtype may be narrower than that of ``q_THC``.
        page_table_BP: int32, the pages of each request in order; entries past ``kv_len_B`` may be any valid page.
        query_start_B1: int32 ``[B + 1]``, where each request's queries start, ending with their total.
        kv_len_B: int32, keys of each request, its queries' own included; its queries are its last positions.
        max_query_len: static bound on the queries of one request (1 for decode).
        scale: static, multiplies the scores, positive; ``C ** -0.5`` if None.
        window: static, the most keys that a query sees, its own among them (a sliding window); None: all before it.
        implementation: see the module.

    Returns:
        ``[T, H, C]`` in the dtype of ``q_THC``; softmax in float32.
    """
    check_array("q_THC", q_THC, 3, jnp.floating)
    check_array("kv_PSJC", kv_PSJC, 4, jnp.floating)
    check_array("page_table_BP", page_table_BP, 2, jnp.integer)
    check_array("query_start_B1", query_start_B1, 1, jnp.integer)
    check_array("kv_len_B", kv_len_B, 1, jnp.integer)
    check(isinstance(max_query_len, int), f"max_query_len is {max_query_len!r}; give an integer")
    heads, channels = q_THC.shape[1:]
    kv_heads2 = kv_PSJC.shape[2]
    check(kv_PSJC.shape[3] == channels, f"kv_PSJC has head size {kv_PSJC.shape[3]}; q_THC has {channels}")
    check(kv_heads2 % 2 == 0, f"kv_PSJC has {kv_heads2} heads; keys and values alternate, so it must be even")
    check(heads % (kv_heads2 // 2) == 0, f"q_THC has {heads} heads, not a multiple of {kv_heads2 // 2} KV heads")
    batch = kv_len_B.shape[0]
    check(page_table_BP.shape[0] == batch, f"page_table_BP has {page_table_BP.shape[0]} rows; kv_len_B {batch}")
    check(
        query_start_B1.shape == (batch + 1,),
        f"query_start_B1 has shape {query_start_B1.shape}; expected ({batch + 1},)",
    )
    check(1 <= max_query_len <= q_THC.shape[0], f"max_query_len is {max_query_len}; allowed: 1 to {q_THC.shape[0]}")
    debug.check_range("page_table_BP", page_table_BP, kv_PSJC.shape[0])
    debug.check_range("kv_len_B", kv_len_B, page_table_BP.shape[1] * kv_PSJC.shape[1] + 1)
    debug.check_range("query_start_B1", query_start_B1, q_THC.shape[0] + 1)
    debug.check_lengths("query_start_B1", query_start_B1, max_query_len)
    return dispatch.run(
        "paged_attention", implementation, q_THC, kv_PSJC, page_table_BP, query_start_B1, kv_len_B,
        max_query_len=max_query_len, scale=_scale(scale, channels), window=_window(window),
    )  # fmt: skip


def decode_attention(
    qkv_BF: Product,
    cos_BX: jax.Array,
    sin_BX: jax.Array,
    kv_PSJC: jax.Array,
    page_table_BP: jax.Array,
    position_B: jax.Array,
    *,
    q_norm_C: jax.Array | None = None,
    k_norm_C: jax.Array | None = None,
    eps: float = 0.0,
    scale: float | None = None,
    window: int | None = None,
    implementation: str | None = None,
) -> tuple[jax.Array, jax.Array]:
    """``rope_kv`` and ``paged_attention`` of one token a row, without edits, in one pass over the keys.

    Args:
        qkv_BF: ``[B, (H + 2K) C]``, the query, key and value heads of each row's token side by side.
        cos_BX: float32 ``[B, C / 2]``.
        sin_BX: likewise.
        kv_PSJC: KV pool ``[pages, page size, 2K, C]``, heads k0 v0 k1 v1 ...; updated in place where it is donated.
        page_table_BP: int32, the pages of each row in order; entries past its token may be any valid page.
        position_B: int32, where each row's token stands: its key and value are written there, and it attends to the
            keys up to there. Below 0 the row is idle: nothing is written.
        q_norm_C: as of ``rope_kv``, with ``k_norm_C`` and ``eps``.
        k_norm_C: likewise.
        eps: likewise.
        scale: static, multiplies the scores, positive; ``C ** -0.5`` if None.
        window: static, as of ``paged_attention``.
        implementation: see the module.

    Returns:
        ``[B, H, C]`` in the dtype of ``qkv_BF``, zero in idle rows, and the pool; softmax in float32.
    """
    y_BF = check_product("qkv_BF", qkv_BF)
    check_array("kv_PSJC", kv_PSJC, 4, jnp.floating)
    check_array("page_table_BP", page_table_BP, 2, jnp.integer)
    check_array("position_B", position_B, 1, jnp.integer)
    batch = y_BF.shape[0]
    channels = check_heads("qkv_BF", y_BF.shape[1], kv_PSJC)
    check_rope(cos_BX, sin_BX, ("cos_BX", "sin_BX"), batch, channels)
    for name, array in (("page_table_BP", page_table_BP), ("position_B", position_B)):
        check(array.shape[0] == batch, f"{name} has {array.shape[0]} rows; qkv_BF has {batch}")
    check_head_norms(q_norm_C, k_norm_C, eps, channels)
    debug.check_range("page_table_BP", page_table_BP, kv_PSJC.shape[0])
    debug.check_range("position_B + 1", position_B + 1, page_table_BP.shape[1] * kv_PSJC.shape[1] + 1)
    return dispatch.run(
        "decode_attention", implementation, qkv_BF, cos_BX, sin_BX, kv_PSJC, page_table_BP, position_B,
        q_norm_C=q_norm_C, k_norm_C=k_norm_C, eps=eps, scale=_scale(scale, channels), window=_window(window),
    )  # fmt: skip


def _scale(scale: float | None, channels: int) -> float:
    allowed = "give a positive number, or None for head size ** -0.5"
    check(scale is None or 0 < scale < math.inf, f"scale is {scale}; {allowed}")
    return channels**-0.5 if scale is None else scale


def _window(window: int | None) -> int | None:
    check(
        window is None or (isinstance(window, int) and window > 0),
        f"window is {window!r}; give a positive integer, or None to see all keys",
    )
    return window
