"""Low-rank edits: of packed tokens, of decoding rows, and how their rank pages are written."""

import itertools
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from kernels import debug, dispatch, gradients
from kernels.checks import (
    check,
    check_activations,
    check_array,
    check_mask,
    check_pool,
    check_shrunk,
    check_sites,
)
from kernels.types import PagePool, Shrunk, Site, TilePages
from kernels.xla.fp8 import FP8
from kernels.xla.pages import slab_width


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
        implementation: see the module.

    Returns:
        One float32 ``[T, E, R]`` a site; zero where an entry does not edit the token.
    """
    check_activations("x_TD", x_TD)
    check(len(pools) == len(tiles), f"pools has {len(pools)} sites, tiles {len(tiles)}")
    check_mask(mask_TG, x_TD.shape[0])
    sites = tuple(Site(*pair) for pair in zip(pools, tiles, strict=True))
    check_sites(sites, x_TD.shape[1], x_TD.shape[0])
    for site in sites:
        debug.check_tiles(site, *mask_TG.shape)
    return gradients.shrink(implementation, x_TD, sites, mask_TG)


def expand(
    s_TER: jax.Array, y_TF: jax.Array, pool: PagePool, tiles: TilePages, *, implementation: str | None = None
) -> jax.Array:
    """The second half: ``y + s @ B``, with ``s_TER`` from ``shrink``. Returns the shape and dtype of ``y_TF``."""
    check_activations("y_TF", y_TF)
    edit = Shrunk(s_TER, Site(pool, tiles))
    check_shrunk(edit, *y_TF.shape)
    debug.check_tiles(edit.site, y_TF.shape[0])
    return gradients.expand(implementation, edit, y_TF)


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
    x_BD: jax.Array,
    y_BF: jax.Array,
    pools: Sequence[PagePool],
    pages: Sequence[jax.Array],
    *,
    columns: Sequence[int] | None = None,
    implementation: str | None = None,
) -> jax.Array:
    """The edits of one token a row at linears that read the same ``x_BD``: what all-token adapters pay at every step.

    Args:
        x_BD: what the linears read.
        y_BF: their outputs side by side, un-edited.
        pools: the rank pages of each linear.
        pages: of each linear, the list of pages of each row, int32 ``[B, E]``; 0 is null.
        columns: where the output of each linear begins in ``y_BF``; None: there is one, and it is all of ``y_BF``.
            What lies between them stays as it is; they may not overlap.
        implementation: see the module.

    Returns:
        The shape and dtype of ``y_BF``.
    """
    check_activations("x_BD", x_BD)
    check_activations("y_BF", y_BF)
    check(len(pools) == len(pages), f"pools has {len(pools)} linears, pages {len(pages)}")
    if columns is None:
        check(len(pools) == 1, f"pools has {len(pools)} linears; give the columns where their outputs begin")
    starts = (0,) if columns is None else tuple(columns)
    check(len(starts) == len(pools), f"columns has {len(starts)} linears, pools {len(pools)}")
    check(y_BF.shape[0] == x_BD.shape[0], f"y_BF has {y_BF.shape[0]} rows; x_BD has {x_BD.shape[0]}")
    for n, (pool, page_BE, start) in enumerate(zip(pools, pages, starts, strict=True)):
        check_array(f"pages[{n}]", page_BE, 2, jnp.integer)
        check_pool(pool, x_BD.shape[1], y_BF.shape[1] if columns is None else None)
        last = y_BF.shape[1] - pool.b_PRF.shape[2]
        check(0 <= start <= last, f"columns[{n}] is {start}; allowed for these widths of y_BF and pool: 0 to {last}")
        check(page_BE.shape[0] == x_BD.shape[0], f"pages[{n}] has {page_BE.shape[0]} rows; x_BD has {x_BD.shape[0]}")
        debug.check_range(f"pages[{n}]", page_BE, pool.a_PDR.shape[0])
    ends = sorted((start, start + pool.b_PRF.shape[2]) for start, pool in zip(starts, pools, strict=True))
    for (_, end), (start, _) in itertools.pairwise(ends):
        check(
            end <= start, f"columns are {list(starts)}; the output before {start} ends at {end}, and none may overlap"
        )
    if not pools:
        return y_BF
    return dispatch.run("decode_edit", implementation, x_BD, y_BF, tuple(pools), tuple(pages), columns=starts)


def write_pages(
    a_LPDR: jax.Array,
    c_LPR: jax.Array,
    b_LPRF: jax.Array,
    slabs: Sequence[jax.Array],
    page_SK: jax.Array,
    *,
    row: int = 0,
    at: int = 0,
    implementation: str | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Write rank pages of one site in all layers, from K slabs, each to its own page.

    Args:
        a_LPDR: the site's pools, bfloat16, float16 or float32; to write in place, donate them.
        c_LPR: float32.
        b_LPRF: as ``a_LPDR``.
        slabs: K arrays ``[L, W]`` of that dtype. A row holds, from element ``at`` on, a page's A ``[D, R]``, its B
            ``[R, F]`` and the bits of its c, one after the other; W may be larger. Or in FP8 (float8_e4m3fn), where the
            bits of two more float32 ``[R]`` follow: what each rank of A is multiplied with, and of B.
        page_SK: int32, page ids of several sites. A slab for page 0, the null page, must hold zeros; several may.
        row: which row of ``page_SK`` says where each slab goes, static.
        at: where a slab's rows begin.
        implementation: see the module.

    Returns:
        The pools.
    """
    check_array("a_LPDR", a_LPDR, 4, jnp.floating)
    check_array("b_LPRF", b_LPRF, 4, jnp.floating)
    check_array("c_LPR", c_LPR, 3, jnp.floating)
    layers, pages, d, r = a_LPDR.shape
    check(b_LPRF.shape[:3] == (layers, pages, r), f"b_LPRF has shape {b_LPRF.shape}; a_LPDR has {a_LPDR.shape}")
    check(c_LPR.shape == (layers, pages, r), f"c_LPR has shape {c_LPR.shape}; expected {(layers, pages, r)}")
    check(c_LPR.dtype == jnp.float32, f"c_LPR has dtype {c_LPR.dtype}; allowed: float32")
    check(a_LPDR.dtype == b_LPRF.dtype, f"b_LPRF has dtype {b_LPRF.dtype}; a_LPDR has {a_LPDR.dtype}")
    check(len(slabs) > 0, "slabs is empty; give one at least")
    check(len({slab.dtype for slab in slabs}) == 1, "slabs are of several dtypes; give them in one")
    width = slab_width(d, b_LPRF.shape[3], r, slabs[0].dtype)
    for k, slab_LW in enumerate(slabs):
        check_array(f"slabs[{k}]", slab_LW, 2, jnp.floating)
        check(
            slab_LW.dtype in (a_LPDR.dtype, FP8),
            f"slabs[{k}] has dtype {slab_LW.dtype}; allowed: {a_LPDR.dtype}, as a_LPDR has, or float8_e4m3fn",
        )
        check(
            slab_LW.shape == (layers, slabs[0].shape[1]) and 0 <= at <= slab_LW.shape[1] - width,
            f"slabs[{k}] has shape {slab_LW.shape}; expected {layers} rows of {width} elements and more from {at} on",
        )
    check_array("page_SK", page_SK, 2, jnp.integer)
    check(page_SK.shape[1] == len(slabs), f"page_SK has rows of {page_SK.shape[1]} pages; there are {len(slabs)} slabs")
    check(0 <= row < len(page_SK), f"row is {row}; page_SK has {len(page_SK)} rows")
    debug.check_range("page_SK", page_SK, pages)
    return dispatch.run("write_pages", implementation, a_LPDR, c_LPR, b_LPRF, tuple(slabs), page_SK, row=row, at=at)
