"""Whether a file holds the tensors of its config: every difference is named."""

from collections.abc import Mapping
from typing import Protocol

import numpy as np

from preft_jax.errors import AdapterError, plain

_MAX_DIFFERENCES = 8
_FLOATS = ("float32", "float16", "bfloat16")

Shape = tuple[int | None, ...]
"""Expected shape; ``None`` is a width that only a base model decides."""


class _Described(Protocol):
    """An array, or what a header says of one."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def dtype(self) -> np.dtype: ...


def check_tensors(where: str, expected: Mapping[str, Shape], given: Mapping[str, _Described]) -> None:
    """Raise ``AdapterError`` with the differences between the tensors expected and given."""
    problems = [f"missing {name} {_show(shape)}" for name, shape in expected.items() if name not in given]
    problems += [
        f"extra {plain(name)} {_show(x.shape)}{_why(name)}" for name, x in given.items() if name not in expected
    ]
    problems += [
        f"{name} has shape {_show(given[name].shape)}, expected {_show(shape)}"
        for name, shape in expected.items()
        if name in given and not _same_shape(given[name].shape, shape)
    ]
    problems += [
        f"{plain(name)} has dtype {x.dtype}, allowed: {', '.join(_FLOATS)}"
        for name, x in given.items()
        if x.dtype.name not in _FLOATS
    ]
    _refuse(where, problems)


def check_finite(where: str, arrays: Mapping[str, np.ndarray]) -> None:
    """Raise ``AdapterError`` if an array of one of ``_FLOATS`` holds NaN or infinity."""
    counts = {name: int(np.sum(~np.isfinite(x.astype(np.float32)))) for name, x in arrays.items()}
    _refuse(where, [f"{name} has {count} values that are not finite" for name, count in counts.items() if count])


def _refuse(where: str, problems: list[str]) -> None:
    if problems:
        more = f"; and {len(problems) - _MAX_DIFFERENCES} more" if len(problems) > _MAX_DIFFERENCES else ""
        raise AdapterError(
            f"{where} does not hold the tensors of its config: " + "; ".join(problems[:_MAX_DIFFERENCES]) + more
        )


def _show(shape: tuple[int | None, ...]) -> str:
    return "[" + ", ".join("*" if size is None else str(size) for size in shape) + "]"


def _same_shape(shape: tuple[int, ...], expected: Shape) -> bool:
    return len(shape) == len(expected) and all(e in (None, s) for s, e in zip(shape, expected, strict=True))


def _why(name: str) -> str:
    """Explain an unexpected tensor whose name tells the feature it belongs to."""
    for part, reason in (
        ("lora_embedding", "embeddings cannot be edited"),
        ("embed_tokens", "embeddings cannot be edited or replaced"),
        ("lm_head", "lm_head cannot be edited or replaced"),
        ("modules_to_save", "modules_to_save is not supported"),
        ("lora_magnitude", "use_dora is not supported"),
        ("bias", "biases cannot be edited"),
    ):
        if part in name:
            return f" ({reason})"
    return ""
