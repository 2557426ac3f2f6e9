"""One attention API over backends: ``kernels.api.paged_attention`` over the KV cache, and dense causal attention for
training.
"""

from typing import Literal, NamedTuple, Protocol

import jax
import jax.numpy as jnp

from kernels import api
from preft_jax.adapters.edits import PrefixKV
from preft_jax.models.cache import NO_SLOT, KVCache, write_kv
from preft_jax.models.places import Decoding, Mixed, Packed, Places
from preft_jax.shapes import RANK_PAGE

DenseKernel = Literal["xla", "cudnn"]
"""Implementations of ``jax.nn.dot_product_attention`` that training runs over."""


class Attention(Protocol):
    """What a layer of the model knows of attention: it gives rotated queries and keys, and values, and gets the mix."""

    def attend(
        self, layer: int, q: jax.Array, k: jax.Array, v: jax.Array, window: int | None, prefix: PrefixKV | None = None
    ) -> jax.Array:
        """Return the attention output in the shape of ``q``.

        ``window``: most keys that a query sees, None for all. ``prefix``: learned keys and values in front of each row;
        there are none beside a window, nor where a cache holds them.
        """
        ...


class PagedAttention:
    """Writes new keys and values to the cache, then attends over it; ``cache`` is its state after all layers so far."""

    def __init__(self, cache: KVCache, places: Places):
        self.cache = KVCache(list(cache.kv))
        self._places = places
        self._rows = _rows_packed(places.rows, cache.page_size) if isinstance(places, Mixed) else None
        packed = places.packed if isinstance(places, Mixed) else places
        self._packed = _rows_packed(packed, cache.page_size) if isinstance(packed, Decoding) else packed

    def attend(
        self, layer: int, q: jax.Array, k: jax.Array, v: jax.Array, window: int | None, prefix: PrefixKV | None = None
    ) -> jax.Array:
        """Attend queries ``q [T, H, C]`` to their sequences' cached keys."""
        assert prefix is None, "learned keys and values are in the cache"
        packed = self._attend(layer, self._packed, q, k, v, window)
        if self._rows is None or not isinstance(self._places, Mixed):
            return packed
        at = q.shape[0] - self._rows.kv_len_B.shape[0]
        return self._places.put_rows(packed, self._attend(layer, self._rows, q[at:], k[at:], v[at:], window))

    def _attend(
        self, layer: int, places: Packed, q: jax.Array, k: jax.Array, v: jax.Array, window: int | None
    ) -> jax.Array:
        slots_T, *ragged, max_query_len = places
        pools = self.cache.kv
        pools[layer] = write_kv(pools[layer], slots_T, k, v)
        kv_PSJC = pools[layer].reshape(*pools[layer].shape[:2], -1, q.shape[2])
        return api.paged_attention(q, kv_PSJC, *ragged, max_query_len=max_query_len, window=window)


def _rows_packed(rows: Decoding, page_size: int) -> Packed:
    """Return rows of one token as packed requests."""
    size = rows.position_B.shape[0]
    position_B = jnp.maximum(rows.position_B, 0)
    page_B = jnp.take_along_axis(rows.page_table_BP, (position_B // page_size)[:, None], axis=1)[:, 0]
    slot_B = page_B * page_size + position_B % page_size
    return Packed(
        slots_T=jnp.where(rows.position_B >= 0, slot_B, NO_SLOT),
        page_table_BP=rows.page_table_BP,
        query_start_B1=jnp.arange(size + 1, dtype=jnp.int32),
        kv_len_B=position_B + 1,
        max_query_len=1,
    )


class DenseAttention(NamedTuple):
    """Causal attention within each segment of padded sequences; differentiable.

    ``mask_BSS`` is bool, query by key; None where causality says it all.
    """

    mask_BSS: jax.Array | None
    implementation: DenseKernel = "xla"

    def attend(
        self, layer: int, q: jax.Array, k: jax.Array, v: jax.Array, window: int | None, prefix: PrefixKV | None = None
    ) -> jax.Array:
        """Attend ``q [B, S, H, C]`` to ``k, v [B, S, K, C]``."""
        if prefix is not None:
            mask_BSS = jnp.tril(jnp.ones((q.shape[1],) * 2, bool))[None] if self.mask_BSS is None else self.mask_BSS
            return attend_behind(prefix, q, k, v, mask_BSS, self.implementation)
        mask = None if self.mask_BSS is None else self.mask_BSS[:, None]
        local = None
        if window is not None and mask is not None:
            mask = mask & _within(window, q.shape[1])
        elif window is not None and window < q.shape[1]:
            local = (window - 1, 0)
        with jax.numpy_dtype_promotion("standard"):  # JAX's own code scales bfloat16 scores in float32.
            return jax.nn.dot_product_attention(
                q, k, v, mask=mask, is_causal=mask is None, local_window_size=local, implementation=self.implementation
            )


def attend_behind(
    prefix: PrefixKV, q: jax.Array, k: jax.Array, v: jax.Array, mask_BSS: jax.Array, implementation: DenseKernel
) -> jax.Array:
    """Attend ``q [B, S, H, C]`` to learned keys and values, and to ``k, v [B, P, K, C]`` where ``mask [B, S, P]`` is.

    The batch of the mask may be 1.
    """
    rows, size, length = prefix.mask_BSM.shape
    padding = (0, -length % RANK_PAGE)  # cuDNN takes no odd lengths with a mask.
    learned = (jnp.pad(x, ((0, 0), padding, (0, 0))).reshape(rows, -1, *k.shape[2:]) for x in prefix[:2])
    k, v = (jnp.concatenate([front, own], axis=1) for front, own in zip(learned, (k, v), strict=True))
    sees = jnp.pad(prefix.mask_BSM, ((0, 0), (0, 0), padding))
    mask = jnp.concatenate([sees, jnp.broadcast_to(mask_BSS, (rows, size, mask_BSS.shape[2]))], axis=2)
    with jax.numpy_dtype_promotion("standard"):  # JAX's own code scales bfloat16 scores in float32.
        return jax.nn.dot_product_attention(q, k, v, mask=mask[:, None], implementation=implementation)


def _within(window: int, size: int) -> jax.Array:
    """Return which keys are among the ``window`` up to a query's own, or after it: bool ``[S, S]``."""
    position_S = jnp.arange(size, dtype=jnp.int32)
    return position_S[None, :] > position_S[:, None] - window


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
