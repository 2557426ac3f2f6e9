"""How a micro-batch is cut into units (``train/window.py``)."""

import dataclasses
from typing import Literal

import jax

from preft_jax.config import ModelConfig
from preft_jax.errors import ConfigError

Order = Literal["layers", "windows"]

_LEAST = 64
"""Tokens that a window has in each of several rows, unless it has fewer in one: products of less are no quicker."""

_UNIT_PARAMS = 0.9e9
"""Four layers of ``llama3-8b``: some 4 ms forward and 7 ms backward for 1,024 tokens on an H200."""

_MOST_LAYERS = 8
"""Of a unit: the host starts some 70 kernels for each."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class WindowOptions:
    """How a micro-batch is cut into units.

    Attributes:
        tokens: of a window, over all rows: see ``in_a_row``.
        layers: of a unit; what the first of them reads is kept.
        order: which the backward pass goes through first. ``layers``: some layers on all windows, then those below;
            cotangents of the whole stream and of the keys and values of these layers are held. ``windows``: a window
            through all layers, then the one before it; cotangents of one window's stream and of all layers' keys and
            values are held, which is more where there are many layers, and ends windows early.
        remat: what backward units compute again. ``full``: all between what a unit's layers read and what they give.
            ``cheap``: norms, rotations, attention and activations, but no product with a weight: a third less to
            compute, and much more to keep (``Windowed.kept_bytes``).
    """

    tokens: int = 512
    layers: int = 1
    order: Order = "layers"
    remat: Literal["cheap", "full"] = "full"

    def __post_init__(self) -> None:
        for name in ("tokens", "layers"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise ConfigError(f"{name} of a window is {value!r}; give an integer of at least 1")
        if self.order not in ("layers", "windows"):
            raise ConfigError(f"the order of windows is {self.order!r}; allowed: layers, windows")
        if self.remat not in ("cheap", "full"):
            raise ConfigError(f"remat of windows is {self.remat!r}; allowed: cheap, full")

    def in_a_row(self, rows: int) -> int:
        """Return the tokens of a window in each of so many rows.

        Rows share a window's tokens, so that a unit takes about as long whatever the rows; each has at least 64.
        """
        if rows == 1:
            return self.tokens
        share = max(1, self.tokens // rows)
        return min(self.tokens, max(_LEAST, 1 << share.bit_length() - 1))

    @classmethod
    def suited(cls, config: ModelConfig) -> "WindowOptions":
        """Return how training of a model is cut beside requests.

        An accelerator needs some milliseconds a unit, or the host cannot keep up: a unit has 1,024 tokens, and layers
        of about ``_UNIT_PARAMS`` weights, few enough for the host. On a CPU one layer takes that long with 512.
        """
        if jax.default_backend() == "cpu":
            return cls()
        each = config.hidden_size * (config.q_size + 2 * config.kv_size + config.q_size + 3 * config.intermediate_size)
        return cls(tokens=1024, layers=min(max(1, round(_UNIT_PARAMS / each)), _MOST_LAYERS, config.num_hidden_layers))
