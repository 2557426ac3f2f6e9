"""Kernels in Triton's interpreter: slow, on a CPU, but the same source as on a GPU.

With ``TRITON_INTERPRET=1`` in the environment before ``triton`` is imported, ``triton.jit`` makes interpreted kernels,
and ``kernels.triton`` runs them through a host callback. Outputs start out as NaN, so that what a kernel leaves
unwritten shows.
"""

import os
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from triton.runtime import interpreter  # pyright: ignore[reportMissingImports]


def is_on() -> bool:
    """Return whether kernels are interpreted in this process."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def interpreted(kernel: Any) -> bool:
    """Return whether ``triton.jit`` made an interpreted function of a kernel."""
    return isinstance(kernel, interpreter.InterpretedFunction)


class _Pointer:
    """What the interpreter asks of a tensor."""

    def __init__(self, array: np.ndarray):
        self.dtype = array.dtype
        self._address = array.ctypes.data

    def data_ptr(self) -> int:
        return self._address


class _Executor(interpreter.GridExecutor):
    """Runs a kernel on host memory as it is; the base class copies torch tensors to it and back."""

    def _init_args_hst(self, args_dev: Any, kwargs: Any) -> tuple[Any, Any]:
        return args_dev, kwargs

    def _restore_args_dev(self, args_dev: Any, args_hst: Any, kwargs: Any, kwargs_hst: Any) -> None:
        pass


def _as_float32(data: np.ndarray, dtype: Any) -> np.ndarray:
    """Return numbers that the interpreter holds as the bits of bfloat16."""
    return (data.astype(np.uint32) << 16).view(np.float32) if dtype.scalar.is_bf16() else data


def _dot(self: Any, a: Any, b: Any, d: Any, input_precision: Any, max_num_imprecise_acc: Any) -> Any:
    """Multiply as the interpreter does, but bfloat16 too: its own ``create_dot`` multiplies the bits as integers."""
    del self, input_precision, max_num_imprecise_acc
    product = np.matmul(_as_float32(a.data, a.dtype), _as_float32(b.data, b.dtype), dtype=d.data.dtype)
    return interpreter.TensorHandle(product + d.data, d.dtype.scalar)


_ROUNDED = {"bf16": (ml_dtypes.bfloat16, np.uint16), "fp8e4nv": (ml_dtypes.float8_e4m3fn, np.uint8)}
"""How the interpreter holds the dtypes that it would not round to the nearest number."""


def _rounding(convert: Any) -> Any:
    """Return a conversion of the interpreter's that rounds to the nearest number, as GPUs do; FP8 has a largest one."""

    def rounded(self: Any, src: Any, dst_type: Any, *mode: Any) -> Any:
        floats = src.dtype.scalar.is_fp32() or (src.dtype.scalar.is_bf16() and dst_type.scalar.is_fp8())
        found = _ROUNDED.get(dst_type.scalar.name) if floats else None
        if found is None:
            return convert(self, src, dst_type, *mode)
        dtype, bits = found
        data = _as_float32(src.data, src.dtype)
        if dst_type.scalar.is_fp8():
            data = np.clip(data, -448, 448)
        return interpreter.TensorHandle(data.astype(dtype).view(bits), dst_type.scalar)

    return rounded


_patch_tensor = interpreter._patch_lang_tensor


def _patch_index(tensor: Any, scope: Any) -> None:
    """Let scalars bound loops: the interpreter has them as arrays of one element, which NumPy 2.5 does not convert."""
    _patch_tensor(tensor, scope)
    scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))


interpreter._patch_lang_tensor = _patch_index
interpreter.InterpreterBuilder.create_dot = _dot
interpreter.InterpreterBuilder.create_fp_to_fp = _rounding(interpreter.InterpreterBuilder.create_fp_to_fp)
interpreter.InterpreterBuilder.cast_impl = _rounding(interpreter.InterpreterBuilder.cast_impl)


def _nothing(dtype: Any) -> Any:
    """Return what an output holds before a kernel writes it."""
    return np.nan if jnp.issubdtype(dtype, jnp.floating) else np.iinfo(dtype).min


def call(
    kernel: Any,
    *args: Any,
    out: Sequence[jax.ShapeDtypeStruct],
    grid: tuple[int, ...],
    aliases: dict[int, int] | None,
    **static: Any,
) -> list[jax.Array]:
    """Run an interpreted kernel; the arguments are those of ``kernels.triton.call.call``."""
    sources = {output: argument for argument, output in (aliases or {}).items()}

    def run(*arrays: Any) -> list[np.ndarray]:
        inputs = [np.array(array) for array in arrays]
        outputs = [
            inputs[sources[i]].copy() if i in sources else np.full(leaf.shape, _nothing(leaf.dtype), leaf.dtype)
            for i, leaf in enumerate(out)
        ]
        executor = _Executor(kernel.rewrite(), kernel.arg_names, grid)
        with np.errstate(all="ignore"):
            executor(*map(_Pointer, [*inputs, *outputs]), **static)
        return outputs

    shapes = [jax.ShapeDtypeStruct(leaf.shape, jnp.dtype(leaf.dtype)) for leaf in out]
    return jax.pure_callback(run, shapes, *args, vmap_method="sequential")
