"""Run a TPU kernel in Pallas' TPU interpreter, and compare what it gives."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax._src.pallas.mosaic.interpret import interpret_pallas_call
from jax.experimental.pallas import tpu as pltpu

from kernels import pallas_tpu

PARAMS = pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan")
TOLERANCE = {"float32": 2e-5, "bfloat16": 2e-2}


def interpreted(function, *args, **options):
    """Call a kernel in the interpreter; a race is an error."""
    with pallas_tpu.interpret(PARAMS):
        out = jax.block_until_ready(jax.jit(functools.partial(function, **options))(*args))
    races = interpret_pallas_call.races
    assert races is not None, "the kernel did not run in the interpreter"
    assert not races.races_found, "the kernel has a data race"
    return jax.tree.map(np.asarray, out)


def f64(array):
    return np.asarray(array, np.float64)


def close(ours, expected, dtype="float32"):
    assert not np.isnan(f64(ours)).any()
    np.testing.assert_allclose(f64(ours), expected, rtol=0, atol=TOLERANCE[dtype] * max(1.0, np.abs(expected).max()))


def abstract(*shape, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape, dtype)


def trace(function, *args, **options):
    """Trace a call on abstract arguments."""
    return jax.make_jaxpr(functools.partial(function, **options))(*args)
