"""One entry for every kernel.

``implementation=None`` takes the best implementation that this backend and these shapes allow; a name takes that one or
raises ``NotImplementedError`` with the reason. Wrong arguments raise ``ValueError`` naming the argument. Axis letters:
``preft_jax/shapes.py``.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from kernels import xla
from kernels.types import PagePool, TilePages


def _pick(op: str, table: Mapping[str, Callable[..., Any]], implementation: str | None) -> Callable[..., Any]:
    if implementation is None:
        return table["xla"]
    if implementation not in table:
        raise NotImplementedError(f"{op} has no implementation {implementation!r}; available: {', '.join(table)}")
    return table[implementation]


def _check(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


def _check_pool(pool: PagePool, width_in: int, width_out: int | None) -> None:
    p, d, r = pool.a_PDR.shape
    _check(d == width_in, f"pool.a_PDR has input width {d}; x has {width_in}")
    _check(pool.c_PR.shape == (p, r), f"pool.c_PR has shape {pool.c_PR.shape}; expected {(p, r)}")
    _check(pool.b_PRF.shape[:2] == (p, r), f"pool.b_PRF has shape {pool.b_PRF.shape}; expected ({p}, {r}, F)")
    if width_out is not None:
        _check(
            pool.b_PRF.shape[2] == width_out, f"pool.b_PRF has output width {pool.b_PRF.shape[2]}; y has {width_out}"
        )


def _check_tiles(tiles: TilePages, num_tokens: int) -> None:
    shape = tiles.page_NE.shape
    for name, array in tiles._asdict().items():
        _check(array.shape == shape, f"tiles.{name} has shape {array.shape}; page_NE has {shape}")
        _check(jnp.issubdtype(array.dtype, jnp.integer), f"tiles.{name} has dtype {array.dtype}; it must be an integer")
    _check(
        shape[0] > 0 and num_tokens % shape[0] == 0,
        f"tiles.page_NE has {shape[0]} tiles, which do not divide {num_tokens} tokens",
    )


def shrink(
    x_TD: jax.Array,
    pools: Sequence[PagePool],
    tiles: Sequence[TilePages],
    mask_TG: jax.Array,
    *,
    implementation: str | None = None,
) -> tuple[jax.Array, ...]:
    """The first half of the low-rank edits of all sites that read one ``x``: ``m * (x @ A + c)``.

    Args:
        x_TD: packed tokens, bfloat16 or float32.
        pools: rank pages of each site that reads ``x`` (q, k and v share one input, gate and up another).
        tiles: each site's page lists.
        mask_TG: bool edit mask; column ``tiles.group_NE`` switches an entry.

    Returns:
        One float32 ``[T, E, R]`` a site; zero where an entry does not edit the token.
    """
    _check(len(pools) == len(tiles), f"pools has {len(pools)} sites, tiles {len(tiles)}")
    _check(
        mask_TG.ndim == 2 and mask_TG.shape[0] == x_TD.shape[0] and mask_TG.dtype == jnp.bool_,
        f"mask_TG is {mask_TG.dtype}{list(mask_TG.shape)}; expected bool[{x_TD.shape[0]}, groups]",
    )
    for pool, tile_pages in zip(pools, tiles, strict=True):
        _check_pool(pool, x_TD.shape[1], None)
        _check_tiles(tile_pages, x_TD.shape[0])
    return _pick("shrink", {"xla": xla.shrink}, implementation)(x_TD, pools, tiles, mask_TG)


def expand(
    s_TER: jax.Array, y_TF: jax.Array, pool: PagePool, tiles: TilePages, *, implementation: str | None = None
) -> jax.Array:
    """The second half: ``y + s @ B``, with ``s_TER`` from ``shrink``. Returns the shape and dtype of ``y_TF``."""
    _check(
        s_TER.shape[:2] == (y_TF.shape[0], tiles.page_NE.shape[1]),
        f"s_TER has shape {s_TER.shape}; expected ({y_TF.shape[0]}, {tiles.page_NE.shape[1]}, rank)",
    )
    _check_pool(pool, pool.a_PDR.shape[1], y_TF.shape[1])
    _check_tiles(tiles, y_TF.shape[0])
    return _pick("expand", {"xla": xla.expand}, implementation)(s_TER, y_TF, pool, tiles)


def lowrank_edit(
    x_TD: jax.Array,
    y_TF: jax.Array,
    pool: PagePool,
    tiles: TilePages,
    mask_TG: jax.Array,
    *,
    implementation: str | None = None,
) -> jax.Array:
    """``y + m * ((x @ A + c) @ B)`` for many adapters in one packed batch: ``shrink`` then ``expand``, unfused."""
    (s_TER,) = shrink(x_TD, (pool,), (tiles,), mask_TG, implementation=implementation)
    return expand(s_TER, y_TF, pool, tiles, implementation=implementation)


def decode_edit(
    x_BD: jax.Array, y_BF: jax.Array, pool: PagePool, page_BE: jax.Array, *, implementation: str | None = None
) -> jax.Array:
    """The edit of one token a row, each row with its own list of pages ``page_BE`` (int32; 0 is null).

    What all-token adapters pay at every decode step. Returns the shape and dtype of ``y_BF``.
    """
    _check_pool(pool, x_BD.shape[1], y_BF.shape[1])
    _check(page_BE.shape[0] == x_BD.shape[0], f"page_BE has {page_BE.shape[0]} rows; x_BD has {x_BD.shape[0]}")
    return _pick("decode_edit", {"xla": xla.decode_edit}, implementation)(x_BD, y_BF, pool, page_BE)


def paged_attention(
    q_THC: jax.Array,
    k_PSKC: jax.Array,
    v_PSKC: jax.Array,
    page_table_BP: jax.Array,
    query_start_B1: jax.Array,
    kv_len_B: jax.Array,
    *,
    max_query_len: int,
    scale: float | None = None,
    implementation: str | None = None,
) -> jax.Array:
    """Causal attention of packed, ragged queries over one shared pool of KV pages (grouped-query attention included).

    Args:
        q_THC: queries of all requests, one request after the other; later rows are padding and give zeros.
        k_PSKC, v_PSKC: KV pool ``[pages, page size, KV heads, C]``; the queries' own keys are already written.
        page_table_BP: int32, the pages of each request in order; entries past ``kv_len_B`` may be any valid page.
        query_start_B1: int32 ``[B + 1]``, where each request's queries start, ending with their total.
        kv_len_B: int32, keys of each request, its queries' own included; its queries are its last positions.
        max_query_len: static bound on the queries of one request (1 for decode).
        scale: multiplies the scores; ``C ** -0.5`` if None.

    Returns:
        ``[T, H, C]`` in the dtype of ``q_THC``; softmax in float32.
    """
    heads, channels = q_THC.shape[1:]
    _check(k_PSKC.shape == v_PSKC.shape, f"k_PSKC has shape {k_PSKC.shape}, v_PSKC {v_PSKC.shape}")
    _check(k_PSKC.shape[3] == channels, f"k_PSKC has head size {k_PSKC.shape[3]}; q_THC has {channels}")
    _check(heads % k_PSKC.shape[2] == 0, f"q_THC has {heads} heads, not a multiple of {k_PSKC.shape[2]} KV heads")
    batch = kv_len_B.shape[0]
    _check(page_table_BP.shape[0] == batch, f"page_table_BP has {page_table_BP.shape[0]} rows; kv_len_B {batch}")
    _check(
        query_start_B1.shape == (batch + 1,),
        f"query_start_B1 has shape {query_start_B1.shape}; expected ({batch + 1},)",
    )
    _check(1 <= max_query_len <= q_THC.shape[0], f"max_query_len is {max_query_len}; allowed: 1 to {q_THC.shape[0]}")
    return _pick("paged_attention", {"xla": xla.paged_attention}, implementation)(
        q_THC, k_PSKC, v_PSKC, page_table_BP, query_start_B1, kv_len_B,
        max_query_len=max_query_len, scale=channels**-0.5 if scale is None else scale,
    )  # fmt: skip
