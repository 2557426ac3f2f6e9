"""From the named tensors of a weight file to the parameter tree, and back, with every difference reported at once.

A file format is a *name table*: parameter name in our tree -> tensor name in the file, with ``{}`` for the layer.
Linears (and ``lm_head``) are stored ``[output, input]`` in every format that we read, the transpose of our ``[input,
output]``.
"""

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import numpy as np

from preft_jax.config import ModelConfig
from preft_jax.device.mesh import Placement
from preft_jax.errors import ModelError
from preft_jax.models.linear import Quantized
from preft_jax.models.modules import abstract_params
from preft_jax.models.params import AXES
from preft_jax.models.shard import shard_config
from preft_jax.quantize import Quantization
from preft_jax.shapes import LINEAR_SITES

MAX_DIFFERENCES = 8
"""How many differences an error shows before it says how many more there are."""

_TRANSPOSED = (*LINEAR_SITES, "lm_head")


@dataclasses.dataclass(frozen=True)
class Slot:
    """Where a tensor goes: ``path`` in the parameter tree, ``shape`` in the file, ``transposed`` on the way."""

    path: tuple[str | int, ...]
    shape: tuple[int, ...]
    transposed: bool


def tensor_slots(config: ModelConfig, table: Mapping[str, str]) -> dict[str, Slot]:
    """Return ``{tensor name: slot}`` for every parameter that a model of this config has."""

    def slot(path: tuple[str | int, ...], leaf: jax.ShapeDtypeStruct) -> Slot:
        transposed = path[-1] in _TRANSPOSED
        return Slot(path, leaf.shape[::-1] if transposed else leaf.shape, transposed)

    tree = abstract_params(config)
    layers = tree.pop("layers")
    slots = {table[name]: slot((name,), leaf) for name, leaf in tree.items()}
    for index, layer in enumerate(layers):
        for name, leaf in layer.items():
            slots[table[name].format(index)] = slot(("layers", index, name), leaf)
    return slots


def raise_differences(where: str, differences: Iterable[str], advice: str) -> None:
    """Raise ``ModelError`` with the first ``MAX_DIFFERENCES`` differences, if there are any."""
    found = list(differences)
    if not found:
        return
    shown = found[:MAX_DIFFERENCES]
    if len(found) > len(shown):
        shown.append(f"and {len(found) - len(shown)} more")
    raise ModelError(f"{where} does not hold the tensors of its config; {advice}:\n  " + "\n  ".join(shown))


def check_tensors(slots: Mapping[str, Slot], found: Mapping[str, tuple[int, ...]], where: str) -> None:
    """Compare the tensors a model needs with those a file has.

    Args:
        slots: what is needed, by tensor name.
        found: shape of each tensor of the file, tensors that are to be ignored left out.
        where: the file or directory, for the error.

    Raises:
        ModelError: naming missing and extra tensors and wrong shapes.
    """
    missing = [f"missing: {name} {list(slot.shape)}" for name, slot in slots.items() if name not in found]
    extra = [f"extra: {name} {list(shape)}" for name, shape in found.items() if name not in slots]
    wrong = [
        f"shape of {name}: {list(found[name])} in the file, {list(slot.shape)} by the config"
        for name, slot in slots.items()
        if name in found and tuple(found[name]) != slot.shape
    ]
    raise_differences(where, missing + extra + wrong, "get the config and the weights from the same model")


SCALE = "weight_scale"
"""Last part of the name of a weight's scales, in place of ``weight``."""


def scale_name(name: str) -> str:
    """Return the name of the scales of a weight that is in FP8."""
    return name.removesuffix("weight") + SCALE


def fp8_slots(slots: Mapping[str, Slot], names: Iterable[str], found: Mapping[str, tuple[int, ...]]) -> dict[str, Slot]:
    """Return the slots of the scales of weights in FP8.

    Args:
        slots: of the model.
        names: of the weights that are in FP8.
        found: shape of each tensor of the file: a scale for each output, or one for all.
    """
    made = {}
    for name in names:
        outputs, path = slots[name].shape[0], (*slots[name].path, SCALE)
        given = found.get(scale_name(name))
        allowed = ((outputs, 1), (outputs,), (1,), ())
        made[scale_name(name)] = Slot(path, given if given in allowed else (outputs, 1), False)
    return made


def read_fp8(read: Callable[[str], np.ndarray], name: str) -> Quantized:
    """Read a weight in FP8 with its scales, NumPy arrays."""
    w_FD, scale = read(name), read(scale_name(name)).astype(np.float32).reshape(-1)
    return Quantized(w_FD, np.broadcast_to(scale, w_FD.shape[:1]))


def build_params(
    config: ModelConfig,
    slots: Mapping[str, Slot],
    read: Callable[[str], np.ndarray | Quantized],
    dtype: Any,
    quantization: Quantization,
    placement: Placement,
) -> dict[str, Any]:
    """Read every slot's tensor and return the parameter tree in ``dtype``, on the default device or cut over several.

    One tensor at a time is on its way, so host memory holds little more than the finished tree, and one tensor beside
    devices with memory of their own, each of which gets its part alone. ``read`` returns an
    array that nothing else changes: on a CPU it may become the parameter without a copy. A weight in FP8 stays
    as it is, and others are quantised as they come.
    """
    shard_config(config, placement.tensor)
    params: dict[str, Any] = {"layers": [{} for _ in range(config.num_hidden_layers)]}
    for name, slot in slots.items():
        found = read(name)
        node: Any = params
        for step in slot.path[:-1]:
            node = node[step]
        axes = AXES[str(slot.path[-1])]
        if isinstance(found, Quantized):
            found = Quantized(placement.place(found.w_FD, axes[::-1]), placement.place(found.scale_F, axes[1:]))
        else:
            array = placement.place(found, axes[::-1] if slot.transposed else axes)
            found = (array.T if slot.transposed else array).astype(dtype)
        node[slot.path[-1]] = quantization.stored(slot.path, found, config.num_hidden_layers)
    return params


def tensors_of(params: Mapping[str, Any], slots: Mapping[str, Slot]) -> dict[str, np.ndarray]:
    """Return ``{tensor name: numpy array}`` of a parameter tree, transposed back and contiguous.

    Raises:
        ModelError: for a weight in FP8.
    """
    tensors = {}
    for name, slot in slots.items():
        node: Any = params
        for step in slot.path:
            node = node[step]
        if isinstance(node, Quantized):
            raise ModelError(f"{name} is in FP8, which is not written; give the model's unquantised weights")
        array = np.asarray(node)
        tensors[name] = np.ascontiguousarray(array.T if slot.transposed else array)
    return tensors
