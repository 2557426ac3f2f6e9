"""Both halves of the low-rank edits of packed tokens: ``shrink`` and ``expand``.

A grid step handles one tile of tokens and up to eight entries of its page list: eight rank-16 pages fill the 128 lanes
of the MXU, so they cost one matmul. The page ids are prefetched to scalar memory and choose the blocks that Pallas'
pipeline copies while the step before computes; consecutive steps that name the same page copy it once. On TPU, XLA
stores ``a_PDR`` with D minor, so its transposed view ``[P, R, D]`` costs nothing and has no padded lanes.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels.pallas_tpu.common import (
    SMEM_BUDGET_BYTES,
    VMEM_BUDGET_BYTES,
    check_dtype,
    dot,
    round_up,
    tiled_bytes,
    width_blocks,
)
from kernels.types import Shrunk, Site, TilePages, Unsupported

SLOTS = 8
"""Entries of a page list that one grid step handles."""


class Blocks(NamedTuple):
    """Block size along D or F, and the VMEM that the kernel's blocks then take."""

    width: int
    vmem_bytes: int


def _slots(entries: int) -> int:
    return min(SLOTS, entries)


def shrink_blocks(tile: int, width: int, entries: int, rank: int, x_dtype: Any, page_dtypes: tuple[Any, ...]) -> Blocks:
    """Choose the block of D for a shrink of one site for each of ``page_dtypes``.

    Raises:
        Unsupported: no block fits VMEM.
    """
    lanes = _slots(entries) * rank

    def need(block: int) -> int:
        total = 2 * tiled_bytes((tile, block), x_dtype) + 2 * tiled_bytes((tile, 2), jnp.int32)
        for dtype in page_dtypes:
            total += 2 * _slots(entries) * tiled_bytes((rank, block), dtype)
            total += 2 * tiled_bytes((tile, lanes), jnp.float32) + 4 * tiled_bytes((3, lanes), jnp.int32)
        return total + tiled_bytes((lanes, block), x_dtype) + 4 * tiled_bytes((tile, lanes), jnp.float32)

    return _first_fit("x_TD", width, need)


def expand_blocks(tile: int, width: int, entries: int, rank: int, y_dtype: Any, page_dtype: Any) -> Blocks:
    """Choose the block of F for an expand.

    Raises:
        Unsupported: no block fits VMEM.
    """
    lanes = _slots(entries) * rank

    def need(block: int) -> int:
        total = 4 * tiled_bytes((tile, block), y_dtype) + 3 * tiled_bytes((tile, block), jnp.float32)
        total += 2 * _slots(entries) * tiled_bytes((rank, block), page_dtype) + tiled_bytes((lanes, block), y_dtype)
        return total + 2 * tiled_bytes((tile, lanes), jnp.float32)

    return _first_fit("y_TF", width, need)


def _first_fit(name: str, width: int, need: Any) -> Blocks:
    for block in width_blocks(width):
        if need(block) <= VMEM_BUDGET_BYTES:
            return Blocks(block, need(block))
    raise Unsupported(
        f"{name} has width {width}, whose smallest block ({width_blocks(width)[-1]} lanes) takes more VMEM than the "
        f"{VMEM_BUDGET_BYTES // 2**20} MiB a kernel may use; use a multiple of 128 or smaller tiles"
    )


def _prefetched(lists: list[jax.Array]) -> list[jax.Array]:
    """Return page lists ``[N, E]`` flat, as scalar memory takes them."""
    size = sum(pages.size * 4 for pages in lists)
    if size > SMEM_BUDGET_BYTES:
        raise Unsupported(
            f"tiles.page_NE takes {size} bytes of scalar memory for all sites; allowed: {SMEM_BUDGET_BYTES}; use "
            "larger tiles or fewer entries"
        )
    return [pages.reshape(-1).astype(jnp.int32) for pages in lists]


def _padded(tiles: TilePages, entries: int) -> TilePages:
    """Return page lists of ``entries`` entries; those added are null."""
    short = entries - tiles.page_NE.shape[1]
    return TilePages(*(jnp.pad(array, ((0, 0), (0, short))) for array in tiles)) if short else tiles


def _any_page(page_ref: Any, first: jax.Array, slots: int) -> jax.Array:
    """Return whether any of ``slots`` entries from ``first`` on names a page."""
    named = page_ref[first]
    for i in range(1, slots):
        named = named | page_ref[first + i]
    return named != 0


