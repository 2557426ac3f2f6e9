"""The paged KV cache as a pytree: for each layer one pool of pages, keys and values interleaved."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from preft_jax.config import ModelConfig
from preft_jax.errors import ConfigError

NO_SLOT = np.iinfo(np.int32).max
"""The slot of a token whose KV is not kept: writes to it are dropped."""


class KVCache(NamedTuple):
    """Keys and values of every layer: ``kv_PSJC [pages, page size, 2 * KV heads, C]``, its heads k0 v0 k1 v1 ...

    A token's *slot* is page * page size + offset.
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


def init_cache(config: ModelConfig, num_pages: int, page_size: int, dtype: Any) -> KVCache:
    """Return a cache of zeros with ``num_pages`` pages of ``page_size`` tokens a layer."""
    if num_pages < 1 or page_size < 1:
        raise ConfigError(f"the KV cache needs at least one page of one token; got {num_pages} of {page_size}")
    if num_pages * page_size >= NO_SLOT:
        raise ConfigError(f"{num_pages} pages of {page_size} tokens exceed {NO_SLOT - 1} slots")
    shape = (num_pages, page_size, 2 * config.num_key_value_heads, config.head_dim)
    return KVCache([jnp.zeros(shape, dtype) for _ in range(config.num_hidden_layers)])


def write_kv(pool_PSJC: jax.Array, slots_T: jax.Array, k_TKC: jax.Array, v_TKC: jax.Array) -> jax.Array:
    """Return the pool with each token's row written at its slot (in place if donated); slots past it are dropped."""
    pages, page_size, *row = pool_PSJC.shape
    new_TJC = jnp.stack([k_TKC, v_TKC], axis=2).reshape(-1, *row).astype(pool_PSJC.dtype)
    flat = pool_PSJC.reshape(pages * page_size, *row)
    return flat.at[slots_T].set(new_TJC, mode="drop").reshape(pool_PSJC.shape)


def pages_for(num_tokens: int, page_size: int) -> int:
    """Return how many pages hold ``num_tokens`` tokens."""
    return math.ceil(num_tokens / page_size)
