"""Drawing tokens in plain JAX."""

import jax
import jax.numpy as jnp

from kernels.types import Draws


def draw(
    logits_RV: jax.Array,
    index_B: jax.Array,
    temperature_B: jax.Array,
    seed_B: jax.Array,
    position_B: jax.Array,
    alive_B: jax.Array,
) -> Draws:
    """See ``kernels.api.draw``."""
    logits_BV = jnp.where(alive_B[:, None], logits_RV[index_B], -jnp.inf)
    greedy_B = temperature_B <= 0

    def noise(seed: jax.Array, position: jax.Array) -> jax.Array:
        key = jax.random.fold_in(jax.random.key(seed), position)
        return jax.random.gumbel(key, logits_BV.shape[1:], jnp.float32)

    most_B1 = logits_BV.max(axis=1, keepdims=True)
    scaled_BV = (logits_BV - most_B1) / jnp.where(greedy_B, 1.0, temperature_B)[:, None]
    noise_BV = jnp.where(greedy_B[:, None], 0.0, jax.vmap(noise)(seed_B, position_B))
    token_B = jnp.argmax(scaled_BV + noise_BV, axis=1).astype(jnp.int32)
    total_B = jax.nn.logsumexp(logits_BV, axis=1)

    def at(values_BV: jax.Array) -> jax.Array:
        return jnp.take_along_axis(values_BV, token_B[:, None], axis=1)[:, 0]

    own_B = at(scaled_BV) - jax.nn.logsumexp(scaled_BV, axis=1)
    return Draws(token_B, at(logits_BV) - total_B, jnp.where(greedy_B, 0.0, own_B), total_B)
