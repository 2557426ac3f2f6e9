"""The paged KV cache as a pytree: for each layer one pool of pages, keys and values interleaved."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from kernels import dispatch
from kernels.tpu_tiles import LANES, fills_tiles
from kernels.xla import fused
from preft_jax.config import ModelConfig
from preft_jax.errors import ConfigError

NO_SLOT = np.iinfo(np.int32).max
"""The slot of a token whose KV is not kept: writes to it are dropped."""


KV_AXES = ("pages", "tokens", "kv_heads", "head")
"""The logical axes of a layer's pool."""


class KVCache(NamedTuple):
    """Keys and values of every layer: ``kv_PSJC [pages, page size, 2 * KV heads, C]``, its heads k0 v0 k1 v1 ...

    On a TPU with narrow heads a token's row of 2K C numbers is stored as lanes, ``[pages, page size, 2K C / 128,
    128]``: the same numbers in the same order. A token's *slot* is page * page size + offset.
    """

    kv: list[jax.Array]

    @property
    def page_size(self) -> int:
        """Tokens in a page."""
        return self.kv[0].shape[1]

    @property
    def num_pages(self) -> int:
        """Pages in each pool."""
        return self.kv[0].shape[0]


def cache_axes(config: ModelConfig) -> Any:
    """Return the logical axes of a cache, in place of each pool."""
    axes: list[Any] = [KV_AXES] * config.num_hidden_layers
    return KVCache(axes)


def init_cache(config: ModelConfig, num_pages: int, page_size: int, dtype: Any) -> KVCache:
    """Return a cache of zeros with ``num_pages`` pages of ``page_size`` tokens a layer."""
    if num_pages < 1 or page_size < 1:
        raise ConfigError(f"the KV cache needs at least one page of one token; got {num_pages} of {page_size}")
    if num_pages * page_size >= NO_SLOT:
        raise ConfigError(f"{num_pages} pages of {page_size} tokens exceed {NO_SLOT - 1} slots")
    row = (2 * config.num_key_value_heads, config.head_dim)
    if dispatch.chosen("paged_attention") == "pallas_tpu" and row[1] % LANES and math.prod(row) % LANES == 0:
        row = (math.prod(row) // LANES, LANES)
    return KVCache([jnp.zeros((num_pages, page_size, *row), dtype) for _ in range(config.num_hidden_layers)])


def write_kv(pool: jax.Array, slots_T: jax.Array, k_TKC: jax.Array, v_TKC: jax.Array) -> jax.Array:
    """Return the pool with each token's row written at its slot (in place if donated); slots past it are dropped."""
    if pool.shape[3] == k_TKC.shape[2]:
        return fused.write_kv(pool, slots_T, k_TKC, v_TKC)
    new = jnp.stack([k_TKC, v_TKC], axis=2).reshape(-1, *pool.shape[2:]).astype(pool.dtype)
    return _write_lanes(pool, slots_T, new)


def _write_lanes(pool: jax.Array, slots_T: jax.Array, new: jax.Array) -> jax.Array:
    """Write rows stored as lanes, ``new [T, n, 128]``, lane row by lane row.

    Any other form of this scatter makes XLA copy the pool on a TPU. It keeps the n lane rows of a token outside those
    of its page where they would not fill tiles.
    """
    pages, size, rows, lanes = pool.shape
    row = jnp.arange(rows, dtype=jnp.int32)
    if fills_tiles(rows):
        view, at = pool, slots_T[:, None] * rows + row
    else:
        view, at = pool.swapaxes(1, 2), (slots_T[:, None] // size * rows + row) * size + slots_T[:, None] % size
    kept_T1 = ((slots_T >= 0) & (slots_T < pages * size))[:, None]
    at = jnp.where(kept_T1, at, NO_SLOT)
    flat = view.reshape(-1, lanes).at[at.reshape(-1)].set(new.reshape(-1, lanes), mode="drop")
    written = flat.reshape(view.shape)
    return written if fills_tiles(rows) else written.swapaxes(1, 2)


def pages_for(num_tokens: int, page_size: int) -> int:
    """Return how many pages hold ``num_tokens`` tokens."""
    return math.ceil(num_tokens / page_size)
