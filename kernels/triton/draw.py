"""Drawing tokens in one pass over the logits; a row pays for noise only if it is not greedy."""

import jax
import jax.numpy as jnp

from kernels.triton.call import call, ceil_div, power_of_two, require
from kernels.triton.device.draw import draw_kernel
from kernels.types import Draws


def draw(
    logits_RV: jax.Array,
    index_B: jax.Array,
    temperature_B: jax.Array,
    seed_B: jax.Array,
    position_B: jax.Array,
    alive_B: jax.Array,
    *,
    block: int = 4096,
) -> Draws:
    """See ``kernels.api.draw``. A program takes ``block`` logits of a row."""
    require(logits_RV.dtype == jnp.float32, f"logits_RV has dtype {logits_RV.dtype}; allowed: float32")
    rows, vocab = len(index_B), logits_RV.shape[1]
    block = min(block, power_of_two(vocab))
    blocks = ceil_div(vocab, block)
    (largest, total, scaled_total, best, chosen), token_BN = call(
        draw_kernel,
        logits_RV, index_B, temperature_B, seed_B, position_B, alive_B.astype(jnp.int8),
        out=[
            jax.ShapeDtypeStruct((5, rows, blocks), jnp.float32),
            jax.ShapeDtypeStruct((rows, blocks), jnp.int32),
        ],
        grid=(rows, blocks),
        warps=4,
        B=rows, V=vocab, NB=blocks, BV=block,
    )  # fmt: skip
    greedy_B1 = temperature_B[:, None] <= 0
    divisor_B1 = jnp.where(greedy_B1, 1.0, temperature_B[:, None])
    most_B1 = largest.max(axis=1, keepdims=True)
    origin_BN = jnp.where(jnp.isneginf(largest), 0.0, largest)
    behind_BN = origin_BN - most_B1
    total_B = jnp.log((total * jnp.exp(behind_BN)).sum(axis=1)) + most_B1[:, 0]
    scaled_B = jnp.log((scaled_total * jnp.exp(behind_BN / divisor_B1)).sum(axis=1))
    winner_B1 = jnp.argmax(best + behind_BN / divisor_B1, axis=1)[:, None]
    token_B = jnp.take_along_axis(token_BN, winner_B1, axis=1)[:, 0]
    chosen_B = jnp.take_along_axis(chosen, winner_B1, axis=1)[:, 0]
    own_B = (chosen_B - most_B1[:, 0]) / divisor_B1[:, 0] - scaled_B
    return Draws(token_B, chosen_B - total_B, jnp.where(greedy_B1[:, 0], 0.0, own_B), total_B)
