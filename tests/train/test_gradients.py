"""Gradients against finite differences of the float64 reference, for every kind of adapter."""

import dataclasses

import jax
import numpy as np
import pytest
import reference
import train_cases as cases
from conftest import ADAPTER_CONFIGS, PREFIX

from preft_jax import Adapter, AdapterConfig, load_model
from preft_jax.adapters.init import random_adapter
from preft_jax.models.attention import DenseAttention

STEP = 1e-5
"""Of central differences in float64: their error is about STEP squared, their rounding 1e-16 / STEP."""
RTOL = 2e-3
"""Float32 rounding of a gradient through two layers, whose parts cancel; measured below 3e-4."""


@pytest.fixture(scope="module")
def prefix(lively):
    return random_adapter(PREFIX, lively.config, jax.random.key(0))


def reference_loss(model, adapter, rows):
    total, count = 0.0, 0
    for (one,) in rows:
        logprobs = reference.log_softmax(
            reference.forward(model.config, model.params, one.token_ids, adapter, one.edit_mask)
        )
        for t in np.flatnonzero(one.loss_mask):
            total, count = total - logprobs[t - 1, one.token_ids[t]], count + 1
    return total / count


def slope(model, adapter, rows, direction):
    """Return the derivative of the reference's loss along a direction, by central differences."""

    def moved(by):
        tree = jax.tree.structure(adapter.params)
        flat = dict(zip(paths(adapter.params), cases.leaves(adapter), strict=True))
        ahead = dict(zip(paths(adapter.params), direction, strict=True))
        ordered = [flat[path] + by * ahead[path] for path in by_tree(adapter.params)]
        return Adapter(adapter.config, jax.tree.unflatten(tree, ordered))

    return (reference_loss(model, moved(STEP), rows) - reference_loss(model, moved(-STEP), rows)) / (2 * STEP)


def paths(params):
    return [(i, site, leaf) for i, sites in enumerate(params["layers"]) for site in sites for leaf in sites[site]]


def by_tree(params):
    """Return the same in the order of the tree's leaves."""
    return [
        (i, site, leaf)
        for i, sites in enumerate(params["layers"])
        for site in sorted(sites)
        for leaf in sorted(sites[site])
    ]


def check(model, adapter, rows, rng, **how):
    loss, grads = cases.gradients(model, adapter, rows, **how)
    assert loss == pytest.approx(reference_loss(model, adapter, rows), abs=1e-4)
    norm = np.sqrt(sum((g * g).sum() for g in grads))
    assert norm > 1e-3
    # Along the gradient, where a missing part shows most, and along a random direction.
    for direction in (grads, [rng.standard_normal(g.shape) for g in grads]):
        length = np.sqrt(sum((d * d).sum() for d in direction))
        expected = slope(model, adapter, rows, [d / length for d in direction])
        found = sum((g * d).sum() for g, d in zip(grads, direction, strict=True)) / length
        assert abs(found - expected) < RTOL * norm


@pytest.mark.parametrize("kind", ADAPTER_CONFIGS)
def test_gradients_are_those_of_finite_differences(kind, lively, adapters, rng):
    adapter = adapters[kind]
    rows = [[cases.example(adapter, rng, 8, 4)], [cases.example(adapter, rng, 5, 6)]]
    check(lively, adapter, rows, rng)


@pytest.mark.parametrize("remat", ["cheap", "full"])
def test_what_is_computed_again_is_the_same(remat, lively, adapters, rng):
    rows = [[cases.example(adapters["lora"], rng)]]
    loss, grads = cases.gradients(lively, adapters["lora"], rows, remat=remat)
    plain, expected = cases.gradients(lively, adapters["lora"], rows)
    assert loss == pytest.approx(plain, rel=1e-6)
    for one, other in zip(grads, expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5 * np.abs(other).max())


@pytest.mark.parametrize("kind", ["lora", "loreft_f3l2"])
def test_an_answer_reaches_a_prompt_only_adapter_through_keys_and_values(kind, lively, adapters, rng, monkeypatch):
    """The loss behind the first answer token depends on nothing else, and cutting the way there is noticed."""
    adapter = adapters[kind]
    one = cases.example(adapter, rng, 8, 6)
    rows = [[dataclasses.replace(one, loss_mask=np.arange(14) > 8)]]
    check(lively, adapter, rows, rng)
    whole = DenseAttention.attend

    def cut(self, layer, q, k, v, window, prefix):
        return whole(self, layer, q, jax.lax.stop_gradient(k), jax.lax.stop_gradient(v), window, prefix)

    monkeypatch.setattr(DenseAttention, "attend", cut)
    _, grads = cases.gradients(lively, adapter, rows)
    assert max(np.abs(g).max() for g in grads) == 0
    with pytest.raises(AssertionError):
        check(lively, adapter, rows, rng)


def test_gradients_of_a_prefix_are_too(lively, prefix, rng):
    """Also where what an answer's tokens see of it is all that there is."""
    check(lively, prefix, [[cases.example(prefix, rng, 8, 4)], [cases.example(prefix, rng, 5, 6)]], rng)
    one = cases.example(prefix, rng, 8, 6)
    unseen = [[dataclasses.replace(one, edit_mask=np.zeros_like(one.edit_mask))]]
    loss, grads = cases.gradients(lively, prefix, unseen)
    base = reference_loss(lively, None, unseen)
    assert loss == pytest.approx(base, abs=1e-4), "rotations know differences of positions alone"
    assert max(np.abs(g).max() for g in grads) == 0


def test_packed_documents_do_not_see_each_other(lively, adapters, prefix, rng):
    for adapter in (adapters["loreft_f3l2"], adapters["lora_all"], prefix):
        some = cases.examples(adapter, rng, 6)
        loss, grads = cases.gradients(lively, adapter, [[one] for one in some])
        packed, together = cases.gradients(lively, adapter, [some[:4], some[4:]], packed=True)
        assert packed == pytest.approx(loss, abs=2e-6)
        for a, b in zip(together, grads, strict=True):
            np.testing.assert_allclose(a, b, atol=1e-4 * max(1, np.abs(b).max()))


@pytest.mark.gpu
@pytest.mark.parametrize("remat", ["none", "cheap"])
@pytest.mark.parametrize("packed", [False, True])
def test_cudnn_attention_gives_the_gradients_of_plain_jax(packed, remat, rng):
    """In bfloat16, of which cuDNN has attention; ``packed`` rows give it a mask."""
    model = load_model("tiny", dtype="bfloat16")
    adapter = random_adapter(AdapterConfig(rank=8), model.config, jax.random.key(0))
    documents = [cases.example(adapter, rng, int(rng.integers(9, 40)), int(rng.integers(5, 20))) for _ in range(8)]
    rows = [documents[:4], documents[4:]] if packed else [[one] for one in documents]
    with jax.numpy_dtype_promotion("standard"):  # JAX lowers the gradient of bfloat16 attention with promotions.
        found, wanted = (
            cases.gradients(model, adapter, rows, packed=packed, remat=remat, attention=attention)
            for attention in ("cudnn", "xla")
        )
    np.testing.assert_allclose(found[0], wanted[0], rtol=5e-3)
    for one, other in zip(found[1], wanted[1], strict=True):
        assert np.linalg.norm(one - other) <= 3e-2 * np.linalg.norm(other)
