"""One attention API over backends: ``kernels.api.paged_attention`` over the KV cache, and dense causal attention for
training.
"""

from typing import Literal, NamedTuple, Protocol

import jax
import jax.numpy as jnp

from kernels import api
from preft_jax.models.cache import KVCache, write_kv

DenseKernel = Literal["xla", "cudnn"]
"""Implementations of ``jax.nn.dot_product_attention`` that training runs over."""


class Attention(Protocol):
    """What a layer of the model knows of attention: it gives rotated queries and keys, and values, and gets the mix."""

    def attend(self, layer: int, q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        """Return the attention output in the shape of ``q``."""
        ...


class PagedAttention:
    """Writes new keys and values to the cache, then attends over it; ``cache`` is its state after all layers so far."""

    def __init__(
        self,
        cache: KVCache,
        *,
        slots_T: jax.Array,
        page_table_BP: jax.Array,
        query_start_B1: jax.Array,
        kv_len_B: jax.Array,
        max_query_len: int,
    ):
        self.cache = KVCache(list(cache.kv))
        self._slots_T = slots_T
        self._ragged = (page_table_BP, query_start_B1, kv_len_B)
        self._max_query_len = max_query_len

    def attend(self, layer: int, q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        """Attend packed queries ``q [T, H, C]`` to their requests' cached keys."""
        pools = self.cache.kv
        pools[layer] = write_kv(pools[layer], self._slots_T, k, v)
        kv_PSJC = pools[layer].reshape(*pools[layer].shape[:2], -1, q.shape[2])
        return api.paged_attention(q, kv_PSJC, *self._ragged, max_query_len=self._max_query_len)


class MixedAttention:
    """Packed tokens, the last of which are those of decoding rows: each attends as it does alone.

    Args:
        packed: of all tokens; rows are of no request there, and write no key.
        rows: of the last tokens, one a row.
        is_row_B: bool, which of these hold a row.
    """

    def __init__(self, packed: PagedAttention, rows: PagedAttention, is_row_B: jax.Array):
        self._packed = packed
        self._rows = rows
        self._is_row_B11 = is_row_B[:, None, None]

    @property
    def cache(self) -> KVCache:
        """The cache after all layers so far."""
        return self._rows.cache

    def attend(self, layer: int, q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        """Attend queries ``[T, H, C]`` to their sequences' cached keys."""
        at = q.shape[0] - self._is_row_B11.shape[0]
        packed = self._packed.attend(layer, q, k, v)
        self._rows.cache.kv[layer] = self._packed.cache.kv[layer]
        rows = self._rows.attend(layer, q[at:], k[at:], v[at:])
        return packed.at[at:].set(jnp.where(self._is_row_B11, rows, packed[at:]))


class DenseAttention(NamedTuple):
    """Causal attention within each segment of padded sequences; differentiable.

    ``mask_BSS`` is bool, query by key; None where causality says it all.
    """

    mask_BSS: jax.Array | None
    implementation: DenseKernel = "xla"

    def attend(self, layer: int, q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        """Attend ``q [B, S, H, C]`` to ``k, v [B, S, K, C]``."""
        mask = None if self.mask_BSS is None else self.mask_BSS[:, None]
        with jax.numpy_dtype_promotion("standard"):  # JAX's own code scales bfloat16 scores in float32.
            return jax.nn.dot_product_attention(
                q, k, v, mask=mask, is_causal=mask is None, implementation=self.implementation
            )


def dense_attention(segments_BS: jax.Array | None, implementation: DenseKernel = "xla") -> DenseAttention:
    """Return causal attention within equal segment ids; padding (0) sees earlier padding only.

    Without segments each row is one document, with or without padding behind it, and no mask is made.
    """
    if segments_BS is None:
        return DenseAttention(None, implementation)
    size = segments_BS.shape[1]
    same = segments_BS[:, :, None] == segments_BS[:, None, :]
    causal = jnp.tril(jnp.ones((size, size), bool))
    return DenseAttention(same & causal, implementation)
