"""What the TPU kernels share: VMEM budgets, matmul precision, and running them without a TPU."""

import contextlib
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu

from kernels import dispatch
from kernels.tpu_tiles import LANES as LANES
from kernels.tpu_tiles import SUBLANES as SUBLANES
from kernels.types import Unsupported

_interpreting = jax.make_user_context(default_value=False)

VMEM_BUDGET_BYTES = 12 * 2**20
"""What the blocks of a kernel are chosen to take; the rest is left to the compiler's temporaries."""
SMEM_BUDGET_BYTES = 256 * 2**10
"""What page lists, which live in scalar memory, may take."""
DTYPES = (jnp.bfloat16, jnp.float32)


@contextlib.contextmanager
def interpret(params: pltpu.InterpretParams) -> Iterator[None]:
    """Run the TPU kernels that are traced inside this context in Pallas' TPU interpreter, on any backend."""
    with pltpu.force_tpu_interpret_mode(params), _interpreting(True):
        yield


def check_available() -> None:
    """Raise ``Unsupported`` unless there is a TPU, or one to trace for, or the interpreter."""
    traced_for = dispatch.chosen("paged_attention") == "pallas_tpu"
    if not (traced_for or _interpreting.value or jax.default_backend() == "tpu"):
        raise Unsupported(f"implementation 'pallas_tpu' needs a TPU; the default backend is {jax.default_backend()!r}")


def check_dtype(name: str, dtype: Any) -> None:
    """Raise ``Unsupported`` unless ``dtype`` is one that the kernels compute with."""
    if dtype not in DTYPES:
        raise Unsupported(f"{name} has dtype {jnp.dtype(dtype).name}; the TPU kernels take bfloat16 and float32")


def round_up(n: int, multiple: int) -> int:
    """Return the smallest multiple of ``multiple`` that is at least ``n``."""
    return -(-n // multiple) * multiple


def tiled_bytes(shape: tuple[int, ...], dtype: Any) -> int:
    """Return the bytes that an array takes in VMEM, where the last two axes are padded to whole tiles."""
    *major, rows, lanes = (1, *shape)
    size = jnp.dtype(dtype).itemsize
    total = round_up(rows, SUBLANES * 4 // size) * round_up(lanes, LANES) * size
    for n in major:
        total *= n
    return total


def width_blocks(width: int) -> list[int]:
    """Return the block sizes that cut an axis of lanes into equal parts, largest first.

    A width that is not a multiple of 128 (SmolLM2's 576) stays whole.
    """
    if width % LANES:
        return [width]
    units = width // LANES
    return [width // n for n in range(1, units + 1) if units % n == 0]


def dot(a: jax.Array, b: jax.Array, contract: tuple[int, int]) -> jax.Array:
    """Return ``a`` times ``b`` over one axis of each, accumulated in float32; float32 operands are not rounded."""
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else jax.lax.Precision.DEFAULT
    numbers = (((contract[0],), (contract[1],)), ((), ()))
    return jax.lax.dot_general(a, b, numbers, precision=precision, preferred_element_type=jnp.float32)
