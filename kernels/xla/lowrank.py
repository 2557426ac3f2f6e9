"""Low-rank edits in plain JAX."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from kernels.types import PagePool, Shrunk, Site, TilePages


def switched_on(tiles: TilePages, mask_TG: jax.Array) -> jax.Array:
    """Return bool ``[N, tile, E]``: is this token in entry e's span, and switched on?"""
    num_tiles = tiles.page_NE.shape[0]
    tile = mask_TG.shape[0] // num_tiles
    offset = jnp.arange(tile, dtype=jnp.int32)[None, :, None]
    in_span = (tiles.start_NE[:, None, :] <= offset) & (offset < tiles.end_NE[:, None, :])
    switched = jnp.take_along_axis(
        mask_TG.reshape(num_tiles, tile, -1), tiles.group_NE[:, None, :], axis=2, mode="fill", fill_value=False
    )
    return in_span & switched


def owned(tiles: TilePages, mask_TG: jax.Array) -> jax.Array:
    """Return bool ``[N, tile, E]``: does entry e edit this token?"""
    return switched_on(tiles, mask_TG) & (tiles.page_NE[:, None, :] != 0)


def shrink(x_TD: jax.Array, sites: tuple[Site, ...], mask_TG: jax.Array) -> tuple[jax.Array, ...]:
    """``m * (x @ A + c)`` for every entry of every tile, for each of the sites that read ``x``; float32 ``[T, E,
    R]``.
    """

    def one(site: Site) -> jax.Array:
        pool, tiles = site
        num_tiles, entries = tiles.page_NE.shape
        x_NID = x_TD.reshape(num_tiles, -1, x_TD.shape[1])
        a_NEDR = pool.a_PDR[tiles.page_NE].astype(x_TD.dtype)
        s_NIER = jnp.einsum("nid,nedr->nier", x_NID, a_NEDR, preferred_element_type=jnp.float32)
        s_NIER += pool.c_PR[tiles.page_NE].astype(jnp.float32)[:, None]
        s_NIER = jnp.where(owned(tiles, mask_TG)[..., None], s_NIER, 0.0)
        return s_NIER.reshape(x_TD.shape[0], entries, -1)

    return tuple(one(site) for site in sites)


def edit_delta(edit: Shrunk, dtype: Any) -> jax.Array:
    """Return ``s @ B``, float32 ``[T, F]``, multiplied in ``dtype``."""
    pool, tiles = edit.site
    num_tiles, entries = tiles.page_NE.shape
    s_NIER = edit.s_TER.reshape(num_tiles, -1, entries, edit.s_TER.shape[2])
    b_NERF = pool.b_PRF[tiles.page_NE].astype(dtype)
    delta_NIF = jnp.einsum("nier,nerf->nif", s_NIER.astype(dtype), b_NERF, preferred_element_type=jnp.float32)
    return delta_NIF.reshape(edit.s_TER.shape[0], -1)


def expand(edit: Shrunk, y_TF: jax.Array) -> jax.Array:
    """``y + s @ B``, summed over the entries of each tile; the dtype of ``y``."""
    return (y_TF.astype(jnp.float32) + edit_delta(edit, y_TF.dtype)).astype(y_TF.dtype)


def side_by_side(
    edit_rows: Callable[[jax.Array, jax.Array, PagePool, jax.Array], jax.Array],
    x_BD: jax.Array,
    y_BF: jax.Array,
    pools: tuple[PagePool, ...],
    pages: tuple[jax.Array, ...],
    columns: tuple[int, ...],
) -> jax.Array:
    """Edit the outputs of linears that lie side by side one by one, by ``edit_rows`` of x, y, a pool and its pages."""
    for pool, page_BE, column in zip(pools, pages, columns, strict=True):
        here = slice(column, column + pool.b_PRF.shape[2])
        edited = edit_rows(x_BD, y_BF[:, here], pool, page_BE)
        y_BF = edited if edited.shape == y_BF.shape else y_BF.at[:, here].set(edited)
    return y_BF


def decode_edit(
    x_BD: jax.Array,
    y_BF: jax.Array,
    pools: tuple[PagePool, ...],
    pages: tuple[jax.Array, ...],
    *,
    columns: tuple[int, ...],
) -> jax.Array:
    """``y + (x @ A + c) @ B`` with one token and its own list of pages in each row; null pages add nothing."""
    return side_by_side(_edit_rows, x_BD, y_BF, pools, pages, columns)


def few_pages(pages: int, entries: int) -> bool:
    """Whether every page on every row is quicker than a copy of its own pages for each of several rows.

    Args:
        pages: of the pool, the null page included.
        entries: of all rows.
    """
    return entries > 1 and pages - 1 <= 2 * entries


def _edit_rows(x_BD: jax.Array, y_BF: jax.Array, pool: PagePool, page_BE: jax.Array) -> jax.Array:
    if few_pages(len(pool.a_PDR), page_BE.size):
        return _edit_rows_by_page(x_BD, y_BF, pool, page_BE)
    a_BEDR = pool.a_PDR[page_BE].astype(x_BD.dtype)
    s_BER = jnp.einsum("bd,bedr->ber", x_BD, a_BEDR, preferred_element_type=jnp.float32)
    s_BER = jnp.where((page_BE != 0)[..., None], s_BER + pool.c_PR[page_BE].astype(jnp.float32), 0.0)
    b_BERF = pool.b_PRF[page_BE].astype(y_BF.dtype)
    delta_BF = jnp.einsum("ber,berf->bf", s_BER.astype(y_BF.dtype), b_BERF, preferred_element_type=jnp.float32)
    return (y_BF.astype(jnp.float32) + delta_BF).astype(y_BF.dtype)


def _edit_rows_by_page(x_BD: jax.Array, y_BF: jax.Array, pool: PagePool, page_BE: jax.Array) -> jax.Array:
    """The same by every page on every row, and only then what is a row's own: few pages are not copied for each row.

    What another row's page gives is dropped, not multiplied by zero: it may be no number.
    """
    a_PDR, c_PR, b_PRF = pool.a_PDR[1:], pool.c_PR[1:], pool.b_PRF[1:]
    ids_P = jnp.arange(1, len(a_PDR) + 1, dtype=page_BE.dtype)
    # How often a row lists a page: each time counts.
    listed_PB = (page_BE[None] == ids_P[:, None, None]).sum(axis=-1).astype(jnp.float32)[..., None]
    s_PBR = jnp.einsum("bd,pdr->pbr", x_BD, a_PDR.astype(x_BD.dtype), preferred_element_type=jnp.float32)
    s_PBR = (s_PBR + c_PR.astype(jnp.float32)[:, None]).astype(y_BF.dtype)
    delta_PBF = jnp.einsum("pbr,prf->pbf", s_PBR, b_PRF.astype(y_BF.dtype), preferred_element_type=jnp.float32)
    delta_BF = jnp.where(listed_PB > 0, listed_PB * delta_PBF, 0.0).sum(axis=0)
    return (y_BF.astype(jnp.float32) + delta_BF).astype(y_BF.dtype)