def _page_specs(site: int, slots: int, groups: int, block: tuple[int, ...], place: Any) -> list[pl.BlockSpec]:
    """Return one block for each slot: the page that the list of site ``site`` names in a grid step.

    ``place`` maps grid indices to ``(tile, entry group, block index after the page)``.
    """

    def index_map(slot: int, *indices: Any) -> tuple[Any, ...]:
        grid, lists = indices[:3], indices[3:]
        n, group, rest = place(*grid)
        return (lists[site][(n * groups + group) * slots + slot], *rest)

    return [pl.BlockSpec(block, functools.partial(index_map, slot)) for slot in range(slots)]


def _shrink_kernel(sites: int, slots: int, *refs: Any) -> None:
    """Accumulate one D block of one tile; grid ``(tile, entry group, D block)``."""
    lists, x_ref, mask_ref, refs = refs[:sites], refs[sites], refs[sites + 1], refs[sites + 2 :]
    n, group, d = (pl.program_id(axis) for axis in range(3))
    first = (n * pl.num_programs(1) + group) * slots
    x = x_ref[0]
    for site in range(sites):
        span_ref, c_ref, *a_refs = refs[site * (slots + 2) : (site + 1) * (slots + 2)]
        s_ref = refs[sites * (slots + 2) + site]

        @pl.when(d == 0)
        def _(s_ref: Any = s_ref) -> None:
            s_ref[...] = jnp.zeros_like(s_ref)

        @pl.when(_any_page(lists[site], first, slots))
        def _(s_ref: Any = s_ref, a_refs: Any = a_refs, span_ref: Any = span_ref, c_ref: Any = c_ref) -> None:
            a_RD = jnp.concatenate([ref[0].astype(x.dtype) for ref in a_refs], axis=0)
            s_ref[0] += dot(x, a_RD, (1, 1))

            @pl.when(d == pl.num_programs(2) - 1)
            def _() -> None:
                start, end, column = (span_ref[0, i : i + 1, :] for i in range(3))
                offset = jax.lax.broadcasted_iota(jnp.int32, s_ref.shape[1:], 0)
                switched = mask_ref[0, :, 0:1]
                for g in range(1, mask_ref.shape[2]):
                    switched = jnp.where(column == g, mask_ref[0, :, g : g + 1], switched)
                owned = (start <= offset) & (offset < end) & (switched != 0)
                s_ref[0] = jnp.where(owned, s_ref[0] + c_ref[0], 0.0)


def shrink(x_TD: jax.Array, sites: tuple[Site, ...], mask_TG: jax.Array) -> tuple[jax.Array, ...]:
    """See ``kernels.api.shrink``. All sites share one pass over ``x_TD``.

    Raises:
        Unsupported: a dtype, width or page list that the kernel cannot take.
    """
    tokens, width = x_TD.shape
    check_dtype("x_TD", x_TD.dtype)
    for site in sites:
        check_dtype("pool.a_PDR", site.pool.a_PDR.dtype)
    counts = {site.tiles.page_NE.shape[0] for site in sites}
    ranks = {site.pool.a_PDR.shape[2] for site in sites}
    if len(counts) > 1 or len(ranks) > 1:
        return tuple(s for site in sites for s in shrink(x_TD, (site,), mask_TG))
    num_tiles, rank = counts.pop(), ranks.pop()
    longest = max(site.tiles.page_NE.shape[1] for site in sites)
    slots = _slots(longest)
    entries = round_up(longest, slots)
    groups = entries // slots
    tile, lanes = tokens // num_tiles, slots * rank
    page_dtypes = tuple(site.pool.a_PDR.dtype for site in sites)
    block = shrink_blocks(tile, width, entries, rank, x_TD.dtype, page_dtypes).width

    padded = [_padded(site.tiles, entries) for site in sites]
    operands: list[jax.Array] = [x_TD.reshape(num_tiles, tile, width)]
    operands.append(mask_TG.astype(jnp.int32).reshape(num_tiles, tile, -1))
    in_specs = [
        pl.BlockSpec((1, tile, block), lambda n, e, d, *_: (n, 0, d)),
        pl.BlockSpec((1, tile, mask_TG.shape[1]), lambda n, e, d, *_: (n, 0, 0)),
    ]
    for i, (site, tiles) in enumerate(zip(sites, padded, strict=True)):
        end_NE = jnp.where(tiles.page_NE == 0, 0, tiles.end_NE)
        span = jnp.stack([tiles.start_NE, end_NE, tiles.group_NE], axis=1).astype(jnp.int32)
        c_NER = site.pool.c_PR[tiles.page_NE].astype(jnp.float32)
        operands += [jnp.repeat(span, rank, axis=2), c_NER.reshape(num_tiles, 1, entries * rank)]
        in_specs += [pl.BlockSpec((1, rows, lanes), lambda n, e, d, *_: (n, 0, e)) for rows in (3, 1)]
        operands += [site.pool.a_PDR.swapaxes(1, 2)] * slots
        in_specs += _page_specs(i, slots, groups, (1, rank, block), lambda n, e, d: (n, e, (0, d)))
    outputs = pl.pallas_call(
        functools.partial(_shrink_kernel, len(sites), slots),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(sites),
            grid=(num_tiles, groups, width // block),
            in_specs=in_specs,
            out_specs=[pl.BlockSpec((1, tile, lanes), lambda n, e, d, *_: (n, 0, e))] * len(sites),
        ),
        out_shape=[jax.ShapeDtypeStruct((num_tiles, tile, entries * rank), jnp.float32)] * len(sites),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary", "arbitrary")),
        name="preft_shrink",
    )(*_prefetched([tiles.page_NE for tiles in padded]), *operands)
    return tuple(
        s.reshape(tokens, entries, rank)[:, : site.tiles.page_NE.shape[1]]
        for s, site in zip(outputs, sites, strict=True)
    )


