"""What flows through a model, by name: outputs of linears and the residual stream, with the edits that act on them."""

import re
from collections.abc import Sequence
from typing import Any

import jax

from preft_jax.adapters.edits import Edits, PrefixKV
from preft_jax.config import ModelConfig
from preft_jax.errors import ConfigError, shown
from preft_jax.models.forward import edits_of, hidden_states
from preft_jax.models.params import Params
from preft_jax.shapes import SITES

_NAME = re.compile(r"layers\.([0-9]{1,6})\.([a-z]+)(\.input)?")


class _Collecting:
    """Applies other edits, and keeps what is asked for."""

    def __init__(self, edits: Edits, names: Sequence[str]):
        self._edits = edits
        self._names = frozenset(names)
        self.found: dict[str, jax.Array] = {}

    def apply(self, layer: int, sites: Sequence[str], x: jax.Array, ys: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        """See ``Edits.apply``."""
        edited = self._edits.apply(layer, sites, x, ys)
        for site, y in zip(sites, edited, strict=True):
            for name, value in ((f"layers.{layer}.{site}", y), (f"layers.{layer}.{site}.input", x)):
                if name in self._names:
                    self.found[name] = value
        return edited

    def prefix(self, layer: int, dtype: Any) -> PrefixKV | None:
        """See ``Edits.prefix``."""
        return self._edits.prefix(layer, dtype)


def activations(
    config: ModelConfig,
    params: Params,
    tokens_BS: jax.Array,
    names: Sequence[str],
    *,
    folded: Any = None,
    edit_mask_BSG: jax.Array | None = None,
    segments_BS: jax.Array | None = None,
    positions_BS: jax.Array | None = None,
) -> dict[str, jax.Array]:
    """Return what flows through a model at some places, differentiable as ``forward`` is.

        streams = activations(model.config, model.params, tokens_BS, ["layers.3.block", "layers.3.q.input"])

    Args:
        config: static.
        params: canonical or serving layout.
        tokens_BS: int32.
        names: static. ``layers.{i}.block`` is the residual stream after a layer, ``layers.{i}.{site}`` the output of a
            linear (q, k, v, o, gate, up, down), edits included; with ``.input``, what it and its edits read.
        folded: ``fold(adapter)``; None for the base model.
        edit_mask_BSG: with ``folded``, see ``forward``.
        segments_BS: see ``forward``.
        positions_BS: see ``forward``.

    Returns:
        ``[B, S, F]`` by name, in the order of ``names`` and the model's dtype.

    Raises:
        ConfigError: if a name is no place of the model.
        ShapeError: as ``forward``.
    """
    for name in names:
        match = _NAME.fullmatch(name) if isinstance(name, str) else None
        if match is None or match[2] not in SITES or int(match[1]) >= config.num_hidden_layers:
            raise ConfigError(
                f"there is no activation {shown(name)}; give layers.N.SITE or layers.N.SITE.input with N from 0 to "
                f"{config.num_hidden_layers - 1} and SITE one of {', '.join(SITES)}"
            )
    edits = edits_of(config, folded, edit_mask_BSG)
    collecting = _Collecting(edits, names)
    hidden_states(config, params, tokens_BS, collecting, segments_BS=segments_BS, positions_BS=positions_BS)
    return {name: collecting.found[name] for name in names}
