"""Causal attention of ragged queries over a pool of KV pages: jax's stock kernel, and one of ours where it cannot run.

The stock kernel (``jax.experimental.pallas.ops.tpu.ragged_paged_attention``) wants head sizes that are multiples of 128
and KV heads that fill TPU tiles. Ours takes head size 64 and any number of KV heads.

Ours cuts each request's queries into blocks; a grid step is one block. It copies the request's KV pages by id from
HBM, several pages at a time into one of two buffers, while it computes on the other; the copies for the first keys of
the next grid step start before this one ends. Softmax is online and in float32 (Milakov and Gimelshein, arXiv
1805.02867; Dao et al., arXiv 2205.14135).

Where C is no multiple of 128 the kernel reads a head's key and value as one row of 2C channels: queries padded with
zeros give the scores, and the value half of the weighted rows is the result. XLA stores a pool on TPU with the page's
tokens and heads swapped where its heads would not fill tiles; the kernel reads either order. So a pool is not copied,
provided that its pages are its outermost axis in memory: XLA stores ``[P, S, 2K, 64]`` with pages innermost, but
``[P, S, K, 128]``, which may be reshaped to it inside the program for nothing, with pages outermost.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.experimental.pallas.ops.tpu.ragged_paged_attention import ragged_paged_attention

from kernels.pallas_tpu.common import (
    LANES,
    SMEM_BUDGET_BYTES,
    SUBLANES,
    VMEM_BUDGET_BYTES,
    check_dtype,
    dot,
    tiled_bytes,
)
from kernels.tpu_tiles import fills_tiles
from kernels.types import Unsupported

_MASKED = -1e30
_MOST_QUERIES = 128
_MOST_KEYS = 512


class AttentionBlocks(NamedTuple):
    """Queries and KV pages that one step of a kernel handles, and the VMEM that its blocks then take."""

    queries: int
    pages: int
    vmem_bytes: int


class QueryBlocks(NamedTuple):
    """The blocks that ragged queries are cut into. int32.

    ``request_N`` owns the block; ``position_N`` is that of its first query in the request; ``keys_N`` counts the keys
    that its queries may see (0: an unused block, all of which come last); ``row_NQ`` are its queries' rows.
    ``block_T`` and ``offset_T`` say in which block a row of the packed queries lies and where; ``real_T`` (bool), that
    it is no padding.
    """

    request_N: jax.Array
    position_N: jax.Array
    keys_N: jax.Array
    row_NQ: jax.Array
    block_T: jax.Array
    offset_T: jax.Array
    real_T: jax.Array


def stock_takes(kv_heads2: int, channels: int) -> bool:
    """Return whether the stock kernel compiles for these KV heads."""
    return channels % LANES == 0 and fills_tiles(kv_heads2)


def _page_view(page_size: int, kv_heads2: int, channels: int) -> tuple[tuple[int, int, int], bool]:
    """Return the shape in which our kernel sees a page, and whether it swaps tokens and heads of it."""
    paired = channels % LANES != 0
    heads, lanes = (kv_heads2 // 2, 2 * channels) if paired else (kv_heads2, channels)
    swapped = not fills_tiles(heads)
    return ((heads, page_size, lanes) if swapped else (page_size, heads, lanes)), swapped


def stock_blocks(
    heads: int, kv_heads2: int, channels: int, page_size: int, tokens: int, table_width: int, dtype: Any, kv_dtype: Any
) -> AttentionBlocks:
    """Choose the stock kernel's blocks; its own choice asks the default backend, which need not be the target.

    Raises:
        Unsupported: no block fits VMEM.
    """
    group = heads // (kv_heads2 // 2)
    packing = 4 // jnp.dtype(kv_dtype).itemsize
    kv_block = SUBLANES * packing if kv_heads2 % (SUBLANES * packing) == 0 else kv_heads2
    q_block = kv_block // 2 * group

    def need(queries: int, pages: int) -> int:
        keys = pages * page_size
        total = 2 * pages * tiled_bytes((page_size, kv_block, channels), kv_dtype)
        total += 4 * tiled_bytes((queries, q_block, channels), dtype)
        total += tiled_bytes((queries, q_block, channels), jnp.float32)
        total += 2 * tiled_bytes((kv_block // 2, queries * group, LANES), jnp.float32)
        return total + 4 * tiled_bytes((queries * group, keys), jnp.float32) + 4 * tiled_bytes((keys, channels), dtype)

    return _fit(need, min(32, tokens), max(1, min(table_width, _MOST_KEYS // page_size)), page_size)


def own_blocks(
    heads: int, kv_heads2: int, channels: int, page_size: int, max_query_len: int, table_width: int, dtype: Any,
    kv_dtype: Any,
) -> AttentionBlocks:  # fmt: skip
    """Choose the blocks of our kernel.

    Raises:
        Unsupported: no block fits VMEM.
    """
    kv_heads = kv_heads2 // 2
    page, _ = _page_view(page_size, kv_heads2, channels)
    lanes = page[2]

    def need(queries: int, pages: int) -> int:
        rows, keys = queries * heads // kv_heads, pages * page_size
        total = 3 * pages * tiled_bytes(page, kv_dtype) + 4 * tiled_bytes((kv_heads, rows, lanes), dtype)
        total += tiled_bytes((kv_heads, rows, lanes), jnp.float32)
        total += 2 * tiled_bytes((kv_heads, rows, LANES), jnp.float32)
        return total + 4 * tiled_bytes((rows, keys), jnp.float32) + 4 * tiled_bytes((keys, channels), jnp.float32)

    queries = 1
    while queries < min(max_query_len, _MOST_QUERIES):
        queries *= 2
    return _fit(need, queries, max(1, min(table_width, _MOST_KEYS // page_size)), page_size)


def _fit(need: Any, queries: int, pages: int, page_size: int) -> AttentionBlocks:
    """Halve queries and pages, the larger first, until their blocks fit VMEM."""
    while need(queries, pages) > VMEM_BUDGET_BYTES:
        if queries == pages == 1:
            raise Unsupported(
                f"kv_PSJC has pages that take {need(1, 1)} bytes of VMEM; allowed: {VMEM_BUDGET_BYTES}; use smaller "
                "pages or fewer heads on a chip"
            )
        if queries > 1 and (pages == 1 or queries >= pages * page_size // 8):
            queries //= 2
        else:
            pages //= 2
    return AttentionBlocks(queries, pages, need(queries, pages))


def plan_queries(
    query_start_B1: jax.Array, kv_len_B: jax.Array, *, tokens: int, size: int, max_query_len: int
) -> QueryBlocks:
    """Cut each request's queries into blocks of ``size``; their number is static and depends on shapes alone."""
    batch = kv_len_B.shape[0]
    num_blocks = min(batch * -(-max_query_len // size), tokens // size + batch)
    query_len_B = query_start_B1[1:] - query_start_B1[:-1]
    blocks_B = -(-query_len_B // size)
    end_B = jnp.cumsum(blocks_B)
    block_N = jnp.arange(num_blocks, dtype=jnp.int32)
    request_N = jnp.minimum(jnp.searchsorted(end_B, block_N, side="right"), batch - 1).astype(jnp.int32)
    first_B = end_B - blocks_B
    offset_N = (block_N - first_B[request_N]) * size
    position_N = (kv_len_B - query_len_B)[request_N] + offset_N
    keys_N = jnp.minimum(position_N + size, kv_len_B[request_N])
    keys_N = jnp.where(block_N < end_B[-1], jnp.maximum(keys_N, 1), 0)
    row_NQ = (query_start_B1[request_N] + offset_N)[:, None] + jnp.arange(size, dtype=jnp.int32)
    token_T = jnp.arange(tokens, dtype=jnp.int32)
    owner_T = jnp.minimum(jnp.searchsorted(query_start_B1[1:], token_T, side="right"), batch - 1)
    at_T = token_T - query_start_B1[owner_T]
    return QueryBlocks(
        request_N,
        position_N.astype(jnp.int32),
        keys_N.astype(jnp.int32),
        jnp.clip(row_NQ, 0, tokens - 1),
        jnp.clip(first_B[owner_T] + at_T // size, 0, num_blocks - 1),
        at_T % size,
        token_T < query_start_B1[-1],
    )


def _by_head(pages: jax.Array, swapped: bool) -> list[jax.Array]:
    """Return each head's rows ``[keys, lanes]`` of pages ``[pages, heads, S, lanes]`` if ``swapped``, else ``[pages,
    S, heads, lanes]``.
    """
    count, *page, lanes = pages.shape
    if swapped:
        return [pages[:, head].reshape(count * page[1], lanes) for head in range(page[0])]
    heads = pages.reshape(count * page[0], page[1], lanes).swapaxes(0, 1)
    return [heads[head] for head in range(page[1])]


def _kernel(
    swapped: bool, size: int, table_width: int, group: int, scale: float, window: int | None,
    table_ref: Any, request_ref: Any, position_ref: Any, keys_ref: Any, before_ref: Any,
    q_ref: Any, kv_ref: Any, out_ref: Any, pages_ref: Any, semaphores: Any, max_ref: Any, sum_ref: Any, acc_ref: Any,
) -> None:  # fmt: skip
    """Attend one block of queries ``q_ref [1, K, queries * group, lanes]``; grid ``(block,)``.

    ``before_ref`` counts the steps over keys of all blocks before, so that a block knows which of the two page buffers
    its first keys are in.
    """
    n = pl.program_id(0)
    per_step = pages_ref.shape[1]
    step_keys = per_step * size
    keys = keys_ref[n]
    num_steps = pl.cdiv(keys, step_keys)

    def first_step(block: Any) -> Any:
        return 0 if window is None else _first_step(position_ref[block], window, step_keys)

    def copies(block: Any, step: Any, act: Any) -> None:
        """Start or wait for the copies of one step over keys of a block; pages without keys are left out."""
        buffer = jax.lax.rem(before_ref[block] + step - first_step(block), 2)
        for i in range(per_step):
            page = step * per_step + i

            @pl.when(page * size < keys_ref[block])
            def _(i: int = i, page: Any = page) -> None:
                source = kv_ref.at[table_ref[request_ref[block] * table_width + page]]
                act(pltpu.make_async_copy(source, pages_ref.at[buffer, i], semaphores.at[buffer]))

    def start(block: Any, step: Any) -> None:
        copies(block, step, lambda copy: copy.start())

    @pl.when((n == 0) & (keys > 0))
    def _() -> None:
        start(0, first_step(0))

    max_ref[...] = jnp.full_like(max_ref, _MASKED)
    sum_ref[...] = jnp.zeros_like(sum_ref)
    acc_ref[...] = jnp.zeros_like(acc_ref)
    rows = q_ref.shape[2]
    query = jax.lax.div(jax.lax.broadcasted_iota(jnp.int32, (rows, step_keys), 0), group)
    last_key = jnp.minimum(position_ref[n] + query, keys - 1)

    def attend(step: Any, _: None) -> None:
        @pl.when(step + 1 < num_steps)
        def _() -> None:
            start(n, step + 1)

        @pl.when((step + 1 == num_steps) & (n + 1 < pl.num_programs(0)))
        def _() -> None:
            start(n + 1, first_step(n + 1))

        copies(n, step, lambda copy: copy.wait())
        buffer = jax.lax.rem(before_ref[n] + step - first_step(n), 2)
        key = step * step_keys + jax.lax.broadcasted_iota(jnp.int32, (rows, step_keys), 1)
        visible = key <= last_key if window is None else (key <= last_key) & (key > last_key - window)
        filled = step * step_keys + jax.lax.broadcasted_iota(jnp.int32, (step_keys, 1), 0) < keys
        by_head = _by_head(pages_ref[buffer], swapped)
        for head in range(q_ref.shape[1]):
            k, v = (by_head[head],) * 2 if len(by_head) == q_ref.shape[1] else by_head[2 * head : 2 * head + 2]
            k, v = k.astype(q_ref.dtype), jnp.where(filled, v, jnp.zeros_like(v)).astype(q_ref.dtype)
            scores = jnp.where(visible, dot(q_ref[0, head], k, (1, 1)) * scale, _MASKED)
            before = max_ref[head, :, :1]
            highest = jnp.maximum(before, jnp.max(scores, axis=1, keepdims=True))
            weights = jnp.where(visible, jnp.exp(scores - highest), 0.0)
            fade = jnp.exp(before - highest)
            total = fade * sum_ref[head, :, :1] + jnp.sum(weights, axis=1, keepdims=True)
            acc_ref[head] = fade * acc_ref[head] + dot(weights.astype(v.dtype), v, (1, 0))
            max_ref[head] = jnp.broadcast_to(highest, max_ref.shape[1:])
            sum_ref[head] = jnp.broadcast_to(total, sum_ref.shape[1:])

    jax.lax.fori_loop(first_step(n), num_steps, attend, None)
    for head in range(q_ref.shape[1]):
        total = sum_ref[head, :, :1]
        out = acc_ref[head, :, -out_ref.shape[3] :] / jnp.where(total == 0, 1.0, total)
        out_ref[0, head] = out.astype(out_ref.dtype)


def _first_step(position: Any, window: int, step_keys: int) -> Any:
    """Return the step over keys that has the first one that a query at ``position`` sees."""
    return jax.lax.div(jnp.maximum(position - window + 1, 0), step_keys)


def _own(
    q_THC: jax.Array, kv_PSJC: jax.Array, page_table_BP: jax.Array, query_start_B1: jax.Array, kv_len_B: jax.Array,
    max_query_len: int, scale: float, window: int | None,
) -> jax.Array:  # fmt: skip
    """Attention by our kernel, between a gather of query blocks and one back."""
    tokens, heads, channels = q_THC.shape
    size, kv_heads2 = kv_PSJC.shape[1:3]
    kv_heads, table_width = kv_heads2 // 2, page_table_BP.shape[1]
    group = heads // kv_heads
    queries, pages, _ = own_blocks(
        heads, kv_heads2, channels, size, max_query_len, table_width, q_THC.dtype, kv_PSJC.dtype
    )
    plan = plan_queries(query_start_B1, kv_len_B, tokens=tokens, size=queries, max_query_len=max_query_len)
    num_blocks, rows = plan.request_N.shape[0], queries * group
    q_NQKGC = q_THC[plan.row_NQ].reshape(num_blocks, queries, kv_heads, group, channels)
    steps_N = -(-plan.keys_N // (pages * size))
    if window is not None:
        steps_N = jnp.maximum(steps_N - _first_step(plan.position_N, window, pages * size), 0)
    q_NKRC = q_NQKGC.transpose(0, 2, 1, 3, 4).reshape(num_blocks, kv_heads, rows, channels)
    page, swapped = _page_view(size, kv_heads2, channels)
    pool = kv_PSJC.reshape(-1, size, page[0] if swapped else page[1], page[2])
    pool = pool.swapaxes(1, 2) if swapped else pool
    q_NKRC = jnp.pad(q_NKRC, ((0, 0), (0, 0), (0, 0), (0, page[2] - channels)))

    def rows_spec(lanes: int) -> pl.BlockSpec:
        return pl.BlockSpec((1, kv_heads, rows, lanes), lambda n, *_: (n, 0, 0, 0))

    out = pl.pallas_call(
        functools.partial(_kernel, swapped, size, table_width, group, scale, window),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=5,
            grid=(num_blocks,),
            in_specs=[rows_spec(page[2]), pl.BlockSpec(memory_space=pl.ANY)],
            out_specs=rows_spec(channels),
            scratch_shapes=[
                pltpu.VMEM((2, pages, *page), pool.dtype),
                pltpu.SemaphoreType.DMA((2,)),
                pltpu.VMEM((kv_heads, rows, LANES), jnp.float32),
                pltpu.VMEM((kv_heads, rows, LANES), jnp.float32),
                pltpu.VMEM((kv_heads, rows, page[2]), jnp.float32),
            ],
        ),
        out_shape=jax.ShapeDtypeStruct((num_blocks, kv_heads, rows, channels), q_THC.dtype),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("arbitrary",)),
        name="preft_paged_attention",
    )(
        page_table_BP.reshape(-1).astype(jnp.int32),
        plan.request_N,
        plan.position_N,
        plan.keys_N,
        (jnp.cumsum(steps_N) - steps_N).astype(jnp.int32),
        q_NKRC,
        pool,
    )
    out = out.reshape(num_blocks, kv_heads, queries, group, channels).transpose(0, 2, 1, 3, 4)
    out = out.reshape(num_blocks, queries, heads, channels)[plan.block_T, plan.offset_T]
    return jnp.where(plan.real_T[:, None, None], out, jnp.zeros_like(out))


def _stock(
    q_THC: jax.Array, kv_PSJC: jax.Array, page_table_BP: jax.Array, query_start_B1: jax.Array, kv_len_B: jax.Array,
    scale: float, window: int | None,
) -> jax.Array:  # fmt: skip
    """Attention by the stock kernel.

    It starts copies for the request after the one at hand and waits for them only if that one has keys and a turn: so
    a request without queries gets one key, those at the end are left out, and a batch without any query gets one. It
    leaves rows past the last query undefined.
    """
    tokens, heads, channels = q_THC.shape
    batch, table_width = page_table_BP.shape
    queries, pages, _ = stock_blocks(
        heads, kv_PSJC.shape[2], channels, kv_PSJC.shape[1], tokens, table_width, q_THC.dtype, kv_PSJC.dtype
    )
    total = query_start_B1[-1]
    start_B1 = query_start_B1.at[1:].max(jnp.where(total == 0, 1, 0)).astype(jnp.int32)
    asks_B = start_B1[1:] > start_B1[:-1]
    num_requests = jnp.max(jnp.where(asks_B, jnp.arange(1, batch + 1, dtype=jnp.int32), 0))
    kv_len_B = jnp.where(asks_B & (total > 0), jnp.maximum(kv_len_B, 1), 1).astype(jnp.int32)
    out = ragged_paged_attention(
        q_THC, kv_PSJC, kv_len_B, page_table_BP.astype(jnp.int32), start_B1, num_requests[None], sm_scale=scale,
        sliding_window=window,
        num_queries_per_block=queries, num_kv_pages_per_block=pages,
    )  # fmt: skip
    real_T = jnp.arange(tokens, dtype=jnp.int32) < total
    return jnp.where(real_T[:, None, None], out, jnp.zeros_like(out))


def paged_attention(
    q_THC: jax.Array,
    kv_PSJC: jax.Array,
    page_table_BP: jax.Array,
    query_start_B1: jax.Array,
    kv_len_B: jax.Array,
    *,
    max_query_len: int,
    scale: float,
    window: int | None = None,
) -> jax.Array:
    """See ``kernels.api.paged_attention``. Keys and values are multiplied in the dtype of ``q_THC``.

    Raises:
        Unsupported: a dtype, page size, head size or page table that the kernels cannot take.
    """
    check_dtype("q_THC", q_THC.dtype)
    check_dtype("kv_PSJC", kv_PSJC.dtype)
    channels = q_THC.shape[2]
    size, kv_heads2 = kv_PSJC.shape[1:3]
    if size % SUBLANES:
        raise Unsupported(f"kv_PSJC has pages of {size} tokens; the TPU kernels take multiples of {SUBLANES}")
    if channels % 16:
        raise Unsupported(f"q_THC has head size {channels}; the TPU kernels take multiples of 16")
    if page_table_BP.size * 4 > SMEM_BUDGET_BYTES:
        raise Unsupported(
            f"page_table_BP takes {page_table_BP.size * 4} bytes of scalar memory; allowed: {SMEM_BUDGET_BYTES}; use "
            "larger pages or fewer requests a batch"
        )
    arrays = (q_THC, kv_PSJC, page_table_BP, query_start_B1, kv_len_B)
    if stock_takes(kv_heads2, channels):
        return _stock(*arrays, scale, window)
    return _own(*arrays, max_query_len, scale, window)
