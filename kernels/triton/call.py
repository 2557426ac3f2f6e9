"""What all Triton kernels share: how they are called from JAX, and how blocks are chosen."""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import jax_triton  # pyright: ignore[reportMissingImports]

from kernels.triton import interpret
from kernels.types import Product, Site, Unscaled, Unsupported
from kernels.xla.fp8 import FP8, gpu_has_fp8
from kernels.xla.lowrank import switched_on

_target = jax.make_user_context(default_value=None)

DTYPES = (jnp.bfloat16, jnp.float32)

NO_FP8 = "this GPU does not round to FP8; those from compute capability 8.9 on do"


@contextlib.contextmanager
def lowering_for(compute_capability: int) -> Iterator[None]:
    """Trace and lower for a GPU of this compute capability (90: Hopper), whether or not there is one."""
    with _target(compute_capability):
        yield


def call(
    kernel: Any,
    *args: Any,
    out: Sequence[jax.ShapeDtypeStruct],
    grid: tuple[int] | tuple[int, int] | tuple[int, int, int],
    aliases: dict[int, int] | None = None,
    warps: int = 4,
    stages: int = 2,
    **static: Any,
) -> list[jax.Array]:
    """Call a Triton kernel: arrays first, then outputs, then its static arguments by name.

    Raises:
        Unsupported: where there is no GPU and none to lower for.
    """
    if interpret.interpreted(kernel):
        return interpret.call(kernel, *args, out=out, grid=grid, aliases=aliases, **static)
    capability = _target.value
    if capability is None and jax.default_backend() != "gpu":
        raise Unsupported(
            f"implementation 'triton' needs an NVIDIA GPU; the default backend is {jax.default_backend()!r}"
        )
    return jax_triton.triton_call(
        *args,
        kernel=kernel,
        out_shape=list(out),
        grid=grid,
        input_output_aliases=aliases,
        num_warps=warps,
        num_stages=stages,
        compute_capability=capability,
        **static,
    )


def require(condition: bool, reason: str) -> None:
    """Raise ``Unsupported(reason)`` unless ``condition``."""
    if not condition:
        raise Unsupported(f"implementation 'triton': {reason}")


def rounds_to_fp8() -> bool:
    """Return whether the GPU that is lowered for rounds to FP8 (Ada, Hopper and later); Triton's interpreter does."""
    if interpret.is_on():
        return True
    return gpu_has_fp8() if _target.value is None else _target.value >= 89


def check_pool_dtype(kv_PSJC: jax.Array) -> None:
    """Raise ``Unsupported`` for a KV pool in FP8 where the GPU does not round to that."""
    require(kv_PSJC.dtype != FP8 or rounds_to_fp8(), f"kv_PSJC has dtype {kv_PSJC.dtype}; {NO_FP8}")


def product_args(y: Product | None, filler: jax.Array) -> tuple[jax.Array, ...]:
    """Return what a kernel needs to read a product: its elements and the scales of its rows and columns.

    Beside the scale of each column stands its bias, if there is one. ``filler`` stands for what is not there.
    """
    if isinstance(y, Unscaled):
        column = y.column_F if y.bias_F is None else jnp.stack([y.column_F, y.bias_F], axis=1)
        return y.y_TF, y.row_T, column
    return (filler if y is None else y), filler, filler


def numbers_of_columns(y: Product | None) -> int:
    """Return how many numbers ``product_args`` has for each column: 0, 1 (a scale), or 2 (a bias, too)."""
    if not isinstance(y, Unscaled):
        return 0
    return 1 if y.bias_F is None else 2


def elements(y: Product) -> jax.Array:
    """Return a product without its scales, for its shape and dtype."""
    return y.y_TF if isinstance(y, Unscaled) else y


def block_of(width: int, most: int, what: str) -> int:
    """Return the largest power of two up to ``most`` that divides a width."""
    block = width & -width
    require(block >= 16, f"{what} is {width}; it must be a multiple of 16")
    return min(block, most)


def ceil_div(a: int, b: int) -> int:
    """Return ``a / b`` rounded up."""
    return -(-a // b)


def power_of_two(n: int) -> int:
    """Return the smallest power of two that is at least ``n``."""
    return 1 << (n - 1).bit_length()


def check_dtype(name: str, array: jax.Array) -> None:
    """Raise unless the array has a dtype that the kernels compute in."""
    require(array.dtype in DTYPES, f"{name} has dtype {array.dtype}; allowed: bfloat16, float32")


def tile_size(num_tokens: int, sites: Sequence[Site]) -> int:
    """Return the tokens of a tile, the same for all sites; with no site there is no tile, and any block will do."""
    sizes = {num_tokens // site.tiles.page_NE.shape[0] for site in sites}
    if not sizes:
        return 128
    require(len(sizes) == 1, f"sites have tiles of different sizes: {sorted(sizes)}")
    (size,) = sizes
    require(size >= 16 and size & (size - 1) == 0, f"tiles have {size} tokens; it must be a power of two from 16")
    return size


def row_block(tile: int, num_tokens: int, most: int, programs: int = 264) -> int:
    """Return how many tokens one program takes: up to ``most``, fewer while that leaves the GPU idle."""
    rows = min(tile, most)
    while rows > 16 and num_tokens // rows < programs:
        rows //= 2
    return rows


def rank_of(entries: int) -> int:
    """Return how many entries one matrix product takes: the largest of 4, 2, 1 that divides them."""
    return next(block for block in (4, 2, 1) if entries % block == 0)


def shrink_args(site: Site, mask_TG: jax.Array) -> tuple[jax.Array, ...]:
    """Return what a kernel needs to shrink at a site: A, c, the pages of each tile, which entry edits which token.

    The last is int8 ``[T, E]``, null pages included (kernels find zeros there): whatever the page ids, it is computed
    once for all layers.
    """
    pool, tiles = site
    own_TE = switched_on(tiles, mask_TG).reshape(mask_TG.shape[0], -1).astype(jnp.int8)
    return pool.a_PDR, pool.c_PR, jnp.asarray(tiles.page_NE, jnp.int32), own_TE
