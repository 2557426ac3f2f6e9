"""The unfused edit: ``shrink`` reads x once for all sites that share it, ``expand`` reads and writes y."""

import jax
import jax.numpy as jnp

from kernels.triton.call import call, ceil_div, check_dtype, rank_of, require, shrink_args, tile_size
from kernels.triton.config import Blocks, for_expand, for_shrink
from kernels.triton.device.lowrank import expand_kernel, shrink_kernel
from kernels.types import Shrunk, Site
from kernels.xla.lowrank import owned

MOST_SITES = 3
"""Sites that one kernel shrinks together: q, k and v."""


def finish_parts(part_UTER: jax.Array, site: Site, mask_TG: jax.Array) -> jax.Array:
    """Return the float32 ``s_TER`` of a shrink whose parts ``[parts, T, E, 16]`` lack c and the mask."""
    pool, tiles = site
    num_tiles, entries = tiles.page_NE.shape
    c_NER = pool.c_PR[tiles.page_NE].astype(jnp.float32)
    s_NIER = part_UTER.sum(axis=0).reshape(num_tiles, -1, entries, 16) + c_NER[:, None]
    s_NIER = jnp.where(owned(tiles, mask_TG)[..., None], s_NIER, 0.0)
    return s_NIER.reshape(-1, entries, 16)


def groups_of(sites: tuple[Site, ...]) -> list[tuple[Site, ...]]:
    """Return the sites in runs that one kernel can take: at most ``MOST_SITES``, with lists of one width."""
    runs: list[list[Site]] = []
    for site in sites:
        fits = runs and len(runs[-1]) < MOST_SITES
        if fits and runs[-1][0].tiles.page_NE.shape == site.tiles.page_NE.shape:
            runs[-1].append(site)
        else:
            runs.append([site])
    return [tuple(run) for run in runs]


def padded(groups: list[tuple[jax.Array, ...]]) -> list[jax.Array]:
    """Return the arrays of up to ``MOST_SITES`` sites, the first one's standing in for those that are not there.

    Nothing for no site.
    """
    groups = groups + groups[:1] * (MOST_SITES - len(groups))
    return [array for group in groups for array in group]


def shrink(
    x_TD: jax.Array, sites: tuple[Site, ...], mask_TG: jax.Array, *, config: Blocks | None = None
) -> tuple[jax.Array, ...]:
    """See ``kernels.api.shrink``. ``config`` is chosen by the shapes if None."""
    check_dtype("x_TD", x_TD)
    tile = tile_size(x_TD.shape[0], sites)
    out: list[jax.Array] = []
    for run in groups_of(sites):
        out += _shrink_run(x_TD, run, mask_TG, tile, config)
    return tuple(out)


def _shrink_run(
    x_TD: jax.Array, sites: tuple[Site, ...], mask_TG: jax.Array, tile: int, config: Blocks | None
) -> list[jax.Array]:
    tokens, width = x_TD.shape
    entries = sites[0].tiles.page_NE.shape[1]
    eb = rank_of(entries)
    config = config or for_shrink(tile, tokens, width, 16 * eb * len(sites), x_TD.dtype)
    shape = (tokens, entries, 16) if config.parts == 1 else (config.parts, tokens, entries, 16)
    nothing = jax.ShapeDtypeStruct((1,), jnp.float32)
    made = call(
        shrink_kernel,
        x_TD,
        *padded([shrink_args(site, mask_TG) for site in sites]),
        out=[jax.ShapeDtypeStruct(shape, jnp.float32) if n < len(sites) else nothing for n in range(MOST_SITES)],
        grid=(ceil_div(tokens, config.rows), entries // eb, config.parts),
        warps=config.warps,
        T=tokens, D=width, TILE=tile, SITES=len(sites), E=entries, EB=eb,
        BT=config.rows, BD=config.block, PARTS=config.parts, STAGES=config.stages,
    )  # fmt: skip
    if config.parts == 1:
        return made[: len(sites)]
    return [finish_parts(part, site, mask_TG) for part, site in zip(made, sites, strict=False)]


def expand(edit: Shrunk, y_TF: jax.Array, *, config: Blocks | None = None) -> jax.Array:
    """See ``kernels.api.expand``. ``config`` is chosen by the shapes if None."""
    check_dtype("y_TF", y_TF)
    tokens, width = y_TF.shape
    tile = tile_size(tokens, [edit.site])
    entries = edit.s_TER.shape[1]
    require(edit.s_TER.shape[2] == 16, f"s_TER has rank {edit.s_TER.shape[2]} a page; it must be 16")
    config = config or for_expand(tile, tokens, width, entries)
    (out,) = call(
        expand_kernel,
        y_TF, edit.s_TER, edit.site.pool.b_PRF, jnp.asarray(edit.site.tiles.page_NE, jnp.int32),
        out=[jax.ShapeDtypeStruct(y_TF.shape, y_TF.dtype)],
        grid=(width // config.block, ceil_div(tokens, config.rows)),
        warps=config.warps,
        T=tokens, F=width, TILE=tile, E=entries, EB=rank_of(entries), BT=config.rows, BF=config.block,
    )  # fmt: skip
    return out
