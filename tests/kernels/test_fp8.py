"""Rows and products in FP8: what an operation reads without scales, or rounds, is what its parts say, bit by bit."""

import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from bench.edit_case import NORM_EPS, EditCase
from bench.kernel_cases import select
from kernels import api
from kernels.types import QuantizedRows, Unscaled
from kernels.xla.fp8 import scaled

EDITS = {case.name: case for case in select("test") if isinstance(case, EditCase)}


def over(*names):
    return pytest.mark.parametrize("name", names)


def product(rng, like, bias=False):
    """Return a product of an array's shape and dtype with scales of rows and columns, and a bias if it is asked for."""
    rows, columns = (rng.uniform(0.5, 2, size).astype(np.float32) for size in like.shape)
    y = rng.standard_normal(like.shape).astype(np.float32)
    own = jnp.asarray(rng.standard_normal(like.shape[1]), jnp.float32) if bias else None
    return Unscaled(jnp.asarray(y, like.dtype), jnp.asarray(rows), jnp.asarray(columns), own)


def numbers(rows):
    """Return what rows in FP8 stand for."""
    with np.errstate(invalid="ignore"):
        return np.asarray(rows.x_TD, np.float32) * np.asarray(rows.scale_T)[:, None]


def assert_same(ours, expected):
    """Compare bits: NaN is NaN, and FP8 is compared as the bytes that it is."""
    assert jax.tree.structure(ours) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(expected), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(np.asarray(a, np.float32), np.asarray(b, np.float32))


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("width", [48, 576])
def test_rows_are_rounded_to_their_largest(width, dtype, implementation, rng):
    x = rng.standard_normal((6, width)) * np.exp(rng.normal(size=(6, 1)) * 5)
    x[1] = 0
    x[2, 3], x[3, 0], x[4, 5] = 1e4, np.nan, -np.inf
    x = jnp.asarray(x, dtype)
    rows = jax.jit(functools.partial(api.quantize, implementation=implementation))(x)
    assert isinstance(rows, QuantizedRows)
    wide = np.asarray(x, np.float32)
    good = [0, 1, 2, 5]
    scale = np.abs(wide[good]).max(axis=1) * np.float32(1 / 448)
    scale[1] = 1
    np.testing.assert_array_equal(np.asarray(rows.scale_T)[good], scale)
    expected = (wide[good] / scale[:, None]).astype(ml_dtypes.float8_e4m3fn).astype(np.float32)
    np.testing.assert_array_equal(np.asarray(rows.x_TD, np.float32)[good], expected)
    assert np.abs(expected).max(axis=1).tolist() == [448, 0, 448, 448]
    assert np.isnan(numbers(rows)).any(axis=1).tolist() == [False, False, False, True, True, False]


def norm(implementation, quantized, inputs, add):
    return api.norm_shrink(
        inputs.x_TD, inputs.edits, inputs.block, inputs.weight_D, NORM_EPS, inputs.sites, inputs.mask_TG,
        add_TD=add, quantized=quantized, implementation=implementation,
    )  # fmt: skip


def rope(implementation, quantized, inputs, qkv):
    del quantized
    return api.rope_kv(
        qkv, inputs.edits, inputs.cos_TX, inputs.sin_TX, inputs.kv_PSJC, inputs.slots_T, q_norm_C=inputs.q_norm_C,
        k_norm_C=inputs.k_norm_C, eps=NORM_EPS, implementation=implementation,
    )  # fmt: skip


def silu(implementation, quantized, inputs, gate_up):
    return api.silu_mul_shrink(
        gate_up, inputs.edits, inputs.sites, inputs.mask_TG, quantized=quantized, implementation=implementation
    )


OPERATIONS = {"norm_shrink": norm, "rope_kv": rope, "silu_mul_shrink": silu}

CASES = (
    "norm_shrink/narrow/plain/mixed",
    "norm_shrink/narrow/down+block->q+k+v/mixed",
    "norm_shrink/narrow/down+block->q+k+v/many-rows",
    "norm_shrink/smollm2-135m/o->gate+up/mixed/bf16",
    "rope_kv/narrow/q+k+v/mixed",
    "rope_kv/narrow/q+k+v/head-norm",
    "rope_kv/smollm2-135m/q+k+v/mixed/bf16",
    "silu_mul_shrink/narrow/plain/mixed",
    "silu_mul_shrink/narrow/gate+up->down/mixed",
    "silu_mul_shrink/smollm2-135m/gate+up->down/mixed/bf16",
)


