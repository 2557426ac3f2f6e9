"""The paged KV cache as a pytree: for each layer one pool of pages for keys and one for values."""

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
    """Keys and values of every layer, ``[pages, page size, KV heads, C]`` each.

    A token's *slot* is page * page size + offset.
    """

    k: list[jax.Array]
    v: list[jax.Array]

    @property
    def page_size(self) -> int:
        """Tokens in a page."""
        return self.k[0].shape[1]

    @property
    def num_pages(self) -> int:
        """Pages in each pool."""
        return self.k[0].shape[0]


def init_cache(config: ModelConfig, num_pages: int, page_size: int, dtype: Any) -> KVCache:
    """Return a cache of zeros with ``num_pages`` pages of ``page_size`` tokens a layer."""
    if num_pages < 1 or page_size < 1:
        raise ConfigError(f"the KV cache needs at least one page of one token; got {num_pages} of {page_size}")
    if num_pages * page_size >= NO_SLOT:
        raise ConfigError(f"{num_pages} pages of {page_size} tokens exceed {NO_SLOT - 1} slots")
    shape = (num_pages, page_size, config.num_key_value_heads, config.head_dim)
    layers = range(config.num_hidden_layers)
    return KVCache([jnp.zeros(shape, dtype) for _ in layers], [jnp.zeros(shape, dtype) for _ in layers])


def write_kv(pool_PSKC: jax.Array, slots_T: jax.Array, new_TKC: jax.Array) -> jax.Array:
    """Return the pool with each token's row written at its slot (in place if donated); slots past it are dropped."""
    pages, page_size, *rest = pool_PSKC.shape
    flat = pool_PSKC.reshape(pages * page_size, *rest)
    flat = flat.at[slots_T].set(new_TKC.astype(pool_PSKC.dtype), mode="drop")
    return flat.reshape(pool_PSKC.shape)


def pages_for(num_tokens: int, page_size: int) -> int:
    """Return how many pages hold ``num_tokens`` tokens."""
    return math.ceil(num_tokens / page_size)
