"""Backward passes of the edit; see ``kernels/gradients.py`` for the equations.

A page's gradient is summed by one program for each block of its width, over the tiles that list the page, in their
order: no atomics, the same bits every time. Each activation is read once for each page that acts on it.
"""

import jax
import jax.numpy as jnp

from kernels.triton.call import block_of, call, check_dtype, rank_of, require, shrink_args, tile_size
from kernels.triton.device.backward import expand_backward_kernel, page_backward_kernel, x_backward_kernel
from kernels.triton.lowrank import groups_of, padded
from kernels.types import Shrunk, Site, TilePages

_MOST_COMPARED = 2048
"""Entries that are ordered by comparing each with each, which takes fewer kernels than a sort."""


def tiles_of_pages(tiles: TilePages, num_pages: int) -> tuple[jax.Array, jax.Array]:
    """Return where each page is listed: flat entries ordered by page, then by tile, and each page's first, ``[P + 1]``.

    The null page is listed nowhere.
    """
    flat = jnp.asarray(tiles.page_NE, jnp.int32).reshape(-1)
    index = jnp.arange(flat.size, dtype=jnp.int32)
    if flat.size <= _MOST_COMPARED:
        before = (flat[None, :] < flat[:, None]) | (
            (flat[None, :] == flat[:, None]) & (index[None, :] < index[:, None])
        )
        rank = before.sum(axis=1)
        order = jnp.where(rank[None, :] == index[:, None], index[None, :], 0).sum(axis=1).astype(jnp.int32)
    else:
        order = jnp.argsort(flat, stable=True).astype(jnp.int32)
    pages = jnp.maximum(jnp.arange(num_pages + 1, dtype=jnp.int32), 1)
    first = (flat[None, :] < pages[:, None]).sum(axis=1).astype(jnp.int32)
    return order, first


def expand_backward(edit: Shrunk, dy_TF: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return float32 ``ds_TER`` and ``dB`` in the dtype of the pool."""
    check_dtype("dy_TF", dy_TF)
    tokens, width = dy_TF.shape
    pool, tiles = edit.site
    tile = tile_size(tokens, [edit.site])
    num_pages, entries = pool.b_PRF.shape[0], tiles.page_NE.shape[1]
    order, first = tiles_of_pages(tiles, num_pages)
    block = block_of(width, 256 if dy_TF.dtype == jnp.bfloat16 else 64, "the width of dy_TF")
    parts = width // block
    ds_UTER, db_PRF = call(
        expand_backward_kernel,
        dy_TF, edit.s_TER, pool.b_PRF, order, first,
        out=[
            jax.ShapeDtypeStruct((parts, tokens, entries, 16), jnp.float32),
            jax.ShapeDtypeStruct(pool.b_PRF.shape, pool.b_PRF.dtype),
        ],
        grid=(num_pages, parts),
        warps=4, stages=3,
        T=tokens, F=width, TILE=tile, E=entries, BT=min(tile, 64), BF=block,
    )  # fmt: skip
    listed_NE1 = (jnp.asarray(tiles.page_NE) != 0)[:, None, :, None]
    ds_UNIER = ds_UTER.reshape(parts, tiles.page_NE.shape[0], -1, entries, 16)
    ds_NIER = jnp.where(listed_NE1, jnp.where(listed_NE1[None], ds_UNIER, 0.0).sum(axis=0), 0.0)
    return ds_NIER.reshape(tokens, entries, 16), db_PRF


def shrink_backward(
    x_TD: jax.Array, sites: tuple[Site, ...], mask_TG: jax.Array, ds: tuple[jax.Array, ...]
) -> tuple[jax.Array, tuple[tuple[jax.Array, jax.Array], ...]]:
    """Return ``dx_TD`` and, for each site, ``(dA, dc)`` in the dtypes of the pool."""
    check_dtype("x_TD", x_TD)
    tokens, width = x_TD.shape
    tile = tile_size(tokens, sites)
    runs = groups_of(sites)
    require(len(runs) == 1, "shrink_backward takes at most three sites, with page lists of one width")
    entries = sites[0].tiles.page_NE.shape[1]
    block = block_of(width, 256 if x_TD.dtype == jnp.bfloat16 else 64, "the width of x_TD")
    pages, arrays = [], []
    for site, ds_TER in zip(sites, ds, strict=True):
        a, c, page_NE, own = shrink_args(site, mask_TG)
        order, first = tiles_of_pages(site.tiles, a.shape[0])
        pages.append(
            tuple(
                call(
                    page_backward_kernel,
                    x_TD, ds_TER, own, order, first,
                    out=[jax.ShapeDtypeStruct(a.shape, a.dtype), jax.ShapeDtypeStruct(c.shape, c.dtype)],
                    grid=(a.shape[0], width // block),
                    warps=4, stages=3,
                    T=tokens, D=width, TILE=tile, E=entries, BT=min(tile, 64), BD=block,
                )
            )
        )  # fmt: skip
        arrays.append((ds_TER, own, a, page_NE))
    rows = min(tile, 64)
    (dx_TD,) = call(
        x_backward_kernel,
        *padded(arrays),
        out=[jax.ShapeDtypeStruct(x_TD.shape, x_TD.dtype)],
        grid=(width // block, tokens // rows),
        D=width, TILE=tile, SITES=len(sites), E=entries, EB=rank_of(entries), BT=rows, BD=block,
    )  # fmt: skip
    return dx_TD, tuple(pages)
