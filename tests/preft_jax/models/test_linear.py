"""Products with weights in FP8, against NumPy with the same rounding; their gradients, their layouts."""

import dataclasses

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from preft_jax.errors import ConfigError
from preft_jax.models.layout import fused_layout
from preft_jax.models.linear import (
    Quantized,
    Transposed,
    dequantized,
    linear,
    linear_transpose,
    logical_axes,
    quantized,
    side_by_side,
)
from preft_jax.quantize import quantize

D, F = 48, 20
product = jax.jit(linear, static_argnums=2)


def reference_rows(x):
    """Return rows in FP8, as float64, and the scale of each."""
    x = np.asarray(x, np.float32)
    scale = np.abs(x).max(axis=-1) * np.float32(1 / 448)
    scale = np.where(scale == 0, np.float32(1), scale)
    return (x / scale[..., None]).astype(ml_dtypes.float8_e4m3fn).astype(np.float64), scale.astype(np.float64)


def reference_product(x, w_DF):
    (x_q, x_scale), (w_q, w_scale) = reference_rows(x), reference_rows(np.asarray(w_DF).T)
    return (x_q @ w_q.T) * x_scale[..., None] * w_scale


@pytest.fixture
def matrix(rng):
    """Return a weight whose outputs differ a thousandfold in size."""
    return (rng.standard_normal((D, F)) * 10.0 ** rng.uniform(-3, 0, F)).astype(np.float32)


