"""How kernels are cut into programs: small validated configurations, and the rule that picks one for given shapes.

The rules were found on an H100 (docs/kernels.md has the figures). Two things decide: enough programs to fill 132
multiprocessors twice, and rank pages read seldom enough, since every program reads its tile's pages from the L2 cache:
with long page lists a program takes more rows.
"""

import dataclasses
from typing import Any

import jax.numpy as jnp

from kernels.triton.call import block_of, row_block


def _is_power_of_two(n: int) -> bool:
    return n > 0 and n & (n - 1) == 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Blocks:
    """A program's share of a two-dimensional operation.

    Attributes:
        rows: tokens of a program, a power of two from 16 that divides the tile.
        block: columns of one step of its loop, a power of two that divides the width.
        parts: programs that share the columns of one block of rows.
        warps: of a program.
        stages: of its loop's software pipeline.
    """

    rows: int
    block: int
    parts: int = 1
    warps: int = 4
    stages: int = 3

    def __post_init__(self) -> None:
        if not _is_power_of_two(self.rows) or self.rows < 16:
            raise ValueError(f"rows is {self.rows}; it must be a power of two from 16")
        if not _is_power_of_two(self.block) or self.block < 16:
            raise ValueError(f"block is {self.block}; it must be a power of two from 16")
        if self.parts < 1 or self.warps not in (1, 2, 4, 8, 16) or self.stages < 1:
            raise ValueError(f"parts {self.parts}, warps {self.warps} and stages {self.stages} must be positive, warps "
                             "1, 2, 4, 8 or 16")  # fmt: skip


def _parts(width: int, block: int, wanted: int, most: int = 16) -> int:
    """Return into how many equal runs of whole blocks a width is cut: the fewest that are ``wanted``, if possible."""
    blocks = width // block
    options = [n for n in range(1, min(blocks, most) + 1) if blocks % n == 0]
    return next((n for n in options if n >= wanted), options[-1])


def _stages(stages: int, dtype: Any) -> int:
    """Return pipeline stages that fit shared memory: float32 takes twice the room."""
    return stages if jnp.dtype(dtype).itemsize == 2 else 1


def for_shrink(tile: int, tokens: int, width: int, columns: int, dtype: Any) -> Blocks:
    """``columns``: ranks of all sites and entries that one program multiplies with."""
    rows = min(tile, 32 if columns <= 48 else 64)
    block = block_of(width, 128, "the width of x_TD")
    parts = _parts(width, block, -(-256 // -(-tokens // rows)), 8)
    return Blocks(rows=rows, block=block, parts=parts, stages=_stages(4 if columns <= 48 else 3, dtype))


def for_expand(tile: int, tokens: int, width: int, entries: int) -> Blocks:
    """``entries``: pages of a tile."""
    rows = row_block(tile, tokens, 32 if entries == 1 else 64)
    return Blocks(rows=rows, block=block_of(width, 256, "the width of y_TF"))


def for_norm(tokens: int, width: int, dtype: Any) -> Blocks:
    """Few rows, for many programs; two warps, so that many of them wait for memory side by side.

    Where the rows alone are too few programs, they are cut into parts.
    """
    block = block_of(width, 128 if jnp.dtype(dtype).itemsize == 2 else 64, "the width of x_TD")
    blocks = -(-tokens // 16)
    parts = _parts(width, block, -(-512 // blocks), 8) if blocks < 264 else 1
    return Blocks(rows=16, block=block, parts=parts, warps=2, stages=_stages(3, dtype))


def for_rope(tile: int, tokens: int, entries: int) -> Blocks:
    """``block`` is not used: a step is one head."""
    return Blocks(rows=row_block(tile, tokens, 32 if entries == 1 else 64), block=16)


def for_silu_mul(tile: int, tokens: int, width: int, entries: int, dtype: Any) -> Blocks:
    """``width``: of gate, ``entries``: pages of a tile, of the longest list."""
    rows = min(tile, 64)
    block, stages = (64, 2) if entries == 1 else (32, 3)
    block = block_of(width, block, "half the width of gate_up_TF")
    parts = _parts(width, block, max(8, -(-3168 // -(-tokens // rows))), 32)
    return Blocks(rows=rows, block=block, parts=parts, stages=_stages(stages, dtype))
