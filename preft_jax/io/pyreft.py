"""Conversion of pyreft folders (Wu et al., arXiv 2404.03592) to our adapters; needs torch, once.

A folder holds ``config.json``, an ``IntervenableConfig`` of pyvene, and for each intervention ``intkey_{key}.bin``, a
torch pickle of its state dict. The pickles are read with ``weights_only=True``, which runs no code; nothing else here
reads ``.bin`` files.

=======================  =======================================  ===============================
pyreft's class           output                                   our kind
=======================  =======================================  ===============================
``LoreftIntervention``   h + (h Wᵀ + b - h R) Rᵀ   R: [d, r]      ``loreft``
``DireftIntervention``   h + (h Wᵀ + b) Rᵀ         R: [d, r]      ``direft``
``NodireftIntervention`` h + (h Wᵀ + b) P          P: [r, d]      ``direft``, not orthonormal
=======================  =======================================  ===============================

R has orthonormal columns. Without shared weights pyreft lists every layer twice: the interventions of the first half
act on the first positions, those of the second half on the last ones. Positions and ``act_fn`` are not in the folder.
"""

import collections
import dataclasses
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from preft_jax.adapters.adapter import Adapter, check_fits
from preft_jax.adapters.config import AdapterConfig
from preft_jax.config import ModelConfig
from preft_jax.errors import AdapterError, ConfigError
from preft_jax.io.safetensors_io import read_bytes

_ADVICE = "give a folder that pyreft's ReftModel.save wrote"
_KINDS: Mapping[str, tuple[str, bool]] = {
    "LoreftIntervention": ("loreft", True),
    "LoreftIntervention_IdentityInit": ("loreft", True),
    "DireftIntervention": ("direft", True),
    "NodireftIntervention": ("direft", False),
}
"""pyreft's class -> (kind, orthonormal)."""

_LINEAR_ACT_FNS = (None, "linear")
_FIELDS = ("layer", "component", "unit", "max_number_of_units", "low_rank_dimension")
_ORTHONORMAL_TOLERANCE = 0.02
"""Largest error of ``RᵀR`` that is taken for rounding; columns stored in bfloat16 are off by 2⁻⁸ at most."""

_BASE = "rotate_layer.parametrizations.weight.0.base"
_FREE = "rotate_layer.parametrizations.weight.original"


@dataclasses.dataclass(frozen=True)
class _Intervention:
    """One intervention of the folder: its class's name, the layer after which it acts, and its state dict's file."""

    name: str
    layer: int
    file: str


