"""Attention of a decode step in plain JAX."""

import jax
import jax.numpy as jnp

from kernels.types import Product
from kernels.xla.attention import paged_attention
from kernels.xla.fused import rope_kv


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
    scale: float,
    window: int | None = None,
) -> tuple[jax.Array, jax.Array]:
    """See ``kernels.api.decode_attention``."""
    pages, size = kv_PSJC.shape[:2]
    batch = len(position_B)
    alive_B = position_B >= 0
    page_B = jnp.take_along_axis(page_table_BP, jnp.maximum(position_B, 0)[:, None] // size, axis=1)[:, 0]
    slots_B = jnp.where(alive_B, page_B * size + position_B % size, pages * size)
    q_BHC, kv_PSJC = rope_kv(
        qkv_BF, (None, None, None), cos_BX, sin_BX, kv_PSJC, slots_B, q_norm_C=q_norm_C, k_norm_C=k_norm_C, eps=eps
    )
    out_BHC = paged_attention(
        q_BHC, kv_PSJC, page_table_BP, jnp.arange(batch + 1, dtype=jnp.int32), jnp.maximum(position_B + 1, 0),
        max_query_len=1, scale=scale, window=window,
    )  # fmt: skip
    return jnp.where(alive_B[:, None, None], out_BHC, jnp.zeros((), out_BHC.dtype)), kv_PSJC
