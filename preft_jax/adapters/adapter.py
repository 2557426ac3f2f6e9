"""Adapters: their configuration, their trainable parameters, and the fold to low-rank edits.

Every adapter kind becomes the same operation at some site of a layer, a *low-rank edit*

    y += m * ((x @ A + c) @ B)          A: [D, R]   c: [R]   B: [R, F]   m: 0/1 per token

so that kernels, the device bank and the training step know edits and nothing else:

=========  =========================================  =============  ====  =======================
kind       site                                       A              c     B
=========  =========================================  =============  ====  =======================
``lora``   a linear: q k v o gate up down             lora_aᵀ        0     lora_bᵀ · scale
``direft`` ``block``, the residual stream             wᵀ             b     r
``loreft`` ``block``                                  wᵀ - rᵀ        b     r
``edits``  any                                        a              c     b
``prefix`` ``prefix``: learned positions, see below   kᵀ             1     v
=========  =========================================  =============  ====  =======================

A prefix is no sum: its R positions stand in front of the prompt, and every token sees their keys A and values B beside
those of the tokens before it (``PrefixKV``). ``c`` says which positions there are: 1, and 0 in a rank page's padding.

LoRA: Hu et al., arXiv 2106.09685, ``scale = alpha / rank``; rsLoRA: Kalajdzievski, arXiv 2312.03732, ``alpha /
    sqrt(rank)``.
Prefix: Li and Liang, arXiv 2101.00190, without their reparametrisation.
LoReFT and DiReFT: Wu et al., arXiv 2404.03592, equations 2 and 3. The rows of ``r`` are orthonormal for LoReFT and, if
``orthonormal`` is set, for DiReFT; the stored ``r`` is free and the fold orthonormalises it.
"""

import dataclasses
import functools
from typing import Any

import jax
import numpy as np

from preft_jax.adapters.config import AdapterConfig, adapter_shapes
from preft_jax.adapters.digest import digest_of_fold
from preft_jax.adapters.fold import fold_on_host, fold_params
from preft_jax.config import ModelConfig
from preft_jax.errors import AdapterError, check_type


@functools.partial(jax.tree_util.register_dataclass, data_fields=["params"], meta_fields=["config"])
@dataclasses.dataclass(frozen=True, eq=False)
class Adapter:
    """An adapter: configuration and trainable parameters. A pytree: ``params`` are its leaves, ``config`` is static.

    ``params`` is ``{"layers": [{site: leaves}]}`` with one dict for each layer of the base model, empty where nothing
    is edited. Leaves are float32: ``lora_a [R, D]`` and ``lora_b [F, R]`` for LoRA (PEFT's layout); ``w [R, D]``, ``b
    [R]`` and ``r [R, D]`` for ReFT, where without shared weights the two groups' rows follow one another on the rank
    axis. A prefix has ``k`` and ``v [m, K * C]``: keys as attention sees them, rotated to positions 0 to m - 1, and
    values.
    """

    config: AdapterConfig
    params: Any

    def __repr__(self) -> str:
        config = self.config
        where = "all layers" if config.layers is None else f"{len(config.layers)} layers"
        at = f"{','.join(config.targets)} of {where}"
        return f"Adapter({config.kind!r}, rank {config.rank}, {at}, {config.positions!r})"

    @functools.cached_property
    def digest(self) -> str:
        """SHA-256 (hex) of what the adapter computes: folded tensors, kind, positions and turn rule."""
        return digest_of_fold(self.config, fold_on_host(self.config, self.params))


def fold(adapter: Adapter) -> dict[str, Any]:
    """Return ``{"layers": [{site: LowRankEdit}]}``; sites that are not edited are absent.

    Raises:
        AdapterError: if it is no adapter.
    """
    check_type("adapter", adapter, Adapter, "an Adapter, or its config and params to fold_params", AdapterError)
    return fold_params(adapter.config, adapter.params)


def check_fits(adapter: Adapter, model: ModelConfig) -> None:
    """Raise ``AdapterError`` listing every leaf that is missing, extra or of the wrong shape for ``model``."""
    expected = _flat_shapes(adapter_shapes(adapter.config, model))
    given = {name: np.shape(leaf) for name, leaf in _flat_leaves(adapter.params)}
    problems = [f"missing {name} {list(shape)}" for name, shape in expected.items() if name not in given]
    problems += [f"extra {name} {list(shape)}" for name, shape in given.items() if name not in expected]
    problems += [
        f"{name} has shape {list(given[name])}, expected {list(shape)}"
        for name, shape in expected.items()
        if name in given and given[name] != shape
    ]
    if problems:
        more = f" and {len(problems) - 8} more" if len(problems) > 8 else ""
        raise AdapterError("the adapter does not fit the base model: " + "; ".join(problems[:8]) + more)


def _flat_shapes(shapes: Any) -> dict[str, tuple[int, ...]]:
    return {
        f"layers.{i}.{site}.{leaf}": shape
        for i, sites in enumerate(shapes["layers"])
        for site, leaves in sites.items()
        for leaf, shape in leaves.items()
    }


def _flat_leaves(params: Any) -> list[tuple[str, Any]]:
    return [
        (f"layers.{i}.{site}.{leaf}", value)
        for i, sites in enumerate(params["layers"])
        for site, leaves in sites.items()
        for leaf, value in leaves.items()
    ]
