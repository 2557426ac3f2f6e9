"""One entry for every kernel.

``implementation=None`` takes the best implementation that this backend and these shapes allow; a name takes that one or
raises ``NotImplementedError`` with the reason. Wrong arguments raise ``ValueError`` naming the argument; with
``kernels.debug`` page ids and positions are checked too, while the program runs. Axis letters: ``preft_jax/shapes.py``.

``shrink``, ``expand`` and ``lowrank_edit`` are differentiable in x, y, s and the pools' arrays, by reductions of fixed
order: the same inputs give the same bits.
"""

import itertools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from kernels import debug, dispatch, gradients
from kernels.checks import (
    check,
    check_activations,
    check_array,
    check_head_norms,
    check_mask,
    check_pool,
    check_shrunk,
    check_sites,
    check_tiles,
)
from kernels.types import Draws, PagePool, Shrunk, Site, TilePages


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


def norm_shrink(
    x_TD: jax.Array,
    edits: Sequence[Shrunk],
    block: Site | None,
    weight_D: jax.Array,
    eps: float,
    sites: Sequence[Site],
    mask_TG: jax.Array,
    *,
    add_TD: jax.Array | None = None,
    implementation: str | None = None,
) -> tuple[jax.Array, jax.Array, tuple[jax.Array, ...]]:
    """Edit the residual stream, normalise it and shrink the result: everything between two matmuls in one pass.

    ``x += add + sum(s @ B for edits)`` (rounded once), then ``x += m * ((x @ A + c) @ B)`` at ``block``,
    ``h = rms_norm(x) * weight``, and the shrink of ``h`` for ``sites``.

    Args:
        x_TD: residual stream.
        edits: pending edits of the stream (of ``o``, of ``down``).
        block: the site of the stream itself, or None.
        weight_D: of the norm.
        eps: of the norm.
        sites: those that read ``h``.
        mask_TG: bool edit mask.
        add_TD: the output of a linear that is added to the stream (of ``o``, of ``down``), or None.
        implementation: see the module.

    Returns:
        The edited ``x_TD`` and ``h_TD`` in the dtype of ``x_TD``, and one float32 ``[T, E, R]`` a site.
    """
    check_activations("x_TD", x_TD)
    check_array("weight_D", weight_D, 1, jnp.floating)
    check(isinstance(eps, int | float), f"eps is of type {type(eps).__name__}; give a number")
    tokens, width = x_TD.shape
    check(weight_D.shape == (width,), f"weight_D has shape {weight_D.shape}; expected ({width},)")
    check_mask(mask_TG, tokens)
    if add_TD is not None:
        check(
            add_TD.shape == x_TD.shape and add_TD.dtype == x_TD.dtype,
            f"add_TD is {add_TD.dtype}{list(add_TD.shape)}; expected {x_TD.dtype}{list(x_TD.shape)}",
        )
    for edit in edits:
        check_shrunk(edit, tokens, width)
    check_sites(tuple(sites), width, tokens)
    if block is not None:
        check_pool(block.pool, width, width)
        check_tiles(block.tiles, tokens)
    for site in (*sites, *(edit.site for edit in edits), *([block] if block else [])):
        debug.check_tiles(site, *mask_TG.shape)
    return dispatch.run(
        "norm_shrink", implementation, x_TD, tuple(edits), block, weight_D, eps, tuple(sites), mask_TG, add_TD=add_TD
    )