def convert_pyreft(
    src: str | Path,
    model_config: ModelConfig,
    *,
    positions: str = "f7+l7",
    assistant_turns: str = "edit",
    act_fn: str | None = None,
    base_model: str | None = None,
    base_model_digest: str | None = None,
) -> Adapter:
    """Convert a pyreft folder to an adapter.

    Args:
        src: the folder that ``ReftModel.save`` wrote.
        model_config: shape of the base model.
        positions: the rule the interventions were trained with, which the folder does not say.
        assistant_turns: ``edit`` or ``skip``.
        act_fn: the ``act_fn`` the interventions were made with, which the folder does not say either; only a linear one
            (``None``) can be converted.
        base_model: name of the base model, for people.
        base_model_digest: the base model's digest, if known.

    Returns:
        An adapter of kind ``loreft`` or ``direft``; float32 NumPy leaves.

    Raises:
        AdapterError: if torch is missing, a file is missing or damaged, or the interventions are not one adapter.
    """
    folder = Path(src)
    if act_fn not in _LINEAR_ACT_FNS:
        raise AdapterError(f"act_fn {act_fn!r} is not linear, so the edit is not low-rank and cannot be converted")
    interventions = _read_interventions(folder, model_config)
    groups = _groups(interventions, folder)
    if len(groups) == 2 and ("f" not in positions or "l" not in positions):
        raise AdapterError(
            f"{folder} has interventions of their own for first and last positions; give positions such as 'f7+l7', "
            f"not {positions!r}"
        )
    kind, orthonormal = _KINDS[interventions[0].name]
    leaves = {
        layer: _stack(
            [_leaves(_load_state_dict(group[layer]), interventions[0].name, group[layer]) for group in groups]
        )
        for layer in sorted(groups[0])
    }
    ranks = {layer: len(x["b"]) // len(groups) for layer, x in leaves.items()}
    if len(set(ranks.values())) != 1:
        raise AdapterError(f"{folder} has interventions of different ranks by layer, {ranks}; one adapter has one rank")
    count = model_config.num_hidden_layers
    try:
        config = AdapterConfig(
            kind=kind,
            rank=next(iter(ranks.values())),
            layers=None if len(leaves) == count else tuple(leaves),
            positions=positions,
            share_weights=len(groups) == 1,
            assistant_turns=assistant_turns,
            orthonormal=orthonormal,
            base_model=base_model,
            base_model_digest=base_model_digest,
        )
        adapter = Adapter(config, {"layers": [{"block": leaves[i]} if i in leaves else {} for i in range(count)]})
        check_fits(adapter, model_config)
    except ConfigError as error:
        raise AdapterError(f"{folder}: {error}") from None
    return adapter


def _read_interventions(folder: Path, model_config: ModelConfig) -> list[_Intervention]:
    """Read ``config.json`` and return its interventions in order, after checking that each can be converted."""
    path = folder / "config.json"
    try:
        contents = json.loads(read_bytes(path, error=AdapterError, advice=_ADVICE))
        representations, classes = contents["representations"], contents["intervention_types"]
        fields: list[dict[str, Any]] = [
            dict(x if isinstance(x, dict) else zip(_FIELDS, x, strict=False)) for x in representations
        ]
        names = [re.findall(r"\w+", text)[-1] for text in classes]
    except (ValueError, TypeError, KeyError, IndexError, RecursionError) as cause:
        raise AdapterError(f"{path} is not the config of a pyreft folder ({cause!r}); {_ADVICE}") from None
    if not fields or len(fields) != len(names):
        raise AdapterError(f"{path} has {len(fields)} representations and {len(names)} intervention types; {_ADVICE}")
    if (folder / "pytorch_model.bin").exists():
        raise AdapterError(
            f"{folder} holds pytorch_model.bin, trained weights of the base model; no adapter can hold them"
        )
    _check_classes(names, [contents, *fields], path)
    seen: collections.Counter[tuple[int, int]] = collections.Counter()
    interventions = []
    for name, field in zip(names, fields, strict=True):
        layer, width = _check_place(field, model_config, path)
        key = f"layer_{layer}_comp_block_output_unit_pos_nunit_{width}#{seen[layer, width]}"
        seen[layer, width] += 1
        interventions.append(_Intervention(name, layer, str(folder / f"intkey_{key}.bin")))
    extra = {str(file) for file in folder.glob("intkey_*.bin")} - {x.file for x in interventions}
    if extra:
        raise AdapterError(f"{path} does not name the intervention of {sorted(extra)[0]}; remove it or {_ADVICE}")
    return interventions


def _check_classes(names: list[str], holders: list[dict[str, Any]], path: Path) -> None:
    for name in names:
        if name not in _KINDS:
            raise AdapterError(f"{path}: {name} cannot be converted; allowed: {', '.join(_KINDS)}")
    if len({_KINDS[name] for name in names}) != 1:
        raise AdapterError(f"{path} mixes {', '.join(sorted(set(names)))}; one adapter has one kind")
    for holder in holders:
        if holder.get("act_fn") not in _LINEAR_ACT_FNS:
            raise AdapterError(f"{path}: act_fn {holder['act_fn']!r} is not linear, so the edit is not low-rank")


def _check_place(field: Mapping[str, Any], model_config: ModelConfig, path: Path) -> tuple[int, int]:
    """Return the layer of a representation and its number of units, which is part of its key."""
    layer, component, unit = field.get("layer"), field.get("component"), field.get("unit", "pos")
    if component != "block_output" or unit != "pos":
        raise AdapterError(
            f"{path}: component {component!r} at unit {unit!r} cannot be converted; allowed: 'block_output' at 'pos'"
        )
    if type(layer) is not int or not 0 <= layer < model_config.num_hidden_layers:
        raise AdapterError(
            f"{path}: layer {layer!r} is not one of the base model's, 0 to {model_config.num_hidden_layers - 1}"
        )
    width = field.get("max_number_of_units", 1)
    if width != 1:
        raise AdapterError(f"{path}: max_number_of_units {width!r} cannot be converted; allowed: 1")
    return layer, width


def _groups(interventions: list[_Intervention], folder: Path) -> list[dict[int, str]]:
    """Return ``{layer: file}`` of each position group: one, or first and last positions."""
    layers = [x.layer for x in interventions]
    half = len(layers) // 2
    if len(set(layers)) == len(layers):
        parts = [interventions]
    elif layers[:half] == layers[half:] and len(set(layers)) == half:
        parts = [interventions[:half], interventions[half:]]
    else:
        raise AdapterError(
            f"{folder} has interventions at layers {layers}; allowed: each layer once, or all layers once for the "
            "first positions and then, in the same order, once for the last ones"
        )
    return [{x.layer: x.file for x in part} for part in parts]


def _stack(groups: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """Put the rows of the position groups one after the other on the rank axis."""
    return {leaf: np.concatenate([group[leaf] for group in groups]) for leaf in groups[0]}


def _leaves(state: Mapping[str, np.ndarray], name: str, file: str) -> dict[str, np.ndarray]:
    """Return our leaves ``w [r, d]``, ``b [r]``, ``r [r, d]`` of one intervention's state dict."""
    weight, bias = (state.get(key, state.get(f"learned_source.{key}")) for key in ("weight", "bias"))
    projection = _projection(state, name)
    if weight is None or bias is None or projection is None:
        raise AdapterError(f"{file} lacks tensors of {name}; it holds {', '.join(sorted(state))}")
    if weight.ndim != 2 or projection.shape != weight.shape or bias.shape != weight.shape[:1]:
        raise AdapterError(
            f"{file}: weight {list(weight.shape)}, bias {list(bias.shape)} and projection {list(projection.shape)} do "
            "not belong together; expected [r, d], [r] and [r, d]"
        )
    leaves = {"w": weight, "b": bias, "r": projection}
    if not all(np.isfinite(x).all() for x in leaves.values()):
        raise AdapterError(f"{file} holds values that are not finite; convert another checkpoint")
    if _KINDS[name][1]:
        error = np.abs(projection @ projection.T - np.eye(len(projection))).max()
        if error > _ORTHONORMAL_TOLERANCE:
            raise AdapterError(f"{file}: the columns of rotate_layer are not orthonormal (off by {error:.2g})")
    return {leaf: np.ascontiguousarray(x, np.float32) for leaf, x in leaves.items()}


def _projection(state: Mapping[str, np.ndarray], name: str) -> np.ndarray | None:
    """Return the rows ``[r, d]`` that an edit writes along, or ``None`` if the state dict has none."""
    if not _KINDS[name][1]:
        return state.get("proj_layer.weight")
    rotation = state.get("rotate_layer", state.get("rotate_layer.weight"))
    if rotation is None and _FREE in state:
        rotation = _from_householder(state[_FREE], state.get(_BASE))
    return None if rotation is None else rotation.T


def _from_householder(free: np.ndarray, base: np.ndarray | None) -> np.ndarray:
    """Return the matrix ``[d, r]`` with orthonormal columns that torch's ``orthogonal`` parametrisation stores.

    ``free`` holds Householder vectors below its diagonal and signs on it; the matrix is ``base`` times the first r
    columns of ``H_1 ... H_r`` with those signs, where ``H_i = I - 2 v_i v_iᵀ / |v_i|²``.
    """
    d, rank = free.shape
    columns = np.eye(d, rank)
    for i in reversed(range(rank)):
        v = np.concatenate([np.zeros(i), [1.0], free[i + 1 :, i]])
        columns -= np.outer(v, v @ columns) * (2.0 / (v @ v))
    columns *= np.trunc(np.diagonal(free))
    return columns if base is None else base @ columns


def _load_state_dict(file: str) -> dict[str, np.ndarray]:
    """Return the tensors of a torch pickle as float32 arrays; other entries (pyvene's dimensions) are left out."""
    try:
        import torch  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise AdapterError(
            "pyreft stores torch pickles, and torch is not installed; install it for this one conversion "
            "(pip install torch; its CPU build is enough)"
        ) from None
    if not Path(file).is_file():
        raise AdapterError(f"{file} does not exist; {_ADVICE}")
    try:
        state = torch.load(file, map_location="cpu", weights_only=True)
        tensors = {key: x for key, x in state.items() if isinstance(x, torch.Tensor) and x.is_floating_point()}
    except Exception as cause:  # torch raises errors of a dozen kinds for files it does not know
        raise AdapterError(
            f"{file} is not a torch state dict of plain tensors ({type(cause).__name__}) and was not run; {_ADVICE}"
        ) from None
    return {key: x.detach().float().numpy() for key, x in tensors.items()}