@pytest.mark.parametrize("shape", [(), (7,), (2, 3)])
def test_a_product_is_that_of_rounded_rows(rng, matrix, shape):
    x = (rng.standard_normal((*shape, D)) * 10.0 ** rng.uniform(-6, 6, (*shape, 1))).astype(np.float32)
    weight = quantized(jnp.asarray(matrix))
    assert (weight.w_FD.dtype, weight.w_FD.shape, weight.scale_F.dtype) == (ml_dtypes.float8_e4m3fn, (F, D), np.float32)
    # 1e-6 of the largest: float32 sums of D products, each exact.
    expected = reference_product(x, matrix)
    np.testing.assert_allclose(product(x, weight), expected, rtol=0, atol=1e-6 * np.abs(expected).max())
    # Both are rounded to 2^-4 of a number.
    exact = x.astype(np.float64) @ matrix
    assert 1e-3 < np.abs(expected - exact).max() / np.abs(exact).max() < 0.1


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_a_product_of_narrow_activations_is_rounded_at_its_end(rng, matrix, dtype):
    x = jnp.asarray(rng.standard_normal((5, D)), dtype)
    weight, expected = quantized(jnp.asarray(matrix)), reference_product(x, matrix)
    # Bfloat16 is rounded before its scales and behind them, half of 2^-8 each time and a little.
    np.testing.assert_allclose(np.asarray(product(x, weight), np.float64), expected, rtol=2**-7, atol=1e-4)
    wide = product(x, weight, jnp.float32)
    assert wide.dtype == jnp.float32
    np.testing.assert_allclose(wide, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


def test_zeros_stay_zeros_and_what_is_not_finite_is_seen_in_its_own_row(rng, matrix):
    x = rng.standard_normal((6, D)).astype(np.float32)
    x[0], x[1, 3], x[2, 4], x[3, 5] = 0, np.nan, np.inf, -np.inf
    x[4] = 1e-42
    matrix[:, 2] = 0
    y = np.asarray(product(x, quantized(jnp.asarray(matrix))))
    assert (y[0] == 0).all()
    assert not np.isfinite(y[1:4]).any()
    np.testing.assert_allclose(y[4], 0, atol=1e-36)
    np.testing.assert_allclose(y[5], reference_product(x[5], matrix), atol=1e-5)
    assert y[5, 2] == 0
    matrix[3, 1] = np.nan
    broken = np.asarray(product(x[5], quantized(jnp.asarray(matrix))))
    assert np.isnan(broken[1])
    assert np.isfinite(np.delete(broken, 1)).all()


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_what_goes_back_is_multiplied_with_the_dequantised_weight(rng, matrix, dtype):
    weight = quantized(jnp.asarray(matrix))
    rows, scale = reference_rows(matrix.T)
    x, dy = (jnp.asarray(rng.standard_normal((3, n)), dtype) for n in (D, F))
    _, back = jax.vjp(lambda x: linear(x, weight), x)
    expected = np.asarray(dy, np.float64) @ (rows * scale[:, None])
    tolerance = 1e-5 if dtype == jnp.float32 else 2**-6
    for found in (back(dy)[0], linear_transpose(dy, weight)):
        assert found.dtype == dtype
        np.testing.assert_allclose(
            np.asarray(found, np.float64), expected, rtol=0, atol=tolerance * np.abs(expected).max()
        )
    np.testing.assert_array_equal(dequantized(weight, jnp.float32), (rows * scale[:, None]).astype(np.float32))


def test_it_is_differentiated_inside_a_checkpoint_and_a_map(rng, matrix):
    weight, x = quantized(jnp.asarray(matrix)), jnp.asarray(rng.standard_normal((4, D)), jnp.float32)

    def loss(x):
        return jnp.sum(jax.vmap(lambda row: linear(row, weight))(x) ** 2)

    np.testing.assert_allclose(jax.grad(jax.checkpoint(loss))(x), jax.grad(loss)(x), rtol=1e-6)


def same(one, other):
    assert jax.tree.structure(one) == jax.tree.structure(other)
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_array_equal(np.asarray(a, np.float32), np.asarray(b, np.float32))


def of_linears(params):
    return [{name: w for name, w in layer.items() if isinstance(w, Quantized)} for layer in params["layers"]]


@pytest.mark.parametrize("shards", [1, 2])
@pytest.mark.parametrize("transpose", [False, True])
def test_joined_linears_are_the_same_joined_before_or_behind(lively, transpose, shards):
    """And in FP8 they are stored one way only."""
    first = quantize(fused_layout(lively.params, transpose=transpose, shards=shards))
    then = fused_layout(quantize(lively.params), transpose=transpose, shards=shards)
    same(of_linears(first), of_linears(then))
    assert set(of_linears(then)[0]) == {"qkv", "o", "gate_up", "down"}
    same(quantize(then), then)
    axes = logical_axes(then)["layers"][0]
    assert axes["qkv"] == Quantized(("qkv", "hidden"), ("qkv",))  # type: ignore[arg-type]
    assert axes["down"] == Quantized(("hidden", "mlp"), ("hidden",))  # type: ignore[arg-type]


def test_a_consumed_tree_in_fp8_is_gone_but_for_what_is_stored_alike(lively):
    wanted = fused_layout(quantize(lively.params), transpose=True)
    given = quantize(jax.tree.map(jnp.array, lively.params), consume=True)
    made = fused_layout(given, transpose=True, consume=True)
    same(made, wanted)
    layer = given["layers"][1]
    assert {name for name, w in layer.items() if jax.tree.leaves(w)[0].is_deleted()} == {"q", "k", "v", "gate", "up"}


def test_linears_to_be_joined_are_all_in_fp8_or_none(lively):
    layer = dict(lively.params["layers"][0])
    layer["k"] = quantized(layer["k"])
    with pytest.raises(ConfigError, match="1 of 3 linears that read the same input are in FP8"):
        fused_layout(lively.params | {"layers": [layer]}, transpose=False)
    assert side_by_side([np.ones((2, 1)), np.ones((2, 2))], np.concatenate).shape == (2, 3)


def test_an_output_head_in_fp8_is_kept_by_every_layout(lively):
    head = quantized(Transposed(lively.params["embed"]))
    params = lively.params | {"lm_head": head}
    assert fused_layout(params, transpose=True)["lm_head"] is head
    assert dataclasses.fields(head)[0].name == "w_FD"