def rope_kv(
    qkv_TF: jax.Array,
    edits: Sequence[Shrunk | None],
    cos_TX: jax.Array,
    sin_TX: jax.Array,
    kv_PSJC: jax.Array,
    slots_T: jax.Array,
    *,
    q_norm_C: jax.Array | None = None,
    k_norm_C: jax.Array | None = None,
    eps: float = 0.0,
    implementation: str | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Edit the fused q, k and v, rotate q and k, and write k and v to the KV pool at each token's slot.

    Args:
        qkv_TF: ``[T, (H + 2K) C]``, queries, keys and values side by side.
        edits: three, of q, k and v; None for a site without edits.
        cos_TX: float32 ``[T, C / 2]``.
        sin_TX: likewise. Channel i of a head pairs with i + C / 2.
        kv_PSJC: KV pool ``[pages, page size, 2K, C]``, heads k0 v0 k1 v1 ...; updated in place where it is donated.
        slots_T: int32, page * page size + offset of each token; slots beyond the pool are not written.
        q_norm_C: weight of an RMS norm over each head of q before it is rotated (Qwen3), or None.
        k_norm_C: likewise of k; with the one goes the other.
        eps: static, of these norms.
        implementation: see the module.

    Returns:
        Rotated ``q_THC`` in the dtype of ``qkv_TF``, and the pool.
    """
    check_activations("qkv_TF", qkv_TF)
    check_array("kv_PSJC", kv_PSJC, 4, jnp.floating)
    check_array("slots_T", slots_T, 1, jnp.integer)
    tokens, width = qkv_TF.shape
    channels = _check_heads("qkv_TF", width, kv_PSJC)
    _check_rope(cos_TX, sin_TX, ("cos_TX", "sin_TX"), tokens, channels)
    check(slots_T.shape == (tokens,), f"slots_T has shape {slots_T.shape}; expected ({tokens},)")
    check(len(edits) == 3, f"edits has {len(edits)} entries; expected three, of q, k and v")
    kv_width = kv_PSJC.shape[2] // 2 * channels
    widths = (width - 2 * kv_width, kv_width, kv_width)
    for edit, own in zip(edits, widths, strict=True):
        if edit is not None:
            check_shrunk(edit, tokens, own)
            debug.check_tiles(edit.site, tokens)
    check_head_norms(q_norm_C, k_norm_C, eps, channels)
    return dispatch.run(
        "rope_kv", implementation, qkv_TF, tuple(edits), cos_TX, sin_TX, kv_PSJC, slots_T,
        q_norm_C=q_norm_C, k_norm_C=k_norm_C, eps=eps,
    )  # fmt: skip


def _check_heads(name: str, width: int, kv_PSJC: jax.Array) -> int:
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


def _check_rope(cos: jax.Array, sin: jax.Array, names: tuple[str, str], tokens: int, channels: int) -> None:
    for name, table in zip(names, (cos, sin), strict=True):
        expected = (tokens, channels // 2)
        check(table.shape == expected, f"{name} has shape {table.shape}; expected {expected}")


def silu_mul_shrink(
    gate_up_TF: jax.Array,
    edits: Sequence[Shrunk | None],
    sites: Sequence[Site],
    mask_TG: jax.Array,
    *,
    implementation: str | None = None,
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    """Edit the fused gate and up, and return ``h = silu(gate) * up`` and its shrink for the sites that read it.

    Args:
        gate_up_TF: ``[T, 2F]``, gate and up side by side.
        edits: two, of gate and up; None for a site without edits.
        sites: those that read ``h``: ``down``, or none.
        mask_TG: bool edit mask.
        implementation: see the module.

    Returns:
        ``h_TF`` in the dtype of ``gate_up_TF``, and one float32 ``[T, E, R]`` a site.
    """
    check_activations("gate_up_TF", gate_up_TF)
    tokens, width = gate_up_TF.shape
    check(width % 2 == 0, f"gate_up_TF has odd width {width}; gate and up stand side by side")
    check(len(edits) == 2, f"edits has {len(edits)} entries; expected two, of gate and up")
    check_mask(mask_TG, tokens)
    for edit in edits:
        if edit is not None:
            check_shrunk(edit, tokens, width // 2)
            debug.check_tiles(edit.site, tokens)
    check_sites(tuple(sites), width // 2, tokens)
    for site in sites:
        debug.check_tiles(site, *mask_TG.shape)
    return dispatch.run("silu_mul_shrink", implementation, gate_up_TF, tuple(edits), tuple(sites), mask_TG)


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


def paged_attention(
    q_THC: jax.Array,
    kv_PSJC: jax.Array,
    page_table_BP: jax.Array,
    query_start_B1: jax.Array,
    kv_len_B: jax.Array,
    *,
    max_query_len: int,
    scale: float | None = None,
    implementation: str | None = None,
) -> jax.Array:
    """Causal attention of packed, ragged queries over one shared pool of KV pages (grouped-query attention included).

    Args:
        q_THC: queries of all requests, one request after the other; later rows are padding and give zeros.
        kv_PSJC: KV pool ``[pages, page size, 2K, C]``; its heads are k0 v0 k1 v1 ... The queries' own keys and values
            are already written. Its dtype may be narrower than that of ``q_THC``.
        page_table_BP: int32, the pages of each request in order; entries past ``kv_len_B`` may be any valid page.
        query_start_B1: int32 ``[B + 1]``, where each request's queries start, ending with their total.
        kv_len_B: int32, keys of each request, its queries' own included; its queries are its last positions.
        max_query_len: static bound on the queries of one request (1 for decode).
        scale: static, multiplies the scores, positive; ``C ** -0.5`` if None.
        implementation: see the module.

    Returns:
        ``[T, H, C]`` in the dtype of ``q_THC``; softmax in float32.
    """
    check_array("q_THC", q_THC, 3, jnp.floating)
    check_array("kv_PSJC", kv_PSJC, 4, jnp.floating)
    check_array("page_table_BP", page_table_BP, 2, jnp.integer)
    check_array("query_start_B1", query_start_B1, 1, jnp.integer)
    check_array("kv_len_B", kv_len_B, 1, jnp.integer)
    check(isinstance(max_query_len, int), f"max_query_len is {max_query_len!r}; give an integer")
    heads, channels = q_THC.shape[1:]
    kv_heads2 = kv_PSJC.shape[2]
    check(kv_PSJC.shape[3] == channels, f"kv_PSJC has head size {kv_PSJC.shape[3]}; q_THC has {channels}")
    check(kv_heads2 % 2 == 0, f"kv_PSJC has {kv_heads2} heads; keys and values alternate, so it must be even")
    check(heads % (kv_heads2 // 2) == 0, f"q_THC has {heads} heads, not a multiple of {kv_heads2 // 2} KV heads")
    batch = kv_len_B.shape[0]
    check(page_table_BP.shape[0] == batch, f"page_table_BP has {page_table_BP.shape[0]} rows; kv_len_B {batch}")
    check(
        query_start_B1.shape == (batch + 1,),
        f"query_start_B1 has shape {query_start_B1.shape}; expected ({batch + 1},)",
    )
    check(1 <= max_query_len <= q_THC.shape[0], f"max_query_len is {max_query_len}; allowed: 1 to {q_THC.shape[0]}")
    debug.check_range("page_table_BP", page_table_BP, kv_PSJC.shape[0])
    debug.check_range("kv_len_B", kv_len_B, page_table_BP.shape[1] * kv_PSJC.shape[1] + 1)
    debug.check_range("query_start_B1", query_start_B1, q_THC.shape[0] + 1)
    debug.check_lengths("query_start_B1", query_start_B1, max_query_len)
    return dispatch.run(
        "paged_attention", implementation, q_THC, kv_PSJC, page_table_BP, query_start_B1, kv_len_B,
        max_query_len=max_query_len, scale=_scale(scale, channels),
    )  # fmt: skip


def _scale(scale: float | None, channels: int) -> float:
    allowed = "give a positive number, or None for head size ** -0.5"
    check(scale is None or 0 < scale < math.inf, f"scale is {scale}; {allowed}")
    return channels**-0.5 if scale is None else scale


def decode_attention(
    qkv_BF: jax.Array,
    cos_BX: jax.Array,
    sin_BX: jax.Array,
    kv_PSJC: jax.Array,
    page_table_BP: jax.Array,
    position_B: jax.Array,
    *,
    q_norm_C: jax.Array | None = None,
    k_norm_C: jax.Array | None = None,
    eps: float = 0.0,
    scale: float | None = None,
    implementation: str | None = None,
) -> tuple[jax.Array, jax.Array]:
    """``rope_kv`` and ``paged_attention`` of one token a row, without edits, in one pass over the keys.

    Args:
        qkv_BF: ``[B, (H + 2K) C]``, the query, key and value heads of each row's token side by side.
        cos_BX: float32 ``[B, C / 2]``.
        sin_BX: likewise.
        kv_PSJC: KV pool ``[pages, page size, 2K, C]``, heads k0 v0 k1 v1 ...; updated in place where it is donated.
        page_table_BP: int32, the pages of each row in order; entries past its token may be any valid page.
        position_B: int32, where each row's token stands: its key and value are written there, and it attends to the
            keys up to there. Below 0 the row is idle: nothing is written.
        q_norm_C: as of ``rope_kv``, with ``k_norm_C`` and ``eps``.
        k_norm_C: likewise.
        eps: likewise.
        scale: static, multiplies the scores, positive; ``C ** -0.5`` if None.
        implementation: see the module.

    Returns:
        ``[B, H, C]`` in the dtype of ``qkv_BF``, zero in idle rows, and the pool; softmax in float32.
    """
    check_activations("qkv_BF", qkv_BF)
    check_array("kv_PSJC", kv_PSJC, 4, jnp.floating)
    check_array("page_table_BP", page_table_BP, 2, jnp.integer)
    check_array("position_B", position_B, 1, jnp.integer)
    batch = qkv_BF.shape[0]
    channels = _check_heads("qkv_BF", qkv_BF.shape[1], kv_PSJC)
    _check_rope(cos_BX, sin_BX, ("cos_BX", "sin_BX"), batch, channels)
    for name, array in (("page_table_BP", page_table_BP), ("position_B", position_B)):
        check(array.shape[0] == batch, f"{name} has {array.shape[0]} rows; qkv_BF has {batch}")
    check_head_norms(q_norm_C, k_norm_C, eps, channels)
    debug.check_range("page_table_BP", page_table_BP, kv_PSJC.shape[0])
    debug.check_range("position_B + 1", position_B + 1, page_table_BP.shape[1] * kv_PSJC.shape[1] + 1)
    return dispatch.run(
        "decode_attention", implementation, qkv_BF, cos_BX, sin_BX, kv_PSJC, page_table_BP, position_B,
        q_norm_C=q_norm_C, k_norm_C=k_norm_C, eps=eps, scale=_scale(scale, channels),
    )  # fmt: skip


def draw(
    logits_RV: jax.Array,
    index_B: jax.Array,
    temperature_B: jax.Array,
    seed_B: jax.Array,
    position_B: jax.Array,
    alive_B: jax.Array,
    *,
    implementation: str | None = None,
) -> Draws:
    """Draw a token of each row: the most likely one, or by its temperature with the Gumbel-max trick.

    The noise is JAX's own: ``jax.random.gumbel(jax.random.fold_in(jax.random.key(seed), position), (V,))``.

    Args:
        logits_RV: float32.
        index_B: int32, the row of the logits of each row.
        temperature_B: float32; 0 takes the most likely token, the first among equals.
        seed_B: uint32.
        position_B: int32, of the token to be drawn.
        alive_B: bool; what is drawn for other rows means nothing.
        implementation: see the module.

    Returns:
        See ``Draws``. A row whose logits are no distribution has a ``total_B`` that is not finite.
    """
    check_array("logits_RV", logits_RV, 2, jnp.floating)
    check(logits_RV.dtype == jnp.float32, f"logits_RV has dtype {logits_RV.dtype}; allowed: float32")
    check_array("index_B", index_B, 1, jnp.integer)
    check_array("temperature_B", temperature_B, 1, jnp.floating)
    check_array("seed_B", seed_B, 1, jnp.integer)
    check_array("position_B", position_B, 1, jnp.integer)
    for name, array in (
        ("temperature_B", temperature_B), ("seed_B", seed_B), ("position_B", position_B), ("alive_B", alive_B),
    ):  # fmt: skip
        check(array.shape == index_B.shape, f"{name} has shape {array.shape}; index_B has {index_B.shape}")
    check(alive_B.dtype == jnp.bool_, f"alive_B has dtype {alive_B.dtype}; allowed: bool")
    debug.check_range("index_B", index_B, logits_RV.shape[0])
    return dispatch.run("draw", implementation, logits_RV, index_B, temperature_B, seed_B, position_B, alive_B)


def write_pages(
    a_LPDR: jax.Array,
    c_LPR: jax.Array,
    b_LPRF: jax.Array,
    slabs: Sequence[jax.Array],
    page_K: jax.Array,
    *,
    at: int = 0,
    implementation: str | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Write rank pages of one site in all layers, from K slabs, each to its own page.

    Args:
        a_LPDR: the site's pools, bfloat16, float16 or float32; to write in place, donate them.
        c_LPR: float32.
        b_LPRF: as ``a_LPDR``.
        slabs: K arrays ``[L, W]`` of that dtype. A row holds, from element ``at`` on, a page's A ``[D, R]``, its B
            ``[R, F]`` and the bits of its c, one after the other; W may be larger.
        page_K: int32, where each goes. A slab for page 0, the null page, must hold zeros; several may.
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
    width = r * (d + b_LPRF.shape[3]) + r * 4 // a_LPDR.dtype.itemsize
    for k, slab_LW in enumerate(slabs):
        check_array(f"slabs[{k}]", slab_LW, 2, jnp.floating)
        check(slab_LW.dtype == a_LPDR.dtype, f"slabs[{k}] has dtype {slab_LW.dtype}; a_LPDR has {a_LPDR.dtype}")
        check(
            slab_LW.shape == (layers, slabs[0].shape[1]) and 0 <= at <= slab_LW.shape[1] - width,
            f"slabs[{k}] has shape {slab_LW.shape}; expected {layers} rows of {width} elements and more from {at} on",
        )
    check_array("page_K", page_K, 1, jnp.integer)
    check(len(page_K) == len(slabs), f"page_K has {len(page_K)} pages; there are {len(slabs)} slabs")
    debug.check_range("page_K", page_K, pages)
    return dispatch.run("write_pages", implementation, a_LPDR, c_LPR, b_LPRF, tuple(slabs), page_K, at=at)
