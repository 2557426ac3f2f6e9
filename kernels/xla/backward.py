"""Backward passes of low-rank edits in plain JAX; see ``kernels/gradients.py`` for the equations.

Page gradients are summed by a matrix product with a one-hot matrix rather than a scatter, so that their order is fixed.
"""

import jax
import jax.numpy as jnp

from kernels.types import Shrunk, Site
from kernels.xla.lowrank import owned


def _sum_by_page(entries: jax.Array, page_NE: jax.Array, num_pages: int) -> jax.Array:
    """Sum float32 ``[N, E, ...]`` over the entries that name each page: ``[P, ...]``; zero for the null page.

    What is not finite spoils the pages that it belongs to and no others: an adapter that diverges is trained beside
    ones that do not.
    """
    flat = entries.reshape(page_NE.size, -1)
    finite = jnp.isfinite(flat).all(axis=1)
    onehot = (page_NE.reshape(-1) == jnp.arange(num_pages, dtype=page_NE.dtype)[:, None]) & (page_NE.reshape(-1) != 0)
    clean = jnp.where(finite[:, None], flat, 0.0)
    summed = jnp.matmul(onehot.astype(jnp.float32), clean, precision=jax.lax.Precision.HIGHEST)
    summed = jnp.where((onehot & ~finite).any(axis=1)[:, None], jnp.nan, summed)
    return summed.reshape(num_pages, *entries.shape[2:])


def shrink_backward(
    x_TD: jax.Array, sites: tuple[Site, ...], mask_TG: jax.Array, ds: tuple[jax.Array, ...]
) -> tuple[jax.Array, tuple[tuple[jax.Array, jax.Array], ...]]:
    """Return ``dx_TD`` and, for each site, ``(dA, dc)`` in the dtypes of the pool."""
    dx_ND = jnp.zeros(x_TD.shape, jnp.float32)
    pages = []
    for (pool, tiles), ds_TER in zip(sites, ds, strict=True):
        num_tiles, entries = tiles.page_NE.shape
        x_NID = x_TD.reshape(num_tiles, -1, x_TD.shape[1])
        ds_NIER = jnp.where(owned(tiles, mask_TG)[..., None], ds_TER.reshape(num_tiles, -1, entries, 16), 0.0)
        rounded = ds_NIER.astype(x_TD.dtype)
        a_NEDR = pool.a_PDR[tiles.page_NE].astype(x_TD.dtype)
        dx_NID = jnp.einsum("nier,nedr->nid", rounded, a_NEDR, preferred_element_type=jnp.float32)
        dx_ND += dx_NID.reshape(x_TD.shape)
        da_NEDR = jnp.einsum("nid,nier->nedr", x_NID, rounded, preferred_element_type=jnp.float32)
        da = _sum_by_page(da_NEDR, tiles.page_NE, pool.a_PDR.shape[0])
        dc = _sum_by_page(ds_NIER.sum(axis=1), tiles.page_NE, pool.a_PDR.shape[0])
        pages.append((da.astype(pool.a_PDR.dtype), dc.astype(pool.c_PR.dtype)))
    return dx_ND.astype(x_TD.dtype), tuple(pages)


def expand_backward(edit: Shrunk, dy_TF: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return float32 ``ds_TER`` and ``dB`` in the dtype of the pool."""
    pool, tiles = edit.site
    num_tiles, entries = tiles.page_NE.shape
    dy_NIF = dy_TF.reshape(num_tiles, -1, dy_TF.shape[1])
    b_NERF = pool.b_PRF[tiles.page_NE].astype(dy_TF.dtype)
    ds_NIER = jnp.einsum("nif,nerf->nier", dy_NIF, b_NERF, preferred_element_type=jnp.float32)
    s_NIER = edit.s_TER.reshape(num_tiles, -1, entries, edit.s_TER.shape[2]).astype(dy_TF.dtype)
    db_NERF = jnp.einsum("nier,nif->nerf", s_NIER, dy_NIF, preferred_element_type=jnp.float32)
    db = _sum_by_page(db_NERF, tiles.page_NE, pool.b_PRF.shape[0])
    return ds_NIER.reshape(edit.s_TER.shape), db.astype(pool.b_PRF.dtype)
