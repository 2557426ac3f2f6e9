"""The fold: an adapter's trainable parameters as low-rank edits (the table is in ``adapters/adapter.py``)."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from preft_jax.adapters.config import AdapterConfig

FOLD_VERSION = 1
"""Raised whenever the fold would give other numbers for the same parameters; part of every digest."""


class LowRankEdit(NamedTuple):
    """One folded edit ``y += m * ((x @ a + c) @ b)``, float32.

    ``group_R`` (int32) names, for each rank, the column of the edit mask that switches it.
    """

    a_DR: jax.Array
    c_R: jax.Array
    b_RF: jax.Array
    group_R: jax.Array


def orthonormal_rows(r_RD: jax.Array) -> jax.Array:
    """Return Gram-Schmidt's orthonormal rows; rows that are orthonormal already stay as they are.

    Reduced QR of the transpose with the signs fixed so that the triangular factor's diagonal is positive.
    Differentiable.
    """
    q_DR, upper_RR = jnp.linalg.qr(r_RD.T)
    sign_R = jnp.where(jnp.diagonal(upper_RR) < 0, -1.0, 1.0)
    return (q_DR * sign_R[None, :]).T


def _orthonormal_groups(r_RD: jax.Array, groups: int) -> jax.Array:
    return jnp.concatenate([orthonormal_rows(part) for part in jnp.split(r_RD, groups)])


def fold_site(config: AdapterConfig, layer: int, site: str, leaves: Mapping[str, jax.Array]) -> LowRankEdit:
    """Fold one site's parameters into a low-rank edit (float32, pure, differentiable); see the module's table."""
    leaves = {name: jnp.asarray(x, jnp.float32) for name, x in leaves.items()}
    if config.kind == "lora":
        a_DR = leaves["lora_a"].T
        b_RF = leaves["lora_b"].T * config.scale_at(layer, site)
        c_R = jnp.zeros(a_DR.shape[1], jnp.float32)
    else:
        r_RD = leaves["r"]
        if config.kind == "loreft" or config.orthonormal:
            r_RD = _orthonormal_groups(r_RD, config.groups)
        a_DR = (leaves["w"] - r_RD).T if config.kind == "loreft" else leaves["w"].T
        b_RF, c_R = r_RD, leaves["b"]
    group_R = jnp.repeat(jnp.arange(config.groups, dtype=jnp.int32), a_DR.shape[1] // config.groups)
    return LowRankEdit(a_DR, c_R, b_RF, group_R)


def fold_params(config: AdapterConfig, params: Any) -> dict[str, Any]:
    """``fold`` as a function of the parameters, for differentiation."""
    return {
        "layers": [
            {site: fold_site(config, i, site, leaves) for site, leaves in sites.items()}
            for i, sites in enumerate(params["layers"])
        ]
    }


def fold_on_host(config: AdapterConfig, params: Any) -> list[dict[str, LowRankEdit]]:
    """Return the fold of each layer in NumPy arrays, computed on the CPU.

    So one adapter has one fold, and one digest, whatever accelerator serves it.
    """
    with jax.default_device(jax.devices("cpu")[0]):
        folded = fold_params(config, jax.tree.map(np.asarray, params))
    return jax.tree.map(np.asarray, folded["layers"])
