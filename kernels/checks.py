"""What every kernel asks of its arguments. All raise ``ValueError`` naming the argument."""

import jax
import jax.numpy as jnp

from kernels.types import PagePool, Shrunk, Site, TilePages


def check(condition: bool, message: str) -> None:
    """Raise ``ValueError(message)`` unless ``condition``."""
    if not condition:
        raise ValueError(message)


def check_pool(pool: PagePool, width_in: int, width_out: int | None) -> None:
    """Check the shapes of a pool against the widths of x and y."""
    p, d, r = pool.a_PDR.shape
    check(d == width_in, f"pool.a_PDR has input width {d}; x has {width_in}")
    check(pool.c_PR.shape == (p, r), f"pool.c_PR has shape {pool.c_PR.shape}; expected {(p, r)}")
    check(pool.b_PRF.shape[:2] == (p, r), f"pool.b_PRF has shape {pool.b_PRF.shape}; expected ({p}, {r}, F)")
    if width_out is not None:
        check(pool.b_PRF.shape[2] == width_out, f"pool.b_PRF has output width {pool.b_PRF.shape[2]}; y has {width_out}")


def check_tiles(tiles: TilePages, num_tokens: int) -> None:
    """Check page lists against the number of tokens."""
    shape = tiles.page_NE.shape
    for name, array in tiles._asdict().items():
        check(array.shape == shape, f"tiles.{name} has shape {array.shape}; page_NE has {shape}")
        check(jnp.issubdtype(array.dtype, jnp.integer), f"tiles.{name} has dtype {array.dtype}; it must be an integer")
    check(
        shape[0] > 0 and num_tokens % shape[0] == 0,
        f"tiles.page_NE has {shape[0]} tiles, which do not divide {num_tokens} tokens",
    )


def check_mask(mask_TG: jax.Array, num_tokens: int) -> None:
    """Check the edit mask."""
    check(
        mask_TG.ndim == 2 and mask_TG.shape[0] == num_tokens and mask_TG.dtype == jnp.bool_,
        f"mask_TG is {mask_TG.dtype}{list(mask_TG.shape)}; expected bool[{num_tokens}, groups]",
    )


def check_sites(sites: tuple[Site, ...], width_in: int, num_tokens: int) -> None:
    """Check sites that are about to shrink an x of this shape."""
    for pool, tiles in sites:
        check_pool(pool, width_in, None)
        check_tiles(tiles, num_tokens)


def check_shrunk(edit: Shrunk, num_tokens: int, width_out: int) -> None:
    """Check a shrunk edit against the y that it will be added to."""
    pool, tiles = edit.site
    check_tiles(tiles, num_tokens)
    expected = (num_tokens, tiles.page_NE.shape[1])
    check(
        edit.s_TER.ndim == 3 and edit.s_TER.shape[:2] == expected,
        f"s_TER has shape {edit.s_TER.shape}; expected ({expected[0]}, {expected[1]}, rank)",
    )
    check_pool(pool, pool.a_PDR.shape[1], width_out)
