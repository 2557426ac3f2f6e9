"""Rotary settings: the scaling of frequencies, and how a ``config.json`` says it.

A ``config.json`` has three places for one setting: ``rope_theta`` beside the other fields, ``rope_scaling`` (older) and
``rope_parameters`` (newer). They are read as transformers 5 reads them, which the tests hold against it; what it would
read in a way that can hardly be meant is refused.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from preft_jax.errors import ConfigError, did_you_mean, shown

DEFAULT_THETA = 10_000.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class LinearRope:
    """Positions divided by ``factor`` (``rope_type: linear``; Chen et al., arXiv 2306.15595)."""

    factor: float

    def __post_init__(self) -> None:
        _check_factor(self.factor)

    def scaled(self, inv_freq: np.ndarray) -> np.ndarray:
        """Return the frequencies ``[C / 2]`` that are rotated by."""
        return inv_freq / np.float32(self.factor)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Llama3Rope:
    """Wavelengths beyond the original context divided by ``factor``, blended in between (``rope_type: llama3``)."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int

    def __post_init__(self) -> None:
        _check_factor(self.factor)
        if not 0.0 < self.low_freq_factor < self.high_freq_factor:
            raise ConfigError(
                f"rope_scaling has low_freq_factor {self.low_freq_factor} and high_freq_factor "
                f"{self.high_freq_factor}; both must be positive and the first smaller than the second"
            )

    def scaled(self, inv_freq: np.ndarray) -> np.ndarray:
        """Return the frequencies ``[C / 2]`` that are rotated by."""
        wavelength = 2 * math.pi / inv_freq
        low, high = self.low_freq_factor, self.high_freq_factor
        smooth = np.clip((self.original_max_position_embeddings / wavelength - low) / (high - low), 0.0, 1.0)
        return (1 - smooth) * inv_freq / self.factor + smooth * inv_freq


RopeScaling = LinearRope | Llama3Rope

_TYPES: Mapping[str, Any] = {"linear": LinearRope, "llama3": Llama3Rope}
"""``rope_type`` -> what it is read as; ``default`` scales nothing."""

_WITHOUT_EFFECT = ("original_max_position_embeddings",)
"""Fields that the types without them do not use."""


def _check_factor(factor: float) -> None:
    if not 1.0 <= factor < math.inf:
        raise ConfigError(f"rope_scaling.factor is {factor}; it must be at least 1, and finite")


def rope_from_hf(hf: Mapping[str, Any]) -> tuple[float, RopeScaling | None]:
    """Return theta and scaling of a ``config.json``.

    Raises:
        ConfigError: for a type or a field that is not computed, or places that contradict each other.
    """
    place = "rope_scaling" if hf.get("rope_scaling") else "rope_parameters"
    rope = hf.get(place) or {}
    if not isinstance(rope, Mapping):
        raise ConfigError(f"{place} is {shown(rope)}; give an object, or null")
    rope = {name: value for name, value in rope.items() if value is not None or name in ("rope_type", "type")}
    theta = _theta(hf, place, rope)
    kinds = [rope.pop(name) for name in ("rope_type", "type") if name in rope] or ["default"]
    if len(set(map(str, kinds))) > 1:
        raise ConfigError(f"{place} has rope_type {shown(kinds[0])} and type {shown(kinds[1])}; correct one of them")
    kind = kinds[0]
    if kind != "default" and (not isinstance(kind, str) or kind not in _TYPES):
        raise ConfigError(f"{place} of type {shown(kind)} is not supported; allowed: 'default', 'linear', 'llama3'")
    return theta, _scaling(kind, _without_partial(hf, place, rope), hf.get("original_max_position_embeddings"), place)


def _theta(hf: Mapping[str, Any], place: str, rope: dict[str, Any]) -> float:
    """Take theta out of the settings that count; as in transformers, it wins over the one beside them."""
    other = hf.get("rope_parameters") or {}
    if place == "rope_scaling" and "rope_theta" not in rope and hf.get("rope_theta") is None and other:
        dropped = other.get("rope_theta", DEFAULT_THETA) if isinstance(other, Mapping) else None
        if dropped != DEFAULT_THETA:
            raise ConfigError(
                f"rope_theta is {shown(dropped)} in rope_parameters, but rope_scaling counts, which has none; write "
                "rope_theta into rope_scaling, or remove one of the two objects"
            )
    theta = rope.pop("rope_theta", None)
    theta = hf.get("rope_theta") if theta is None else theta
    theta = DEFAULT_THETA if theta is None else theta
    if isinstance(theta, bool) or not isinstance(theta, int | float) or not 0.0 < theta < math.inf:
        raise ConfigError(f"rope_theta is {shown(theta)}; give a positive number")
    return float(theta)


def _without_partial(hf: Mapping[str, Any], place: str, rope: dict[str, Any]) -> dict[str, Any]:
    """Return the settings without the part of a head that is rotated, which must be all of it."""
    partial = rope.pop("partial_rotary_factor", None)
    for where, value in ((f"{place}.", partial), ("", hf.get("partial_rotary_factor"))):
        if value not in (None, 1.0):
            raise ConfigError(
                f"{where}partial_rotary_factor {shown(value)} is not supported; only models that rotate whole heads are"
            )
    return rope


def _scaling(kind: str, rope: dict[str, Any], beside: Any, place: str) -> RopeScaling | None:
    """Return the scaling of a known type; ``beside`` is the original length that stands beside the settings."""
    wanted = [field.name for field in dataclasses.fields(_TYPES[kind])] if kind in _TYPES else []
    unknown = [name for name in rope if name not in (*wanted, *_WITHOUT_EFFECT)]
    if unknown:
        raise ConfigError(
            f"{place} of type {kind!r} has {unknown[0]!r} {shown(rope[unknown[0]])}, which this type does not use"
            f"{did_you_mean(unknown[0], wanted)}; remove it, or give the type that it belongs to"
        )
    if beside is not None and "original_max_position_embeddings" in wanted:
        inside = rope.setdefault("original_max_position_embeddings", beside)
        if inside != beside:
            raise ConfigError(
                f"original_max_position_embeddings is {shown(inside)} in {place} and {shown(beside)} beside it; "
                "correct one of them"
            )
    values = {}
    for name in wanted:
        value = rope.get(name)
        if value is None:
            raise ConfigError(f"{place} of type {kind!r} lacks {name!r}")
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ConfigError(f"{place}.{name} is {shown(value)}; give a number")
        values[name] = int(value) if name == "original_max_position_embeddings" else float(value)
    made = _TYPES[kind](**values) if wanted else None
    return None if isinstance(made, LinearRope) and made.factor == 1.0 else made


def rope_to_hf(scaling: RopeScaling) -> dict[str, Any]:
    """Return the ``rope_scaling`` that ``rope_from_hf`` reads back."""
    kind = next(name for name, made in _TYPES.items() if isinstance(scaling, made))
    return {"rope_type": kind, **dataclasses.asdict(scaling)}
