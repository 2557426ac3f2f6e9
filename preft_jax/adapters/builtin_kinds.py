"""The kinds that are here: LoRA, DiReFT, LoReFT, learned prefixes, and ``edits``, whose parameters are the edit itself.

The table in ``adapters/adapter.py`` says what each computes. Functions take arrays of NumPy or JAX.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from preft_jax.adapters.kinds import register_kind
from preft_jax.errors import ConfigError
from preft_jax.shapes import LINEAR_SITES, PREFIX

if TYPE_CHECKING:
    from kernels.types import Array
    from preft_jax.adapters.config import AdapterConfig

    LeafShapes = Mapping[str, tuple[int, ...]]
    Leaves = Mapping[str, Array]


def _lora_shapes(config: AdapterConfig, d: int, f: int, rank: int) -> LeafShapes:
    return {"lora_a": (rank, d), "lora_b": (f, rank)}


def _lora_init(config: AdapterConfig, shapes: LeafShapes, rng: np.random.Generator) -> dict[str, np.ndarray]:
    bound = shapes["lora_a"][1] ** -0.5
    lora_a = rng.uniform(-bound, bound, shapes["lora_a"]).astype(np.float32)
    return {"lora_a": lora_a, "lora_b": np.zeros(shapes["lora_b"], np.float32)}


def _lora_fold(config: AdapterConfig, leaves: Leaves, scale: float) -> tuple[Array, None, Array]:
    return leaves["lora_a"].T, None, leaves["lora_b"].T * scale


def _reft_shapes(config: AdapterConfig, d: int, f: int, rank: int) -> LeafShapes:
    if config.rank > d:
        raise ConfigError(f"rank {config.rank} is larger than the model's hidden size {d}")
    return {"w": (rank, d), "b": (rank,), "r": (rank, d)}


def _reft_init(config: AdapterConfig, shapes: LeafShapes, rng: np.random.Generator) -> dict[str, np.ndarray]:
    groups = np.split(rng.standard_normal(shapes["r"]), config.groups)
    r_RD = np.concatenate([np.linalg.qr(group.T)[0].T for group in groups]).astype(np.float32)
    w_RD = r_RD.copy() if config.kind == "loreft" else np.zeros(shapes["w"], np.float32)
    return {"w": w_RD, "b": np.zeros(shapes["b"], np.float32), "r": r_RD}


def _direft_fold(config: AdapterConfig, leaves: Leaves, scale: float) -> tuple[Array, Array, Array]:
    r_RD = _orthonormal_groups(leaves["r"], config.groups) if config.orthonormal else leaves["r"]
    return leaves["w"].T, leaves["b"], r_RD


def _loreft_fold(config: AdapterConfig, leaves: Leaves, scale: float) -> tuple[Array, Array, Array]:
    r_RD = _orthonormal_groups(leaves["r"], config.groups)
    return (leaves["w"] - r_RD).T, leaves["b"], r_RD


def orthonormal_rows(r_RD: Array) -> Array:
    """Return Gram-Schmidt's orthonormal rows; rows that are orthonormal already stay as they are.

    Reduced QR of the transpose with the signs fixed so that the triangular factor's diagonal is positive.
    Differentiable.
    """
    xp = _namespace(r_RD)
    q_DR, upper_RR = xp.linalg.qr(r_RD.T)
    sign_R = xp.where(xp.diagonal(upper_RR) < 0, -1.0, 1.0)
    return (q_DR * sign_R[None, :]).T


def _orthonormal_groups(r_RD: Array, groups: int) -> Array:
    xp = _namespace(r_RD)
    return xp.concatenate([orthonormal_rows(part) for part in xp.split(r_RD, groups)])


def _namespace(array: Any) -> Any:
    return array.__array_namespace__()


def _edits_shapes(config: AdapterConfig, d: int, f: int, rank: int) -> LeafShapes:
    return {"a": (d, rank), "c": (rank,), "b": (rank, f)}


def _edits_init(config: AdapterConfig, shapes: LeafShapes, rng: np.random.Generator) -> dict[str, np.ndarray]:
    d, rank = shapes["a"]
    a_DR = (rng.standard_normal((d, rank)) * d**-0.5).astype(np.float32)
    return {"a": a_DR, "c": np.zeros(rank, np.float32), "b": np.zeros(shapes["b"], np.float32)}


def _edits_fold(config: AdapterConfig, leaves: Leaves, scale: float) -> tuple[Array, Array, Array]:
    return leaves["a"], leaves["c"], leaves["b"]


def _prefix_shapes(config: AdapterConfig, d: int, f: int, rank: int) -> LeafShapes:
    return {"k": (rank, d), "v": (rank, f)}


def _prefix_init(config: AdapterConfig, shapes: LeafShapes, rng: np.random.Generator) -> dict[str, np.ndarray]:
    return {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


def _prefix_fold(config: AdapterConfig, leaves: Leaves, scale: float) -> tuple[Array, Array, Array]:
    xp = _namespace(leaves["k"])
    return leaves["k"].T, xp.ones(leaves["k"].shape[0], leaves["k"].dtype), leaves["v"]


BLOCK = ("block",)

register_kind("lora", _lora_shapes, _lora_init, _lora_fold, sites=LINEAR_SITES, ranked=True, scaled=True)
register_kind("direft", _reft_shapes, _reft_init, _direft_fold, sites=BLOCK, ranked=False, grouped=True)
register_kind("loreft", _reft_shapes, _reft_init, _loreft_fold, sites=BLOCK, ranked=False, grouped=True)
register_kind("prefix", _prefix_shapes, _prefix_init, _prefix_fold, sites=(PREFIX,), ranked=False)
register_kind("edits", _edits_shapes, _edits_init, _edits_fold, ranked=True)
