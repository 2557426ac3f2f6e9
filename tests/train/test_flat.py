"""A tree in few arrays is the same tree again, whatever its leaves are."""

import jax
import numpy as np
import pytest

from train.flat import Flat, flat_params, floats_of


def tree(rng, lead=()):
    one = lambda *shape: rng.standard_normal((*lead, *shape)).astype(np.float32)  # noqa: E731
    return [
        {"lora_a": one(3, 2), "lora_b": one(2, 5), "columns": np.arange(4, dtype=np.int32)},
        {"lora_a": one(4, 1), "lora_b": one(1, 3), "bias": one(2).astype(np.float16)},
    ]


@pytest.mark.host
def test_a_tree_comes_back(rng):
    given = tree(rng)
    flat = Flat.of(given)
    assert [x.shape for x in flat.vectors] == [(6 + 10 + 4 + 3,), (2,)], "one vector for each dtype"
    for ours, expected in zip(jax.tree.leaves(flat.tree), jax.tree.leaves(given), strict=True):
        np.testing.assert_array_equal(ours, expected)
        assert ours.dtype == expected.dtype
    doubled = flat.unflatten(tuple(2 * x for x in flat.floats(flat.vectors)))
    np.testing.assert_array_equal(doubled[1]["bias"], 2 * given[1]["bias"])
    np.testing.assert_array_equal(doubled[0]["columns"], given[0]["columns"])
    again = flat.join(floats_of(given))
    assert all(np.array_equal(ours, expected) for ours, expected in zip(again, flat.vectors, strict=True))


@pytest.mark.host
def test_axes_that_lead_all_leaves_lead_the_vectors(rng):
    given = [{name: leaf for name, leaf in own.items() if name.startswith("lora")} for own in tree(rng, lead=(2,))]
    flat = flat_params(given, axes=1)
    assert [x.shape for x in flat.vectors] == [(2, 23)]
    jax.tree.map(np.testing.assert_array_equal, flat.tree, given)
    one = jax.tree.map(lambda leaf: leaf[1], flat)
    jax.tree.map(np.testing.assert_array_equal, one.tree, jax.tree.map(lambda leaf: leaf[1], given))


@pytest.mark.host
def test_of_shapes_there_are_shapes_and_the_same_structure(rng):
    given = tree(rng)
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), given)
    ours, expected = flat_params(shapes), flat_params(given)
    assert jax.tree.structure(ours) == jax.tree.structure(expected)
    assert [x.shape for x in ours.vectors] == [x.shape for x in expected.vectors]


def test_what_stands_last_is_scaled_alone(rng):
    given = [{name: leaf for name, leaf in own.items() if name.startswith("lora")} for own in tree(rng)]
    scaled = jax.device_get(flat_params(given).scaled_last(np.float32(3))).tree
    for ours, own in zip(scaled, given, strict=True):
        np.testing.assert_array_equal(ours["lora_a"], own["lora_a"])
        np.testing.assert_array_equal(ours["lora_b"], 3 * own["lora_b"])
