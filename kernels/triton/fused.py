"""Edits fused into what the layer does anyway, so that no activation is read or written for their sake.

``norm_shrink`` runs between two matmuls on the residual stream, ``rope_kv`` after the qkv matmul, ``silu_mul_shrink``
after the gate and up matmul.
"""

import jax
import jax.numpy as jnp

from kernels.triton.call import (
    NO_FP8,
    block_of,
    call,
    ceil_div,
    check_dtype,
    check_pool_dtype,
    elements,
    numbers_of_columns,
    power_of_two,
    product_args,
    rank_of,
    require,
    rounds_to_fp8,
    shrink_args,
    tile_size,
)
from kernels.triton.config import Blocks, for_norm, for_rope, for_silu_mul
from kernels.triton.device.fp8 import quantize_kernel, quantize_part_kernel
from kernels.triton.device.fused import rope_kv_kernel, silu_mul_kernel, silu_mul_plain_kernel
from kernels.triton.device.norm import (
    norm_edit_part_kernel,
    norm_kernel,
    norm_shrink_kernel,
    norm_shrink_part_kernel,
)
from kernels.triton.lowrank import MOST_SITES, expand, finish_parts, padded, shrink
from kernels.types import Product, QuantizedRows, Shrunk, Site
from kernels.xla import fp8

MOST_COLUMNS = 64
"""Ranks of all sites and entries that a fused shrink multiplies with. Beyond, rank pages cost more than another read
of the activations by a kernel whose programs take more rows.
"""


def _fusable(sites: tuple[Site, ...], most: int) -> bool:
    """Return whether one kernel can shrink these sites in passing."""
    widths = {site.tiles.page_NE.shape[1] for site in sites}
    if not widths:
        return True
    (width, *others) = widths
    fits = len(sites) <= MOST_SITES and len(sites) * width * 16 <= most
    return not others and power_of_two(width) == width and fits


def norm_shrink(
    x_TD: jax.Array,
    edits: tuple[Shrunk, ...],
    block: Site | None,
    weight_D: jax.Array,
    eps: float,
    sites: tuple[Site, ...],
    mask_TG: jax.Array,
    *,
    add_TD: Product | None = None,
    quantized: bool = False,
    config: Blocks | None = None,
) -> tuple[jax.Array, jax.Array | QuantizedRows, tuple[jax.Array, ...]]:
    """See ``kernels.api.norm_shrink``. ``config`` is chosen by the shapes if None."""
    check_dtype("x_TD", x_TD)
    require(len(edits) <= 2, f"edits has {len(edits)} entries; at most two are fused")
    if not edits and not sites and block is None:
        return *_norm(x_TD, add_TD, weight_D, eps, quantized), ()
    x_TD, h_TD, shrunk = _norm_shrink(x_TD, edits, block, weight_D, eps, sites, mask_TG, add_TD, config)
    return x_TD, quantize(h_TD) if quantized else h_TD, shrunk


def quantize(x_TD: jax.Array) -> QuantizedRows:
    """See ``kernels.api.quantize``."""
    check_dtype("x_TD", x_TD)
    tokens, width = x_TD.shape
    return QuantizedRows(*call(
        quantize_kernel,
        x_TD,
        out=_quantized(tokens, width), grid=(tokens,), warps=_row_warps(width),
        D=width, BD=power_of_two(width),
    ))  # fmt: skip


def _quantized(tokens: int, width: int) -> list[jax.ShapeDtypeStruct]:
    require(rounds_to_fp8(), NO_FP8)
    return [jax.ShapeDtypeStruct((tokens, width), fp8.FP8), jax.ShapeDtypeStruct((tokens,), jnp.float32)]


