"""What lies between two matrix products of a layer, each with the edits that fall there."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from kernels import debug, dispatch
from kernels.checks import (
    check,
    check_activations,
    check_array,
    check_head_norms,
    check_heads,
    check_mask,
    check_pool,
    check_product,
    check_rope,
    check_shrunk,
    check_sites,
    check_tiles,
)
from kernels.types import Product, QuantizedRows, Shrunk, Site


def norm_shrink(
    x_TD: jax.Array,
    edits: Sequence[Shrunk],
    block: Site | None,
    weight_D: jax.Array,
    eps: float,
    sites: Sequence[Site],
    mask_TG: jax.Array,
    *,
    add_TD: Product | None = None,
    quantized: bool = False,
    implementation: str | None = None,
) -> tuple[jax.Array, jax.Array | QuantizedRows, tuple[jax.Array, ...]]:
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
        quantized: whether ``h`` is asked for in FP8, see ``quantize``; it is shrunk before it is rounded.
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
        y_TD = check_product("add_TD", add_TD)
        check(
            y_TD.shape == x_TD.shape and y_TD.dtype == x_TD.dtype,
            f"add_TD is {y_TD.dtype}{list(y_TD.shape)}; expected {x_TD.dtype}{list(x_TD.shape)}",
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
        "norm_shrink", implementation, x_TD, tuple(edits), block, weight_D, eps, tuple(sites), mask_TG, add_TD=add_TD,
        quantized=quantized,
    )  # fmt: skip


def quantize(x_TD: jax.Array, *, implementation: str | None = None) -> QuantizedRows:
    """Round rows to FP8 (e4m3), each with a scale of its own: its largest magnitude is 448 there.

    A row of zeros has the scale 1. One with a value that is not finite holds NaN, and so do products with it.

    Args:
        x_TD: bfloat16, float16 or float32.
        implementation: see the module.
    """
    check_activations("x_TD", x_TD)
    return dispatch.run("quantize", implementation, x_TD)


def rope_kv(
    qkv_TF: Product,
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
    y_TF = check_product("qkv_TF", qkv_TF)
    check_array("kv_PSJC", kv_PSJC, 4, jnp.floating)
    check_array("slots_T", slots_T, 1, jnp.integer)
    tokens, width = y_TF.shape
    channels = check_heads("qkv_TF", width, kv_PSJC)
    check_rope(cos_TX, sin_TX, ("cos_TX", "sin_TX"), tokens, channels)
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


def silu_mul_shrink(
    gate_up_TF: Product,
    edits: Sequence[Shrunk | None],
    sites: Sequence[Site],
    mask_TG: jax.Array,
    *,
    quantized: bool = False,
    implementation: str | None = None,
) -> tuple[jax.Array | QuantizedRows, tuple[jax.Array, ...]]:
    """Edit the fused gate and up, and return ``h = silu(gate) * up`` and its shrink for the sites that read it.

    Args:
        gate_up_TF: ``[T, 2F]``, gate and up side by side.
        edits: two, of gate and up; None for a site without edits.
        sites: those that read ``h``: ``down``, or none.
        mask_TG: bool edit mask.
        quantized: whether ``h`` is asked for in FP8, see ``quantize``; it is shrunk before it is rounded.
        implementation: see the module.

    Returns:
        ``h_TF`` in the dtype of ``gate_up_TF``, and one float32 ``[T, E, R]`` a site.
    """
    tokens, width = check_product("gate_up_TF", gate_up_TF).shape
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
    return dispatch.run(
        "silu_mul_shrink", implementation, gate_up_TF, tuple(edits), tuple(sites), mask_TG, quantized=quantized
    )
