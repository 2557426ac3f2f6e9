"""What every kernel asks of its arguments. All raise ``ValueError`` naming the argument."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kernels.types import PagePool, Product, Shrunk, Site, TilePages, Unscaled

RANK_PAGE = 16
"""Rank of a page."""


def check(condition: bool, message: str) -> None:
    """Raise ``ValueError(message)`` unless ``condition``."""
    if not condition:
        raise ValueError(message)


def check_array(name: str, array: Any, ndim: int, kind: Any) -> None:
    """Check that an argument is an array of ``ndim`` axes, none empty, of a dtype of ``kind`` (``jnp.floating``)."""
    check(
        isinstance(array, jax.Array | np.ndarray | jax.ShapeDtypeStruct),
        f"{name} is of type {type(array).__name__}; give an array",
    )
    check(array.ndim == ndim, f"{name} has shape {array.shape}; expected {ndim} axes")
    check(0 not in array.shape, f"{name} has shape {array.shape}; no axis may be empty")
    what = "an integer" if kind is jnp.integer else "a floating-point number"
    check(jnp.issubdtype(array.dtype, kind), f"{name} has dtype {array.dtype}; it must be {what}")


def check_activations(name: str, array: Any) -> None:
    """Check tokens by channels."""
    check_array(name, array, 2, jnp.floating)


def check_product(name: str, product: Product) -> jax.Array:
    """Check what a linear gives; return it, without its scales if it has any."""
    if not isinstance(product, Unscaled):
        check_activations(name, product)
        return product
    check_activations(f"{name}.y_TF", product.y_TF)
    allowed = (jnp.bfloat16, jnp.float32)
    check(product.y_TF.dtype in allowed, f"{name}.y_TF has dtype {product.y_TF.dtype}; allowed: bfloat16, float32")
    tokens, width = product.y_TF.shape
    sizes = {"row_T": tokens, "column_F": width} | ({} if product.bias_F is None else {"bias_F": width})
    for scale, size in sizes.items():
        array = getattr(product, scale)
        check_array(f"{name}.{scale}", array, 1, jnp.floating)
        check(
            array.shape == (size,) and array.dtype == jnp.float32,
            f"{name}.{scale} is {array.dtype}{list(array.shape)}; expected float32[{size}]",
        )
    return product.y_TF


def check_pool(pool: PagePool, width_in: int, width_out: int | None) -> None:
    """Check the shapes and dtypes of a pool against the widths of x and y."""
    for name, ndim in (("a_PDR", 3), ("c_PR", 2), ("b_PRF", 3)):
        check_array(f"pool.{name}", getattr(pool, name), ndim, jnp.floating)
    p, d, r = pool.a_PDR.shape
    check(r == RANK_PAGE, f"pool.a_PDR has pages of rank {r}; they must be of rank {RANK_PAGE}")
    check(d == width_in, f"pool.a_PDR has input width {d}; x has {width_in}")
    check(pool.c_PR.shape == (p, r), f"pool.c_PR has shape {pool.c_PR.shape}; expected {(p, r)}")
    check(pool.b_PRF.shape[:2] == (p, r), f"pool.b_PRF has shape {pool.b_PRF.shape}; expected ({p}, {r}, F)")
    if width_out is not None:
        check(pool.b_PRF.shape[2] == width_out, f"pool.b_PRF has output width {pool.b_PRF.shape[2]}; y has {width_out}")


def check_tiles(tiles: TilePages, num_tokens: int) -> None:
    """Check page lists against the number of tokens."""
    for name, array in tiles._asdict().items():
        check_array(f"tiles.{name}", array, 2, jnp.integer)
    shape = tiles.page_NE.shape
    for name, array in tiles._asdict().items():
        check(array.shape == shape, f"tiles.{name} has shape {array.shape}; page_NE has {shape}")
    check(num_tokens % shape[0] == 0, f"tiles.page_NE has {shape[0]} tiles, which do not divide {num_tokens} tokens")


def check_mask(mask_TG: jax.Array, num_tokens: int) -> None:
    """Check the edit mask."""
    check(
        mask_TG.ndim == 2 and mask_TG.shape[0] == num_tokens and mask_TG.dtype == jnp.bool_,
        f"mask_TG is {mask_TG.dtype}{list(mask_TG.shape)}; expected bool[{num_tokens}, groups]",
    )


def check_head_norms(q_norm_C: Any, k_norm_C: Any, eps: float, channels: int) -> None:
    """Check the weights of the norms over each head of q and k: both or neither."""
    check((q_norm_C is None) == (k_norm_C is None), "q_norm_C and k_norm_C go together: give both, or neither")
    for name, weight in (("q_norm_C", q_norm_C), ("k_norm_C", k_norm_C)):
        if weight is not None:
            check_array(name, weight, 1, jnp.floating)
            check(weight.shape == (channels,), f"{name} has shape {weight.shape}; expected ({channels},)")
    check(isinstance(eps, int | float), f"eps is of type {type(eps).__name__}; give a number")


def check_sites(sites: tuple[Site, ...], width_in: int, num_tokens: int) -> None:
    """Check sites that are about to shrink an x of this shape."""
    for pool, tiles in sites:
        check_pool(pool, width_in, None)
        check_tiles(tiles, num_tokens)


def check_shrunk(edit: Shrunk, num_tokens: int, width_out: int) -> None:
    """Check a shrunk edit against the y that it will be added to."""
    pool, tiles = edit.site
    check_array("s_TER", edit.s_TER, 3, jnp.floating)
    check_tiles(tiles, num_tokens)
    expected = (num_tokens, tiles.page_NE.shape[1], RANK_PAGE)
    check(edit.s_TER.shape == expected, f"s_TER has shape {edit.s_TER.shape}; expected {expected}")
    check_array("pool.a_PDR", pool.a_PDR, 3, jnp.floating)
    check_pool(pool, pool.a_PDR.shape[1], width_out)


def check_heads(name: str, width: int, kv_PSJC: jax.Array) -> int:
    """Raise unless a width holds the heads of fused queries, keys and values of a pool; return the size of a head."""
    kv_heads2, channels = kv_PSJC.shape[2:]
    check(kv_heads2 % 2 == 0, f"kv_PSJC has {kv_heads2} heads; keys and values alternate, so it must be even")
    check(channels % 2 == 0, f"kv_PSJC has odd head size {channels}; rotary channels come in pairs")
    heads = width // channels - kv_heads2
    check(
        width % channels == 0 and heads > 0 and heads % (kv_heads2 // 2) == 0,
        f"{name} has width {width}; with {kv_heads2 // 2} KV heads of size {channels} expected a multiple of "
        f"{kv_heads2 // 2 * channels} beyond {kv_heads2 * channels}",
    )
    return channels


def check_rope(cos: jax.Array, sin: jax.Array, names: tuple[str, str], tokens: int, channels: int) -> None:
    """Check the shapes of the cos and sin of the tokens' rotations, which have these names."""
    for name, table in zip(names, (cos, sin), strict=True):
        expected = (tokens, channels // 2)
        check(table.shape == expected, f"{name} has shape {table.shape}; expected {expected}")
