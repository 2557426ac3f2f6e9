"""Drawing tokens."""

import jax
import jax.numpy as jnp

from kernels import debug, dispatch
from kernels.checks import (
    check,
    check_array,
)
from kernels.types import Draws


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