@over(*CASES)
def test_scales_are_applied_by_what_reads_the_product(name, implementation, rng):
    """The product is read as if its scales had been applied before, but not rounded by that."""
    inputs = EDITS[name].inputs(rng)
    run = jax.jit(OPERATIONS[EDITS[name].op], static_argnums=(0, 1))
    y = product(rng, inputs.x_TD)
    ours = run(implementation, False, inputs, y)
    expected = run(implementation, False, inputs, jax.jit(scaled)(y))
    if EDITS[name].dtype == "float32":
        # Where nothing is rounded in between, a GPU multiplies and adds in one step.
        jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5), ours, expected)
    else:
        for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(expected), strict=True):
            a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
            assert np.linalg.norm(a - b) < 2**-8 * np.linalg.norm(b)
    other = run(implementation, False, inputs, y._replace(column_F=y.column_F * 1.5))
    assert any((np.asarray(a, np.float32) != np.asarray(b, np.float32)).any()
               for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(other), strict=True))  # fmt: skip


@over(*(name for name in CASES if name.startswith("rope")))
def test_a_bias_is_added_behind_the_scales(name, implementation, rng):
    """In float32, before anything is rounded; a step of bfloat16, where a GPU multiplies and adds in one step."""
    inputs = EDITS[name].inputs(rng)
    run = jax.jit(rope, static_argnums=(0, 1))
    y = product(rng, inputs.x_TD, bias=True)
    ours = run(implementation, False, inputs, y)
    plain = y.y_TF.astype(jnp.float32) * y.row_T[:, None] * y.column_F + y.bias_F
    expected = run(implementation, False, inputs, plain.astype(y.y_TF.dtype))
    tolerance = {"rtol": 1e-5, "atol": 1e-5} if EDITS[name].dtype == "float32" else {"rtol": 2**-6, "atol": 2**-6}
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(np.asarray(a, np.float32), np.asarray(b, np.float32), **tolerance)
    without = run(implementation, False, inputs, y._replace(bias_F=None))
    assert np.abs(np.asarray(ours[0], np.float32) - np.asarray(without[0], np.float32)).max() > 0.5


@over(*(name for name in CASES if not name.startswith("rope")))
def test_what_the_next_product_reads_is_rounded_after_its_shrink(name, implementation, rng):
    inputs = EDITS[name].inputs(rng)
    run = jax.jit(OPERATIONS[EDITS[name].op], static_argnums=(0, 1))
    y = product(rng, inputs.x_TD)
    *stream, h, shrunk = run(implementation, True, inputs, y)
    *plain_stream, plain, plain_shrunk = run(implementation, False, inputs, y)
    assert_same((stream, shrunk), (plain_stream, plain_shrunk))
    expected = api.quantize(plain, implementation=implementation)
    if implementation == "xla" and plain.dtype == jnp.bfloat16:
        # XLA may leave out the rounding between two operations of a program: a scale then differs a little.
        np.testing.assert_allclose(numbers(h), numbers(expected), rtol=2**-2.9, atol=1e-3)
    else:
        assert_same(h, expected)


@pytest.mark.filterwarnings("ignore:All-NaN slice")  # Of Triton's interpreter.
@pytest.mark.parametrize("shape", ["norm", "silu"])
def test_a_number_that_is_none_shows_in_its_row_alone(shape, implementation, rng):
    name = {"norm": "norm_shrink/narrow/plain/mixed", "silu": "silu_mul_shrink/narrow/plain/mixed"}[shape]
    inputs = EDITS[name].inputs(rng)
    y = product(rng, inputs.x_TD)
    bad = y._replace(y_TF=y.y_TF.at[5, 7].set(jnp.nan))
    run = jax.jit(OPERATIONS[EDITS[name].op], static_argnums=(0, 1))
    rows, good = run(implementation, True, inputs, bad)[-2], run(implementation, True, inputs, y)[-2]
    others = np.arange(len(inputs.x_TD)) != 5
    assert np.isnan(numbers(rows)[5]).any()
    assert_same(jax.tree.map(lambda leaf: leaf[others], rows), jax.tree.map(lambda leaf: leaf[others], good))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"row_T": jnp.ones(3)}, r"add_TD.row_T is float32\[3\]; expected float32\[\d+\]"),
        ({"bias_F": jnp.ones(3)}, r"add_TD.bias_F is float32\[3\]; expected float32\[\d+\]"),
        ({"column_F": None}, r"add_TD.column_F is of type NoneType; give an array"),
        ({"y_TF": jnp.ones((4, 48), jnp.float16)}, r"add_TD.y_TF has dtype float16; allowed: bfloat16, float32"),
    ],
)
def test_scales_that_do_not_fit_are_refused(changes, message, rng):
    inputs = EDITS["norm_shrink/narrow/plain/mixed"].inputs(rng)
    with pytest.raises(ValueError, match=message):
        norm("xla", False, inputs, product(rng, inputs.x_TD)._replace(**changes))
