"""The fold: an adapter's trainable parameters as low-rank edits (the table is in ``adapters/adapter.py``)."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from preft_jax.adapters.config import AdapterConfig
from preft_jax.adapters.kinds import find_kind
from preft_jax.errors import ConfigError, ShapeError
from preft_jax.shapes import check_axes

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


def fold_site(config: AdapterConfig, layer: int, site: str, leaves: Mapping[str, jax.Array]) -> LowRankEdit:
    """Fold one site's parameters into a low-rank edit (float32, pure, differentiable); see the module's table.

    Raises:
        ConfigError: if the kind's fold gives something else than an edit of the config's rank.
    """
    kind, rank = find_kind(config.kind), config.rank_at(layer, site) * config.groups
    edit = kind.fold(
        config, {name: jnp.asarray(x, jnp.float32) for name, x in leaves.items()}, config.scale_at(layer, site)
    )
    if not isinstance(edit, tuple) or len(edit) != 3:
        raise ConfigError(f"the fold of kind {kind.name!r} gives {type(edit).__name__}; it is to return (a, c, b)")
    a_DR, c_R, b_RF = edit
    c_R = jnp.zeros(rank, jnp.float32) if c_R is None else c_R
    group_R = jnp.repeat(jnp.arange(config.groups, dtype=jnp.int32), rank // config.groups)
    folded = LowRankEdit(a_DR, c_R, b_RF, group_R)
    try:
        check_axes("a", a_DR, "float", D=None, R=rank)
        check_axes("c", c_R, "float", R=rank)
        check_axes("b", b_RF, "float", R=rank, F=None)
    except ShapeError as error:
        raise ConfigError(f"the fold of kind {kind.name!r} at {site!r} of layer {layer}: {error}") from None
    return folded


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
