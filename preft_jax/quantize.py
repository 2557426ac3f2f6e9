"""Which weights of a model are in FP8, and making them so: every linear of the layers, each output with its own scale.

Embeddings, norms, biases and the output head stay as they are, and so do whole layers that are asked for, such as the
first and the last. Activations are rounded where a weight in FP8 is used, ``models/linear.py``.
"""

import dataclasses
from collections.abc import Iterable
from typing import Any

import jax

from preft_jax.errors import ConfigError, did_you_mean
from preft_jax.models.linear import JOINED, Quantized, Weight, quantized
from preft_jax.models.params import Params
from preft_jax.shapes import LINEAR_SITES

SCHEMES = ("none", "fp8")
"""``fp8``: weights in e4m3 with a float32 scale for each output, activations in e4m3 with one for each token."""

_LINEARS = (*LINEAR_SITES, *JOINED.values())
_quantized = jax.jit(quantized)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Quantization:
    """How a model's weights are quantised.

    Attributes:
        scheme: one of ``SCHEMES``.
        keep_layers: layers whose weights stay as they are; a negative number counts from the end.
    """

    scheme: str = "none"
    keep_layers: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.scheme not in SCHEMES:
            raise ConfigError(
                f"quantization {self.scheme!r} is not supported{did_you_mean(str(self.scheme), SCHEMES)}; "
                f"allowed: {', '.join(SCHEMES)}"
            )
        if self.keep_layers and self.scheme == "none":
            raise ConfigError("keep_layers is given and quantization is 'none', which keeps all; give 'fp8' too")

    def kept(self, num_layers: int) -> frozenset[int]:
        """Return the numbers of the layers that stay as they are, counted from 0.

        Raises:
            ConfigError: for a layer that there is not.
        """
        for layer in self.keep_layers:
            if not -num_layers <= layer < num_layers:
                raise ConfigError(
                    f"keep_layers has {layer}, and the model has {num_layers} layers; give {-num_layers} to "
                    f"{num_layers - 1}"
                )
        return frozenset(layer % num_layers for layer in self.keep_layers)

    def stored(self, path: tuple[str | int, ...], weight: Weight, num_layers: int) -> Weight:
        """Return a weight as a model has it, which is given up if it is quantised.

        Args:
            path: of the weight in the parameter tree, such as ``("layers", 3, "down")``.
            weight: in any layout, in FP8 too.
            num_layers: of the model.

        Raises:
            ConfigError: it is to be kept and was in FP8 when it was read.
        """
        if self.scheme == "none" or path[0] != "layers" or path[-1] not in _LINEARS:
            return weight
        if path[1] not in self.kept(num_layers):
            return quantize_weight(weight, consume=True)
        if isinstance(weight, Quantized):
            raise ConfigError(f"keep_layers has layer {path[1]}, which the checkpoint has in FP8; leave it out")
        return weight

    def name(self, num_layers: int) -> str:
        """Return the scheme and the layers that it leaves out, the same for all ways to say them."""
        kept = sorted(self.kept(num_layers))
        return self.scheme + (f", layers {','.join(map(str, kept))} kept" if kept else "")


PLAIN = Quantization()
"""Nothing is quantised."""


def quantize_weight(weight: Weight, *, consume: bool = False) -> Quantized:
    """Return a linear's weight in FP8, which it may be already.

    Args:
        weight: in any layout.
        consume: delete the weight that is given once it is quantised.
    """
    if isinstance(weight, Quantized):
        return weight
    made = _quantized(weight)
    if consume:
        jax.block_until_ready(made)
        for leaf in jax.tree.leaves(weight):
            leaf.delete()
    return made


def quantize(params: Params, keep_layers: Iterable[int] = (), *, consume: bool = False) -> Params:
    """Return parameters in any layout with the linears of their layers in FP8.

    Args:
        params: the tree.
        keep_layers: layers that stay as they are; a negative number counts from the end.
        consume: delete each weight once it is quantised, so that the model is never in memory twice. ``params`` cannot
            be used afterwards.

    Raises:
        ConfigError: for a layer that there is not.
    """
    kept = Quantization(scheme="fp8", keep_layers=tuple(keep_layers)).kept(len(params["layers"]))

    def one(layer: Params) -> Params:
        return {
            name: quantize_weight(value, consume=consume) if name in _LINEARS else value
            for name, value in layer.items()
        }

    layers = [layer if i in kept else one(layer) for i, layer in enumerate(params["layers"])]
    return {**params, "layers": layers}


def is_quantized(params: Any) -> bool:
    """Return whether any weight is in FP8."""
    leaves = jax.tree.leaves(params, is_leaf=lambda node: isinstance(node, Quantized))
    return any(isinstance(leaf, Quantized) for leaf in leaves)
