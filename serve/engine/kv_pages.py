"""KV on its way from one engine to another: the programs that read pages of it and write them.

Outside the cache KV lies by token, ``kv_TLJC [tokens, L, 2 * KV heads, head dim]``: whatever a page holds and however
many devices a model is cut over. Each device reads and writes the heads that it has.
"""

from collections.abc import Iterator
from collections.abc import Sequence as Many
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from preft_jax.config import ModelConfig
from preft_jax.models.cache import NO_SLOT, KVCache
from serve.engine.spread import WHOLE, Spread

SIZES = (8, 1)
"""KV pages that one call reads or writes, the most first."""

PREFIX_PAGES = 4
"""Rank pages of learned prefixes that one call writes to the KV cache."""

_AXES = ("tokens", "layers", "kv_heads", "head")


def take_pages(kv_heads: int, cache: KVCache, page_M: jax.Array) -> jax.Array:
    """Return the KV of pages, ``[M * page size, L, 2 * kv_heads, head dim]``."""
    count = len(page_M) * cache.page_size
    return jnp.stack([pool[page_M].reshape(count, 2 * kv_heads, -1) for pool in cache.kv], axis=1)


def put_pages(cache: KVCache, kv_TLJC: jax.Array, page_M: jax.Array) -> KVCache:
    """Write KV to pages in every layer; pages past the pool are dropped."""

    def written(layer: int, pool: jax.Array) -> jax.Array:
        new = kv_TLJC[:, layer].reshape(len(page_M), *pool.shape[1:])
        return pool.at[page_M].set(new, mode="drop")

    return KVCache([written(layer, pool) for layer, pool in enumerate(cache.kv)])


class KVPages:
    """Names and traces the programs, and makes their arguments.

    Args:
        model: sizes of the whole model.
        spread: its devices.
        page_size: tokens in a page.
        dtype: of the cache.
        role: of the engine: one that prefills reads, one that decodes writes, and others do neither.
    """

    def __init__(self, model: ModelConfig, spread: Spread, page_size: int, dtype: Any, role: str):
        self._spread = spread
        self._page_size = page_size
        self._dtype = dtype
        self.token_shape = (model.num_hidden_layers, 2 * model.num_key_value_heads, model.head_dim)
        verb = {"prefill": "take", "decode": "put"}.get(role)
        self.programs = {f"{verb}-pages-{size}": size for size in SIZES} if verb else {}
        self._sharding = spread.placement.sharding((page_size, *self.token_shape), _AXES)

    def trace(self, name: str, cache: KVCache) -> Any:
        """Trace a program."""
        size = self.programs[name]
        none = np.zeros(size, np.int32)
        if name.startswith("put"):
            empty = self._sent(np.zeros((size * self._page_size, *self.token_shape), self._dtype))
            return self._spread.trace(put_pages, (cache, empty, none), out=cache, donate=(0,))

        def take(cache: KVCache, page_M: jax.Array) -> jax.Array:
            return take_pages(self._spread.config.num_key_value_heads, cache, page_M)

        out = WHOLE if self._sharding is None else self._sharding.spec
        return self._spread.trace(take, (cache, none), out=out)

    def takes(self, pages: Many[int]) -> Iterator[tuple[str, np.ndarray]]:
        """Yield the calls that read pages in their order: a program's name, and page ids."""
        for at, size in _cut(len(pages)):
            yield f"take-pages-{size}", np.array(pages[at : at + size], np.int32)

    def puts(self, pages: Many[int], kv_TLJC: np.ndarray) -> Iterator[tuple[str, Any, np.ndarray]]:
        """Yield the calls that write KV to pages: a program's name, KV on its way to the device, and page ids."""
        for at, size in _cut(len(pages)):
            kv = kv_TLJC[at * self._page_size : (at + size) * self._page_size]
            missing = size * self._page_size - len(kv)
            if missing:  # The last page is not full.
                kv = np.concatenate([kv, np.zeros((missing, *kv.shape[1:]), kv.dtype)])
            yield f"put-pages-{size}", self._sent(kv), np.array(pages[at : at + size], np.int32)

    def _sent(self, kv_TLJC: np.ndarray) -> Any:
        return jax.device_put(kv_TLJC, self._sharding)


def prefix_calls(page_E: np.ndarray, slot_EI: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield what each call is given that writes learned prefixes: rank pages, and the slot of each position of them."""
    for at in range(0, len(page_E), PREFIX_PAGES):
        short = PREFIX_PAGES - len(page_E[at : at + PREFIX_PAGES])
        pages = np.pad(page_E[at : at + PREFIX_PAGES], (0, short))
        yield pages, np.pad(slot_EI[at : at + PREFIX_PAGES], ((0, short), (0, 0)), constant_values=NO_SLOT)


def _cut(count: int) -> Iterator[tuple[int, int]]:
    """Yield where each call begins and how many pages it takes."""
    at = 0
    while at < count:
        size = next(size for size in SIZES if size <= count - at)
        yield at, size
        at += size
