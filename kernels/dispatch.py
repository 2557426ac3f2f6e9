"""Which implementation of an operation runs.

``implementation=None`` takes the first of the backend's preferences that supports these shapes, and logs what it passes
over (logger ``preft.kernels``); a name takes that one or raises ``NotImplementedError`` with the reason. ``preferring``
puts another first, for tracing a program for a device that is not the default backend.
"""

import contextlib
import functools
import importlib
import logging
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import jax

from kernels.types import Unsupported

_log = logging.getLogger("preft.kernels")

MODULES = {"xla": "kernels.xla", "pallas_tpu": "kernels.pallas_tpu", "triton": "kernels.triton"}
"""Implementation name to the module that holds its operations."""

_NEEDS = {
    "xla": "it needs JAX",
    "pallas_tpu": "it needs a TPU and `pip install preft-jax[tpu]`",
    "triton": "it needs an NVIDIA GPU and `pip install preft-jax[gpu]`",
}

OFFERED: Mapping[str, tuple[str, ...]] = {
    "shrink": ("xla", "triton", "pallas_tpu"),
    "expand": ("xla", "triton", "pallas_tpu"),
    "shrink_backward": ("xla", "triton"),
    "expand_backward": ("xla", "triton"),
    "norm_shrink": ("xla", "triton"),
    "rope_kv": ("xla", "triton"),
    "silu_mul_shrink": ("xla", "triton"),
    "decode_edit": ("xla", "triton", "pallas_tpu"),
    "paged_attention": ("xla", "triton", "pallas_tpu"),
    "decode_attention": ("xla", "triton"),
    "quantize": ("xla", "triton"),
    "draw": ("xla", "triton"),
    "write_pages": ("xla", "triton"),
}
"""The implementations of each operation."""

_PREFERRED = {"gpu": ("triton", "xla"), "tpu": ("pallas_tpu", "xla")}
_preference = jax.make_user_context(default_value=None)


@contextlib.contextmanager
def preferring(name: str) -> Iterator[None]:
    """Try implementation ``name`` first, then ``xla``, in what is traced inside: the default backend does not count.

    An explicit ``implementation`` still wins. The preference is part of jit's cache key.
    """
    if name not in MODULES:
        raise ValueError(f"there is no implementation {name!r}; allowed: {', '.join(MODULES)}")
    with _preference(name):
        yield


def load(name: str, op: str) -> Any:
    """Return function ``op`` of an implementation.

    Raises:
        NotImplementedError: there is none of that name, its packages are not installed, or it cannot run here.
    """
    names = OFFERED[op]
    if name not in names:
        raise NotImplementedError(f"{op} has no implementation {name!r}; available: {', '.join(names)}")
    try:
        module = importlib.import_module(MODULES[name])
    except ImportError as error:
        raise Unsupported(f"{op}: implementation {name!r} cannot be imported: {error}; {_NEEDS[name]}") from error
    getattr(module, "check_available", lambda: None)()
    return getattr(module, op)


@functools.cache
def _warn_once(reason: str) -> None:
    """Say that this device could do better: what is missing is a package, not support for these shapes."""
    warnings.warn(f"{reason}; running plain JAX instead", stacklevel=4)


@functools.cache
def _tell_once(op: str, name: str, reason: str) -> None:
    """Log that an operation of a program loses its kernel: these shapes are not supported."""
    _log.warning("%s runs in plain JAX, not by its %s kernel: %s", op, name, reason)


def run(op: str, implementation: str | None, *args: Any, **options: Any) -> Any:
    """Run ``op`` with the implementation asked for, or with the best that supports the arguments."""
    if implementation is not None:
        return load(implementation, op)(*args, **options)
    preference = _preference.value
    for name in _PREFERRED.get(jax.default_backend(), ()) if preference is None else (preference,):
        if name in OFFERED[op] and name != "xla":
            try:
                return load(name, op)(*args, **options)
            except Unsupported as error:
                if isinstance(error.__cause__, ImportError):
                    _warn_once(str(error))
                else:
                    _tell_once(op, name, str(error))
    return load("xla", op)(*args, **options)


def chosen(op: str) -> str:
    """Return the implementation that ``run`` tries first for ``op`` when none is named."""
    preference = _preference.value
    names = _PREFERRED.get(jax.default_backend(), ("xla",)) if preference is None else (preference,)
    return next((name for name in names if name in OFFERED[op]), "xla")
