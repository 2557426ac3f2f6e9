"""Adapters from edits of one's own: folded edits as they are, and steering by a vector.

They are adapters of the kind ``edits``: whatever takes an adapter takes them (``generate``, the engine, ``forward`` by
``fold``, the trainer, ``save_adapter``).
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from kernels.xla.fp8 import FP8
from preft_jax.adapters.adapter import Adapter
from preft_jax.adapters.config import PEFT_MODULES, AdapterConfig
from preft_jax.adapters.pages import pack_adapter
from preft_jax.config import ModelConfig
from preft_jax.errors import ConfigError, ShapeError, check_type, shown
from preft_jax.shapes import SITES, check_axes

Place = tuple[int, str]
"""A layer and a site."""


def adapter_of_edits(edits: Any, model: ModelConfig, **config: Any) -> Adapter:
    """Return an adapter that does what low-rank edits say: ``y += m * ((x @ a + c) @ b)``.

        adapter_of_edits({(3, "block"): (a_DR, c_R, b_RF)}, model.config, positions="f1")

    Args:
        edits: by layer and site, each ``(a_DR, c_R, b_RF)`` or a ``LowRankEdit`` of one position group; or what
            ``fold`` returns. Leaves of NumPy or JAX.
        model: of the base model.
        config: other fields of ``AdapterConfig``: ``positions``, ``assistant_turns``, ``base_model_digest``.

    Raises:
        ShapeError: if an edit does not fit its site.
        ConfigError: if there are none, a place is not one of the model's, or values are not finite.
    """
    check_type("model", model, ModelConfig, "the ModelConfig, which a Model has as config", ConfigError)
    places = _by_place(edits)
    for layer, site in places:
        if site not in SITES or not 0 <= layer < model.num_hidden_layers:
            raise ConfigError(
                f"there is no place {shown((layer, site))}; layers are 0 to {model.num_hidden_layers - 1}, and sites "
                f"{', '.join(SITES)}"
            )
    leaves = {place: _leaves(place, edit, *model.site_shape(place[1])) for place, edit in places.items()}
    targets = tuple(site for site in SITES if any(site == own for _, own in leaves))
    layers = tuple(sorted({layer for layer, _ in leaves}))
    ranks = {place: leaves[place]["c"].shape[0] if place in leaves else 1 for place in _product(layers, targets)}
    rank = max(set(ranks.values()), key=list(ranks.values()).count)
    made = AdapterConfig(
        kind="edits", rank=rank, targets=targets, layers=layers,
        rank_pattern={_path(place): own for place, own in ranks.items() if own != rank}, **config,
    )  # fmt: skip
    params: list[dict[str, Any]] = [{} for _ in range(model.num_hidden_layers)]
    for (layer, site), own in ranks.items():
        d, f = model.site_shape(site)
        nothing = {"a": np.zeros((d, own)), "c": np.zeros(own), "b": np.zeros((own, f))}
        params[layer][site] = {
            name: np.asarray(leaf, np.float32) for name, leaf in leaves.get((layer, site), nothing).items()
        }
    return Adapter(made, {"layers": params})


def adapter_in_fp8(adapter: Adapter, model: ModelConfig) -> Adapter:
    """Return the adapter of the edits that another's rank pages in FP8 (``EngineConfig.adapter_dtype``) stand for.

    Args:
        adapter: of one position group.
        model: of the base model.

    Raises:
        AdapterError: if FP8 cannot hold it.
        ConfigError: if it edits first and last tokens differently, or is a learned prefix.
    """
    if adapter.config.prefix_length:
        raise ConfigError("the adapter is a learned prefix, which is no edit; give another kind")
    if adapter.config.groups > 1:
        raise ConfigError("the adapter has weights of last positions of their own; give one of one position group")
    edits = {}
    for site, pages in pack_adapter(adapter, model, FP8).items():
        a_LPDR, c_LPR, b_LPRF, *_ = pages.scaled()
        for layer in range(len(a_LPDR)):
            if adapter.config.edits_layer(layer):
                a_DR = np.moveaxis(a_LPDR[layer], 0, 1).reshape(a_LPDR.shape[2], -1)
                edits[layer, site] = a_DR, c_LPR[layer].reshape(-1), b_LPRF[layer].reshape(-1, b_LPRF.shape[3])
    kept = ("positions", "assistant_turns", "alora_invocation_tokens")
    return adapter_of_edits(edits, model, **{name: getattr(adapter.config, name) for name in kept})


def steering_adapter(
    vectors: Mapping[int, Any], model: ModelConfig, *, strength: float = 1.0, positions: str = "prompt"
) -> Adapter:
    """Return an adapter that adds a vector to the residual stream: ``h += strength * v`` after a layer.

    Turner et al., arXiv 2308.10248. It is an edit of rank 1 with ``a = 0`` and ``c = strength``.

    Args:
        vectors: ``[D]`` by layer.
        model: of the base model.
        strength: what vectors are multiplied with.
        positions: which tokens it is added to: ``all`` for generated ones too.

    Raises:
        ShapeError, ConfigError: as ``adapter_of_edits``.
    """
    check_type("model", model, ModelConfig, "the ModelConfig, which a Model has as config", ConfigError)
    edits = {}
    for layer, vector in vectors.items():
        v_D = np.asarray(vector)
        check_axes(f"the vector of layer {layer}", v_D, "float", D=model.hidden_size)
        edits[layer, "block"] = (np.zeros((len(v_D), 1), np.float32), np.full(1, strength, np.float32), v_D[None])
    return adapter_of_edits(edits, model, positions=positions)


def _by_place(edits: Any) -> dict[Place, Any]:
    if isinstance(edits, Mapping) and set(edits) == {"layers"}:
        found = {(i, site): edit for i, sites in enumerate(edits["layers"]) for site, edit in sites.items()}
    elif isinstance(edits, Mapping) and all(isinstance(place, tuple) and len(place) == 2 for place in edits):
        found = dict(edits)
    else:
        raise ConfigError(f"edits is {shown(edits)}; give {{(layer, site): (a, c, b)}}, or what fold returns")
    if not found:
        raise ConfigError("there are no edits; give at least one")
    return found


def _leaves(place: Place, edit: Any, d: int, f: int) -> dict[str, Any]:
    name = f"layers.{place[0]}.{place[1]}"
    if not isinstance(edit, tuple) or len(edit) not in (3, 4):
        raise ShapeError(f"the edit of {name} is {shown(edit)}; give (a_DR, c_R, b_RF)")
    a, b = np.asarray(edit[0]), np.asarray(edit[2])
    c = np.zeros(b.shape[:1], np.float32) if edit[1] is None else np.asarray(edit[1])
    if len(edit) == 4 and np.any(np.asarray(edit[3])):
        raise ShapeError(f"the edit of {name} has weights of last positions of their own; fold each group alone")
    rank = c.shape[0] if c.ndim == 1 else None
    check_axes(f"{name}.c_R", c, "float", R=rank)
    check_axes(f"{name}.a_DR", a, "float", D=d, R=rank)
    check_axes(f"{name}.b_RF", b, "float", R=rank, F=f)
    if not all(np.isfinite(leaf).all() for leaf in (a, c, b)):
        raise ConfigError(f"the edit of {name} has values that are not finite; give numbers")
    return {"a": a, "c": c, "b": b}


def _product(layers: tuple[int, ...], sites: tuple[str, ...]) -> list[Place]:
    return [(layer, site) for layer in layers for site in sites]


def _path(place: Place) -> str:
    layer, site = place
    return f"layers.{layer}.{PEFT_MODULES.get(site, site)}"