def _expand_kernel(slots: int, page_ref: Any, s_ref: Any, y_ref: Any, *refs: Any) -> None:
    """Add one entry group to one block of y; grid ``(F block, tile, entry group)``."""
    *b_refs, out_ref, sum_ref = refs
    n, group = pl.program_id(1), pl.program_id(2)

    @pl.when(group == 0)
    def _() -> None:
        sum_ref[...] = y_ref[0].astype(jnp.float32)

    @pl.when(_any_page(page_ref, (n * pl.num_programs(2) + group) * slots, slots))
    def _() -> None:
        b_RF = jnp.concatenate([ref[0].astype(y_ref.dtype) for ref in b_refs], axis=0)
        sum_ref[...] += dot(s_ref[0].astype(y_ref.dtype), b_RF, (1, 0))

    @pl.when(group == pl.num_programs(2) - 1)
    def _() -> None:
        out_ref[0] = sum_ref[...].astype(out_ref.dtype)


def expand(edit: Shrunk, y_TF: jax.Array) -> jax.Array:
    """See ``kernels.api.expand``. The result takes the memory of ``y_TF`` where nothing else reads it.

    Raises:
        Unsupported: a dtype, width or page list that the kernel cannot take.
    """
    pool, tiles = edit.site
    tokens, width = y_TF.shape
    check_dtype("y_TF", y_TF.dtype)
    check_dtype("pool.b_PRF", pool.b_PRF.dtype)
    num_tiles, listed = tiles.page_NE.shape
    rank = pool.b_PRF.shape[1]
    slots = _slots(listed)
    entries = round_up(listed, slots)
    groups = entries // slots
    tile = tokens // num_tiles
    block = expand_blocks(tile, width, entries, rank, y_TF.dtype, pool.b_PRF.dtype).width

    s_TER = edit.s_TER.astype(jnp.float32)
    if entries > listed:
        s_TER = jnp.pad(s_TER, ((0, 0), (0, entries - listed), (0, 0)))
    out = pl.pallas_call(
        functools.partial(_expand_kernel, slots),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(width // block, num_tiles, groups),
            in_specs=[
                pl.BlockSpec((1, tile, slots * rank), lambda f, n, e, _: (n, 0, e)),
                pl.BlockSpec((1, tile, block), lambda f, n, e, _: (n, 0, f)),
                *_page_specs(0, slots, groups, (1, rank, block), lambda f, n, e: (n, e, (0, f))),
            ],
            out_specs=pl.BlockSpec((1, tile, block), lambda f, n, e, _: (n, 0, f)),
            scratch_shapes=[pltpu.VMEM((tile, block), jnp.float32)],
        ),
        out_shape=jax.ShapeDtypeStruct((num_tiles, tile, width), y_TF.dtype),
        input_output_aliases={2: 0},
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary")),
        name="preft_expand",
    )(
        *_prefetched([_padded(tiles, entries).page_NE]),
        s_TER.reshape(num_tiles, tile, entries * rank),
        y_TF.reshape(num_tiles, tile, width),
        *[pool.b_PRF] * slots,
    )
    return out.reshape(tokens, width)
