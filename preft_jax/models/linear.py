"""One type for a weight in any stored layout, and its product."""

import dataclasses
from typing import Any

import jax


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Transposed:
    """A linear weight stored as ``[output, input]``."""

    w_FD: jax.Array


def linear(x: jax.Array, weight: jax.Array | Transposed, dtype: Any = None) -> jax.Array:
    """``x @ weight`` for ``x [..., D]`` and a weight in any layout; ``dtype`` of the result defaults to that of ``x``.

    Backends accumulate bfloat16 products in float32 whatever the result's dtype. Asking for a float32 result and
    rounding it afterwards would make a GPU write and read it once more.
    """
    w, axis = (weight.w_FD, 1) if isinstance(weight, Transposed) else (weight, 0)
    contract = (((x.ndim - 1,), (axis,)), ((), ()))
    return jax.lax.dot_general(x, w, contract, preferred_element_type=dtype or x.dtype)
