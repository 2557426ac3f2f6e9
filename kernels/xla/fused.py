"""The fused operations of a layer, composed of their parts in plain JAX: their meaning, and their fallback."""

import jax
import jax.numpy as jnp

from kernels.types import Product, QuantizedRows, Shrunk, Site
from kernels.xla.fp8 import kept_as, quantize, scaled
from kernels.xla.lowrank import edit_delta, expand, shrink


def rms_norm(x: jax.Array, weight: jax.Array, eps: float) -> jax.Array:
    """Root-mean-square norm over the last axis (Zhang and Sennrich, arXiv 1910.07467), computed in float32."""
    x32 = x.astype(jnp.float32)
    x32 = x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + eps)
    return x32.astype(x.dtype) * weight


def rotate(x: jax.Array, rope: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Rotate head channels ``[..., heads, C]``: channel i pairs with i + C / 2, as in Hugging Face's checkpoints."""
    cos, sin = rope
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)


def write_kv(pool_PSJC: jax.Array, slots_T: jax.Array, k_TKC: jax.Array, v_TKC: jax.Array) -> jax.Array:
    """Return the pool with each token's row written at its slot (in place if donated); slots outside it are dropped."""
    pages, page_size, *rest = pool_PSJC.shape
    new_TJC = jnp.stack([k_TKC, v_TKC], axis=2).reshape(k_TKC.shape[0], *rest)
    flat = pool_PSJC.reshape(pages * page_size, *rest)
    slots_T = jnp.where(slots_T < 0, flat.shape[0], slots_T)
    return flat.at[slots_T].set(kept_as(new_TJC, pool_PSJC.dtype), mode="drop").reshape(pool_PSJC.shape)


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
) -> tuple[jax.Array, jax.Array | QuantizedRows, tuple[jax.Array, ...]]:
    """See ``kernels.api.norm_shrink``."""
    if add_TD is not None or edits:
        x32_TD = x_TD.astype(jnp.float32)
        if add_TD is not None:
            x32_TD += scaled(add_TD).astype(jnp.float32)
        x_TD = sum((edit_delta(edit, x_TD.dtype) for edit in edits), x32_TD).astype(x_TD.dtype)
    if block is not None:
        (s_TER,) = shrink(x_TD, (block,), mask_TG)
        x_TD = expand(Shrunk(s_TER, block), x_TD)
    h_TD = rms_norm(x_TD, weight_D.astype(x_TD.dtype), eps)
    return x_TD, quantize(h_TD) if quantized else h_TD, shrink(h_TD, sites, mask_TG)


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
) -> tuple[jax.Array, jax.Array]:
    """See ``kernels.api.rope_kv``."""
    qkv_TF = scaled(qkv_TF)
    channels = kv_PSJC.shape[3]
    kv_size = kv_PSJC.shape[2] // 2 * channels
    q_size = qkv_TF.shape[1] - 2 * kv_size
    parts = jnp.split(qkv_TF, (q_size, q_size + kv_size), axis=1)
    parts = [y if edit is None else expand(edit, y) for y, edit in zip(parts, edits, strict=True)]
    q, k, v = (y.reshape(y.shape[0], -1, channels) for y in parts)
    if q_norm_C is not None and k_norm_C is not None:
        q, k = (rms_norm(y, weight.astype(y.dtype), eps) for y, weight in ((q, q_norm_C), (k, k_norm_C)))
    rope = cos_TX[:, None], sin_TX[:, None]
    return rotate(q, rope), write_kv(kv_PSJC, slots_T, rotate(k, rope), v)


def silu_mul_shrink(
    gate_up_TF: Product,
    edits: tuple[Shrunk | None, ...],
    sites: tuple[Site, ...],
    mask_TG: jax.Array,
    *,
    quantized: bool = False,
) -> tuple[jax.Array | QuantizedRows, tuple[jax.Array, ...]]:
    """See ``kernels.api.silu_mul_shrink``."""
    parts = jnp.split(scaled(gate_up_TF), 2, axis=1)
    gate, up = (y if edit is None else expand(edit, y) for y, edit in zip(parts, edits, strict=True))
    h_TF = jax.nn.silu(gate) * up
    return quantize(h_TF) if quantized else h_TF, shrink(h_TF, sites, mask_TG)
