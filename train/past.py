"""What a window of tokens sees of those before it: their keys and values."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from preft_jax.adapters.edits import PrefixKV
from preft_jax.models.attention import DenseKernel, attend_behind
from train.data.batches import Batch


class KV(NamedTuple):
    """Keys and values of some layers, or their cotangents: a ``[B, S, K, C]`` array a layer each."""

    k: tuple[jax.Array, ...]
    v: tuple[jax.Array, ...]


def zeros(*, shape: tuple[int, ...], dtype: Any, layers: int) -> KV:
    """Return keys and values of nothing yet."""
    return KV(*(tuple(jnp.zeros(shape, dtype) for _ in range(layers)) for _ in KV._fields))


class Window(NamedTuple):
    """A window of a micro-batch: its part of the rows, and documents of all tokens up to its end (None: one a row)."""

    batch: Batch
    start: Any
    segments_BP: Any


class PastAttention:
    """Queries of a window see keys and values of the tokens before it, and its own, which are added to them.

    ``kv`` is what there is after all layers so far, ``[B, P, K, C]``.
    """

    def __init__(
        self,
        kv: KV,
        start: jax.Array,
        segments_BP: jax.Array | None,
        segments_BW: jax.Array | None,
        implementation: DenseKernel,
    ):
        self.k, self.v = list(kv.k), list(kv.v)
        self._implementation: DenseKernel = implementation
        self._start = start
        self._segments = None if segments_BP is None or segments_BW is None else (segments_BP, segments_BW)

    def attend(
        self, layer: int, q: jax.Array, k: jax.Array, v: jax.Array, window: int | None, prefix: PrefixKV | None = None
    ) -> jax.Array:
        """Attend ``q [B, W, H, C]``."""
        self.k[layer] = jax.lax.dynamic_update_slice_in_dim(self.k[layer], k, self._start, 1)
        self.v[layer] = jax.lax.dynamic_update_slice_in_dim(self.v[layer], v, self._start, 1)
        alone = window is None and self._segments is None and prefix is None
        if self.k[layer].shape[1] == q.shape[1] and alone:
            # The first tokens: cuDNN leaves out what a causal mask hides, and computes what another one hides.
            return self._dot_product(layer, q, is_causal=True)
        key_P = jnp.arange(self.k[layer].shape[1], dtype=jnp.int32)
        query_W1 = (self._start + jnp.arange(q.shape[1], dtype=jnp.int32))[:, None]
        mask = key_P <= query_W1
        if window is not None:
            mask &= key_P > query_W1 - window
        if self._segments is not None:
            mask = mask & (self._segments[1][:, :, None] == self._segments[0][:, None, :])
        mask = mask[None] if mask.ndim == 2 else mask
        if prefix is not None:
            return attend_behind(prefix, q, self.k[layer], self.v[layer], mask, self._implementation)
        return self._dot_product(layer, q, mask=mask[:, None])

    def _dot_product(self, layer: int, q: jax.Array, **masked: Any) -> jax.Array:
        with jax.numpy_dtype_promotion("standard"):  # JAX's own code scales bfloat16 scores in float32.
            return jax.nn.dot_product_attention(
                q, self.k[layer], self.v[layer], implementation=self._implementation, **masked
            )