def _row_warps(width: int) -> int:
    """Return the warps of a program that has a whole row in registers."""
    return max(1, min(16, power_of_two(width) // 1024))


def _norm_shrink(
    x_TD: jax.Array,
    edits: tuple[Shrunk, ...],
    block: Site | None,
    weight_D: jax.Array,
    eps: float,
    sites: tuple[Site, ...],
    mask_TG: jax.Array,
    add_TD: Product | None,
    config: Blocks | None,
) -> tuple[jax.Array, jax.Array, tuple[jax.Array, ...]]:
    """Return the edited stream, its norm and the shrinks of that."""
    tokens, width = x_TD.shape
    tile = tile_size(tokens, [*sites, *(edit.site for edit in edits), *([block] if block else [])])
    if block is not None and not _fusable((block,), 128):
        x_TD, _, _ = norm_shrink(x_TD, edits, None, weight_D, eps, (), mask_TG, add_TD=add_TD)
        (s_TER,) = shrink(x_TD, (block,), mask_TG)
        x_TD, edits, block, add_TD = expand(Shrunk(s_TER, block), x_TD), (), None, None
    together = sites if _fusable(sites, MOST_COLUMNS) else ()
    nothing = jax.ShapeDtypeStruct((1,), jnp.float32)
    changed = bool(edits) or block is not None or add_TD is not None
    config = config or for_norm(tokens, width, x_TD.dtype)
    if config.parts > 1:
        if block is not None:
            x_TD, _ = _edit_in_parts(x_TD, add_TD, edits, tile, config)
            (s_TER,) = shrink(x_TD, (block,), mask_TG)
            edits, add_TD = (Shrunk(s_TER, block),), None
        x_TD, h_TD, found = _norm_in_parts(x_TD, add_TD, edits, tile, weight_D, eps, together, mask_TG, config)
        return x_TD, h_TD, found if together or not sites else shrink(h_TD, sites, mask_TG)
    pending, widths = _pending_two(edits, x_TD)
    if block is None:
        block_args: tuple[jax.Array, ...] = (x_TD,) * 5
    else:
        a, c, page, own = shrink_args(block, mask_TG)
        block_args = (a, c, block.pool.b_PRF, page, own)
    site_args = [shrink_args(site, mask_TG) for site in together]
    entries = together[0].tiles.page_NE.shape[1] if together else 1
    block_entries = block.tiles.page_NE.shape[1] if block else 1
    shrunk = jax.ShapeDtypeStruct((tokens, entries, 16), jnp.float32)
    same = jax.ShapeDtypeStruct(x_TD.shape, x_TD.dtype)
    new, h_TD, s0, s1, s2, _ = call(
        norm_shrink_kernel,
        x_TD, *product_args(add_TD, x_TD), *pending, *block_args, weight_D,
        *(padded(site_args) if site_args else [x_TD] * 4 * MOST_SITES),
        out=[
            same if changed else nothing, same,
            *(shrunk if n < len(together) else nothing for n in range(MOST_SITES)),
            jax.ShapeDtypeStruct((tokens, block_entries, 16), jnp.float32) if block else nothing,
        ],
        grid=(ceil_div(tokens, config.rows),),
        warps=config.warps,
        T=tokens, D=width, TILE=tile, EPS=eps, ADD=add_TD is not None, SCALED=numbers_of_columns(add_TD),
        EDITS=len(edits), BLOCK=block is not None, SITES=len(together),
        EE0=widths[0], EE1=widths[1], BE=block_entries, E=entries,
        EEB0=rank_of(widths[0]), EEB1=rank_of(widths[1]), BEB=rank_of(block_entries),
        BT=config.rows, BD=config.block, STAGES=config.stages,
    )  # fmt: skip
    shrunk_sites = (s0, s1, s2)[: len(together)] if together or not sites else shrink(h_TD, sites, mask_TG)
    return (new if changed else x_TD), h_TD, tuple(shrunk_sites)


def _edit_in_parts(
    x_TD: jax.Array, add_TD: Product | None, edits: tuple[Shrunk, ...], tile: int, config: Blocks
) -> tuple[jax.Array, jax.Array]:
    """Return the stream with what is added to it, and the squares of each part of its rows ``[parts, T]``."""
    tokens, width = x_TD.shape
    changed = bool(edits) or add_TD is not None
    pending, widths = _pending_two(edits, x_TD)
    new, square_UT = call(
        norm_edit_part_kernel,
        x_TD, *product_args(add_TD, x_TD), *pending,
        out=[
            jax.ShapeDtypeStruct(x_TD.shape if changed else (1,), x_TD.dtype),
            jax.ShapeDtypeStruct((config.parts, tokens), jnp.float32),
        ],
        grid=(config.parts, ceil_div(tokens, config.rows)),
        warps=config.warps,
        T=tokens, D=width, TILE=tile, ADD=add_TD is not None, SCALED=numbers_of_columns(add_TD),
        EDITS=len(edits), EE0=widths[0], EE1=widths[1],
        EEB0=rank_of(widths[0]), EEB1=rank_of(widths[1]),
        BT=config.rows, BD=config.block, PARTS=config.parts, STAGES=config.stages,
    )  # fmt: skip
    return (new if changed else x_TD), square_UT


def _norm_in_parts(
    x_TD: jax.Array,
    add_TD: Product | None,
    edits: tuple[Shrunk, ...],
    tile: int,
    weight_D: jax.Array,
    eps: float,
    sites: tuple[Site, ...],
    mask_TG: jax.Array,
    config: Blocks,
) -> tuple[jax.Array, jax.Array, tuple[jax.Array, ...]]:
    """Edit, norm and shrink by two kernels whose programs share the columns of their rows: few rows fill the GPU."""
    tokens, width = x_TD.shape
    x_TD, square_UT = _edit_in_parts(x_TD, add_TD, edits, tile, config)
    entries = sites[0].tiles.page_NE.shape[1] if sites else 1
    pages = padded([(a, page) for a, _, page, _ in (shrink_args(site, mask_TG) for site in sites)])
    part = jax.ShapeDtypeStruct((config.parts, tokens, entries, 16), jnp.float32)
    nothing = jax.ShapeDtypeStruct((1,), jnp.float32)
    h_TD, *found = call(
        norm_shrink_part_kernel,
        x_TD, square_UT, weight_D, *(pages or [x_TD] * 2 * MOST_SITES),
        out=[
            jax.ShapeDtypeStruct(x_TD.shape, x_TD.dtype),
            *(part if n < len(sites) else nothing for n in range(MOST_SITES)),
        ],
        grid=(config.parts, ceil_div(tokens, config.rows)),
        warps=config.warps,
        T=tokens, D=width, TILE=tile, EPS=eps, SITES=len(sites), E=entries,
        BT=config.rows, BD=config.block, PARTS=config.parts, STAGES=config.stages,
    )  # fmt: skip
    return x_TD, h_TD, tuple(finish_parts(one, site, mask_TG) for one, site in zip(found, sites, strict=False))


def _pending_two(edits: tuple[Shrunk, ...], filler: jax.Array) -> tuple[list[jax.Array], list[int]]:
    """Return what a kernel needs to expand up to two edits, and how many entries each lists."""
    padded_edits = (*edits, *[None] * (2 - len(edits)))
    return [array for edit in padded_edits for array in _pending(edit, filler)], _widths(padded_edits)


def _norm(
    x_TD: jax.Array, add_TD: Product | None, weight_D: jax.Array, eps: float, quantized: bool
) -> tuple[jax.Array, jax.Array | QuantizedRows]:
    """Add and norm without edits: a row is read once, and few rows still fill the GPU."""
    tokens, width = x_TD.shape
    same, nothing = jax.ShapeDtypeStruct(x_TD.shape, x_TD.dtype), jax.ShapeDtypeStruct((1,), x_TD.dtype)
    new, h_TD, scale_T = call(
        norm_kernel,
        x_TD, *product_args(add_TD, x_TD), weight_D,
        out=[nothing if add_TD is None else same, *(_quantized(tokens, width) if quantized else [same, nothing])],
        grid=(tokens,),
        warps=max(1, min(8, width // 1024)),
        D=width, BD=power_of_two(width), EPS=eps, ADD=add_TD is not None, SCALED=numbers_of_columns(add_TD),
        FP8=quantized,
    )  # fmt: skip
    return (x_TD if add_TD is None else new), QuantizedRows(h_TD, scale_T) if quantized else h_TD


def _silu_mul(gate_up_TF: Product, quantized: bool) -> jax.Array | QuantizedRows:
    """Multiply without edits, in many small programs. They know the largest of what they give, which is rounded next:
    a row of it is too long for one program.
    """
    y_TF = elements(gate_up_TF)
    tokens, width, scaled = y_TF.shape[0], y_TF.shape[1] // 2, numbers_of_columns(gate_up_TF)
    block = block_of(width, 1024, "half the width of gate_up_TF")
    rows = (4096 if scaled else 1024) // block  # A program reads the scales of its columns once.
    blocks, grid = width // block, (width // block, ceil_div(tokens, rows))
    most = jax.ShapeDtypeStruct((tokens, blocks) if quantized else (1,), jnp.float32)
    h_TF, most_TB = call(
        silu_mul_plain_kernel,
        *product_args(gate_up_TF, y_TF),
        out=[jax.ShapeDtypeStruct((tokens, width), y_TF.dtype), most],
        grid=grid,
        warps=4,
        T=tokens, F=width, BT=rows, BF=block, SCALED=scaled, MOST=quantized,
    )  # fmt: skip
    return _quantize(h_TF, most_TB) if quantized else h_TF


def _quantize(x_TD: jax.Array, most_TB: jax.Array) -> QuantizedRows:
    """Round rows of which the largest magnitude of each of some blocks is known, in many small programs."""
    tokens, width = x_TD.shape
    block, blocks = block_of(width, 1024, "the width of x_TD"), most_TB.shape[1]
    rows = 4096 // block
    return QuantizedRows(*call(
        quantize_part_kernel,
        x_TD, most_TB,
        out=_quantized(tokens, width), grid=(width // block, ceil_div(tokens, rows)), warps=4,
        T=tokens, D=width, BLOCKS=blocks, BB=power_of_two(blocks), BT=rows, BD=block,
    ))  # fmt: skip


def _pending(edit: Shrunk | None, filler: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Return what a kernel needs to expand an edit; anything where there is none."""
    if edit is None:
        return filler, filler, filler
    return edit.s_TER, edit.site.pool.b_PRF, jnp.asarray(edit.site.tiles.page_NE, jnp.int32)


def _widths(edits: tuple[Shrunk | None, ...]) -> list[int]:
    return [1 if edit is None else edit.s_TER.shape[1] for edit in edits]


def rope_kv(
    qkv_TF: Product,
    edits: tuple[Shrunk | None, ...],
    cos_TX: jax.Array,
    sin_TX: jax.Array,
    kv_PSJC: jax.Array,
    slots_T: jax.Array,
    *,
    q_norm_C: jax.Array | None = None,
    k_norm_C: jax.Array | None = None,
    eps: float = 0.0,
    config: Blocks | None = None,
) -> tuple[jax.Array, jax.Array]:
    """See ``kernels.api.rope_kv``. ``config`` is chosen by the shapes if None."""
    y_TF = elements(qkv_TF)
    check_dtype("qkv_TF", y_TF)
    check_pool_dtype(kv_PSJC)
    tokens = y_TF.shape[0]
    pages, size, kv_heads2, channels = kv_PSJC.shape
    kv_heads = kv_heads2 // 2
    heads = y_TF.shape[1] // channels - kv_heads2
    require(
        channels >= 32 and channels & (channels - 1) == 0,
        f"kv_PSJC has head size {channels}; it must be a power of two from 32",
    )
    tile = tile_size(tokens, [edit.site for edit in edits if edit is not None])
    together = max(n for n in range(1, 9) if heads % n == 0 and kv_heads % n == 0)
    widths = _widths(edits)
    config = config or for_rope(tile, tokens, max(widths))
    q_TF, kv_PSJC = call(
        rope_kv_kernel,
        *product_args(qkv_TF, y_TF), cos_TX, sin_TX, kv_PSJC, slots_T,
        *(array for edit in edits for array in _pending(edit, y_TF)),
        *(y_TF if weight is None else weight for weight in (q_norm_C, k_norm_C)),
        out=[
            jax.ShapeDtypeStruct((tokens, heads * channels), y_TF.dtype),
            jax.ShapeDtypeStruct(kv_PSJC.shape, kv_PSJC.dtype),
        ],
        aliases={5: 1},
        grid=((heads + 2 * kv_heads) // together, ceil_div(tokens, config.rows)),
        warps=config.warps,
        T=tokens, H=heads, K=kv_heads, C=channels, SLOTS=pages * size, TILE=tile, HB=together,
        EDIT0=edits[0] is not None, EDIT1=edits[1] is not None, EDIT2=edits[2] is not None,
        E0=widths[0], E1=widths[1], E2=widths[2],
        EB0=rank_of(widths[0]), EB1=rank_of(widths[1]), EB2=rank_of(widths[2]), BT=config.rows,
        NORM=q_norm_C is not None, EPS=eps, SCALED=numbers_of_columns(qkv_TF),
    )  # fmt: skip
    return q_TF.reshape(tokens, heads, channels), kv_PSJC


def silu_mul_shrink(
    gate_up_TF: Product,
    edits: tuple[Shrunk | None, ...],
    sites: tuple[Site, ...],
    mask_TG: jax.Array,
    *,
    quantized: bool = False,
    config: Blocks | None = None,
) -> tuple[jax.Array | QuantizedRows, tuple[jax.Array, ...]]:
    """See ``kernels.api.silu_mul_shrink``. ``config`` is chosen by the shapes if None."""
    check_dtype("gate_up_TF", elements(gate_up_TF))
    if not sites and all(edit is None for edit in edits):
        return _silu_mul(gate_up_TF, quantized), ()
    y_TF = elements(gate_up_TF)
    tokens, width = y_TF.shape[0], y_TF.shape[1] // 2
    tile = tile_size(tokens, [*sites, *(edit.site for edit in edits if edit is not None)])
    fused = len(sites) == 1 and _fusable(sites, MOST_COLUMNS)
    entries = sites[0].tiles.page_NE.shape[1] if fused else 1
    widths = _widths(edits)
    config = config or for_silu_mul(tile, tokens, width, max(widths), y_TF.dtype)
    if fused:
        a, _, page, _ = shrink_args(sites[0], mask_TG)
    else:
        a = page = y_TF
    h_TF, most_TU, part_UTER = call(
        silu_mul_kernel,
        *product_args(gate_up_TF, y_TF), *(array for edit in edits for array in _pending(edit, y_TF)), a, page,
        out=[
            jax.ShapeDtypeStruct((tokens, width), y_TF.dtype),
            jax.ShapeDtypeStruct((tokens, config.parts) if quantized else (1,), jnp.float32),
            jax.ShapeDtypeStruct((config.parts, tokens, entries, 16) if fused else (1,), jnp.float32),
        ],
        grid=(config.parts, ceil_div(tokens, config.rows)),
        warps=config.warps,
        T=tokens, F=width, TILE=tile, SCALED=numbers_of_columns(gate_up_TF), EDIT0=edits[0] is not None,
        EDIT1=edits[1] is not None, SHRINK=fused, MOST=quantized,
        E0=widths[0], E1=widths[1], EB0=rank_of(widths[0]), EB1=rank_of(widths[1]), E=entries,
        BT=config.rows, BF=config.block, RUN=width // config.parts, STAGES=config.stages,
    )  # fmt: skip
    shrunk = (finish_parts(part_UTER, sites[0], mask_TG),) if fused else shrink(h_TF, sites, mask_TG)
    return _quantize(h_TF, most_TU) if quantized else h_TF, shrunk
