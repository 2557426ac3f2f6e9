"""A kernel case of paged attention: its shapes, random inputs of those shapes, the call, and the least work that it is.

``bench/kernel_cases.py`` lists the cases; tests and benchmarks share both. Axis letters: ``preft_jax/shapes.py``.
"""

import dataclasses
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from bench.edit_case import normal
from kernels import api


class AttentionInputs(NamedTuple):
    """Arguments of ``kernels.api.paged_attention``."""

    q_THC: jax.Array
    kv_PSJC: jax.Array
    page_table_BP: jax.Array
    query_start_B1: jax.Array
    kv_len_B: jax.Array


@dataclasses.dataclass(frozen=True, kw_only=True)
class AttentionCase:
    """A batch of ragged queries over one pool of KV pages.

    Attributes:
        name: unique; ``attention/kind/batch``.
        tags: as of ``EditCase``.
        query_lens: queries of each request.
        kv_lens: keys of each request, its queries' own included.
        heads: of the queries.
        kv_heads: of keys and of values.
        head_size: channels of a head.
        page_size: tokens of a KV page.
        shared_pages: first pages that all requests have in common (a shared prefix).
        pool_factor: pages in the pool over pages in use.
        spare_table: entries of a page table beyond the longest request's.
        dtype: of queries and pool.
        kv_dtype: of the pool; None: that of the queries.
        padding: rows of q after the last request's.
        max_query_len: bound given to the kernel; None: the longest.
        scale: of the scores; None: the default.
        window: most keys that a query sees; None: all before it.
    """

    name: str
    tags: tuple[str, ...]
    query_lens: tuple[int, ...]
    kv_lens: tuple[int, ...]
    heads: int = 4
    kv_heads: int = 2
    head_size: int = 64
    page_size: int = 16
    shared_pages: int = 0
    pool_factor: float = 1.25
    spare_table: int = 1
    dtype: str = "float32"
    kv_dtype: str | None = None
    padding: int = 0
    max_query_len: int | None = None
    scale: float | None = None
    window: int | None = None
    op: str = "paged_attention"

    def __post_init__(self) -> None:
        for queries, keys in zip(self.query_lens, self.kv_lens, strict=True):
            if queries > keys or 0 < keys < self.shared_pages * self.page_size:
                raise ValueError(f"case {self.name!r} has a request of {queries} queries and {keys} keys")

    @property
    def num_tokens(self) -> int:
        """``T``, padding included."""
        return sum(self.query_lens) + self.padding

    def _page_counts(self) -> list[int]:
        return [-(-keys // self.page_size) for keys in self.kv_lens]

    def _pages_in_use(self) -> int:
        return self.shared_pages + sum(max(count - self.shared_pages, 0) for count in self._page_counts())

    def inputs(self, rng: np.random.Generator) -> AttentionInputs:
        """Return random arguments; pages lie scattered over the pool, and unused table entries name any page."""
        counts = self._page_counts()
        pool = max(1, math.ceil(self._pages_in_use() * self.pool_factor))
        width = max(1, *counts) + self.spare_table
        table = rng.integers(0, pool, (len(counts), width)).astype(np.int32)
        order = rng.permutation(pool).astype(np.int32)
        shared, order = order[: self.shared_pages], order[self.shared_pages :]
        for row, count in enumerate(counts):
            if count:
                own = count - self.shared_pages
                table[row, :count] = np.concatenate([shared, order[:own]])
                order = order[own:]
        shape = (pool, self.page_size, 2 * self.kv_heads, self.head_size)
        return AttentionInputs(
            normal(rng, (self.num_tokens, self.heads, self.head_size), self.dtype),
            normal(rng, shape, self.kv_dtype or self.dtype),
            jnp.asarray(table),
            jnp.asarray(np.cumsum([0, *self.query_lens]), jnp.int32),
            jnp.asarray(self.kv_lens, jnp.int32),
        )

    def run(self, inputs: AttentionInputs, implementation: str | None = None) -> jax.Array:
        """Call ``kernels.api.paged_attention``."""
        longest = self.max_query_len or max(1, *self.query_lens)
        return api.paged_attention(
            *inputs, max_query_len=longest, scale=self.scale, window=self.window, implementation=implementation
        )

    def flops(self) -> int:
        """Return the multiplications and additions of both matrix products over visible keys."""
        visible = sum(
            min(keys - n + i + 1, self.window or keys)
            for n, keys in zip(self.query_lens, self.kv_lens, strict=True)
            for i in range(n)
        )
        return 4 * self.heads * self.head_size * visible

    def bytes(self) -> int:
        """Return the least traffic: q read, the output written, each live token's keys and values read once."""
        shared = self.shared_pages * self.page_size
        seen = [
            min(keys, self.window + n - 1) if self.window else keys
            for n, keys in zip(self.query_lens, self.kv_lens, strict=True)
        ]
        live = shared + sum(max(keys - shared, 0) for keys in seen)
        kv_size = jnp.dtype(self.kv_dtype or self.dtype).itemsize
        q_bytes = 2 * self.num_tokens * self.heads * self.head_size * jnp.dtype(self.dtype).itemsize
        return q_bytes + live * 2 * self.kv_heads * self.head_size * kv_size
