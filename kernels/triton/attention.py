"""Attention over pages: of packed queries in blocks, and of a decode step, which rotates and keeps its own tokens too.

A program takes a block of queries of one request, for all query heads that share a KV head, and runs an online softmax
(Milakov and Gimelshein, arXiv 1805.02867; Dao, arXiv 2307.08691) over its share of the keys.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from kernels.triton import interpret
from kernels.triton.call import (
    call,
    check_dtype,
    check_pool_dtype,
    elements,
    numbers_of_columns,
    power_of_two,
    product_args,
    require,
)
from kernels.triton.device.attention import attend_kernel, combine_kernel, decode_attend_kernel
from kernels.types import Product
from kernels.xla.fp8 import FP8


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """How attention is cut up.

    Attributes:
        queries: of one request in a program.
        keys: of one step of the loop, a power of two.
        splits: programs that share the keys of one block of queries.
        warps: of a program.
        stages: of the loop's software pipeline.
    """

    queries: int
    keys: int
    splits: int
    warps: int
    stages: int

    def __post_init__(self) -> None:
        if self.keys & (self.keys - 1) or self.queries & (self.queries - 1) or self.keys < 16:
            raise ValueError(f"queries {self.queries} and keys {self.keys} must be powers of two, keys from 16")


def config_for(
    *,
    batch: int,
    kv_heads: int,
    group: int,
    channels: int,
    max_query_len: int,
    max_keys: int,
    dtype: Any,
    pool_dtype: Any,
) -> Config:
    """Return a configuration: decode wants bytes in flight, prefill wants large products."""
    bytes_each = jnp.dtype(dtype).itemsize
    if max_query_len == 1:
        programs = batch * kv_heads
        splits = 1
        while programs * splits < 1056 and splits * 256 < max_keys:
            splits *= 2
        if bytes_each == 2 and channels <= 128 and group <= 16:
            # A warp of its own waits for no other, and many of them are resident.
            return Config(queries=1, keys=32, splits=splits, warps=1, stages=2 if pool_dtype == FP8 else 3)
        return Config(queries=1, keys=64, splits=splits, warps=4, stages=3)
    # Many keys are worth large products, which short prompts would leave half empty.
    long = max_keys >= 1024 and bytes_each == 2
    rows, keys = (128, 64) if long else (64, 32)
    queries = min(max(1, rows // power_of_two(group)), power_of_two(max_query_len))
    return Config(queries=queries, keys=keys, splits=1, warps=4, stages=3)


def query_blocks(
    query_start_B1: jax.Array, num_tokens: int, batch: int, size: int, max_query_len: int
) -> tuple[jax.Array, jax.Array]:
    """Return the request and the first query of each block of ``size`` queries, int32 ``[N]``.

    Rows past the last request's queries belong to request ``batch``, which has no keys. Blocks beyond the last are
    empty ones of it. Sums and searches compare each with each: one small kernel instead of a dozen.
    """
    starts = jnp.concatenate([query_start_B1, jnp.full((1,), num_tokens, query_start_B1.dtype)])
    count_B = -(-(starts[1:] - starts[:-1]) // size)
    index_B = jnp.arange(batch + 1, dtype=jnp.int32)
    end_B = jnp.where(index_B[None, :] <= index_B[:, None], count_B[None, :], 0).sum(axis=1)
    num_blocks = min(batch * -(-max_query_len // size) + -(-num_tokens // size), num_tokens // size + batch + 1)
    block_N = jnp.arange(num_blocks, dtype=jnp.int32)
    request_N = jnp.minimum((end_B[None, :] <= block_N[:, None]).sum(axis=1), batch).astype(jnp.int32)
    return request_N, ((block_N - (end_B - count_B)[request_N]) * size).astype(jnp.int32)


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
    config: Config | None = None,
) -> jax.Array:
    """See ``kernels.api.paged_attention``. ``config`` is chosen by the shapes if None."""
    check_dtype("q_THC", q_THC)
    check_pool_dtype(kv_PSJC)
    tokens, heads, channels = q_THC.shape
    size, kv_heads = kv_PSJC.shape[1], kv_PSJC.shape[2] // 2
    batch, width = page_table_BP.shape
    group = heads // kv_heads
    _check_channels("q_THC", channels)
    if config is None:
        config = config_for(
            batch=batch, kv_heads=kv_heads, group=group, max_query_len=max_query_len,
            max_keys=min(width * size, window or width * size), channels=channels,
            dtype=q_THC.dtype, pool_dtype=kv_PSJC.dtype,
        )  # fmt: skip
    request_N, offset_N = query_blocks(query_start_B1, tokens, batch, config.queries, max_query_len)
    starts = jnp.concatenate([query_start_B1, jnp.full((1,), tokens, query_start_B1.dtype)]).astype(jnp.int32)
    kv_len = jnp.concatenate([kv_len_B, jnp.zeros((1,), kv_len_B.dtype)]).astype(jnp.int32)
    group_padded = power_of_two(group)
    splits = config.splits
    same = jax.ShapeDtypeStruct(q_THC.shape, q_THC.dtype)
    whole = splits == 1
    out, lse = call(
        attend_kernel,
        q_THC, kv_PSJC, jnp.asarray(page_table_BP, jnp.int32), request_N, offset_N, starts, kv_len,
        out=[
            same if whole else jax.ShapeDtypeStruct((splits, *q_THC.shape), jnp.float32),
            jax.ShapeDtypeStruct((1,) if whole else (splits, tokens, heads, 2), jnp.float32),
        ],
        grid=(kv_heads, request_N.shape[0], splits),
        warps=config.warps, stages=config.stages,
        SCALE=scale, T=tokens, H=heads, K=kv_heads, C=channels, PAGE=size, WIDTH=width,
        G=group, GP=group_padded, M=max(16, group_padded * config.queries), BQ=config.queries, BN=config.keys,
        SPLITS=splits, WINDOW=window or 0,
    )  # fmt: skip
    return out if whole else _combine(out, lse, q_THC.dtype)


def _combine(out_UTHC: jax.Array, lse_UTH2: jax.Array, dtype: Any) -> jax.Array:
    """Return the mean of the splits' results, weighed by their softmax sums."""
    splits, tokens, heads, channels = out_UTHC.shape
    (combined_THC,) = call(
        combine_kernel, out_UTHC, lse_UTH2, out=[jax.ShapeDtypeStruct((tokens, heads, channels), dtype)],
        grid=(tokens * heads,), warps=1,
        ROWS=tokens * heads, C=channels, SPLITS=splits, SP=power_of_two(splits),
    )  # fmt: skip
    return combined_THC


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
    config: Config | None = None,
) -> tuple[jax.Array, jax.Array]:
    """See ``kernels.api.decode_attention``. ``config`` is chosen by the shapes if None."""
    y_BF = elements(qkv_BF)
    check_dtype("qkv_BF", y_BF)
    check_pool_dtype(kv_PSJC)
    batch, width = page_table_BP.shape
    _, size, kv_heads2, channels = kv_PSJC.shape
    kv_heads, heads = kv_heads2 // 2, y_BF.shape[1] // channels - kv_heads2
    _check_channels("kv_PSJC", channels)
    group = heads // kv_heads
    if config is None:
        config = config_for(
            batch=batch, kv_heads=kv_heads, group=group, max_query_len=1,
            max_keys=min(width * size, window or width * size), channels=channels,
            dtype=y_BF.dtype, pool_dtype=kv_PSJC.dtype,
        )  # fmt: skip
    splits = config.splits
    whole = splits == 1
    out, lse, kv_PSJC = call(
        decode_attend_kernel,
        *product_args(qkv_BF, y_BF), cos_BX, sin_BX, kv_PSJC,
        jnp.asarray(page_table_BP, jnp.int32), jnp.asarray(position_B, jnp.int32),
        *(y_BF if weight is None else weight for weight in (q_norm_C, k_norm_C)),
        out=[
            jax.ShapeDtypeStruct((batch, heads, channels), y_BF.dtype)
            if whole
            else jax.ShapeDtypeStruct((splits, batch, heads, channels), jnp.float32),
            jax.ShapeDtypeStruct((1,) if whole else (splits, batch, heads, 2), jnp.float32),
            jax.ShapeDtypeStruct(kv_PSJC.shape, kv_PSJC.dtype),
        ],
        aliases={5: 2},
        grid=(kv_heads, batch, splits),
        warps=config.warps, stages=config.stages,
        SCALE=scale, B=batch, H=heads, K=kv_heads, C=channels, PAGE=size, WIDTH=width, G=group,
        M=max(16, power_of_two(group)), BN=config.keys, SPLITS=splits, NORM=q_norm_C is not None, EPS=eps,
        WINDOW=window or 0, SCALED=numbers_of_columns(qkv_BF),
        FP8=kv_PSJC.dtype == FP8 and y_BF.dtype == jnp.bfloat16 and not interpret.is_on(),
    )  # fmt: skip
    return (out if whole else _combine(out, lse, y_BF.dtype)), kv_PSJC


def _check_channels(name: str, channels: int) -> None:
    require(channels in (32, 64, 128, 256), f"{name} has head size {channels}; supported: 32, 64, 128, 256")
