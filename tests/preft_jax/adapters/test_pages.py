"""One cutter of rank pages: the bank's, from NumPy arrays, are those that training makes of traced arrays."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import ADAPTER_CONFIGS

from kernels.xla.fp8 import FP8
from preft_jax import AdapterConfig, AdapterError, random_adapter
from preft_jax.adapters import pages
from preft_jax.adapters.adapter import Adapter
from preft_jax.adapters.fold import LowRankEdit, fold_on_host
from preft_jax.adapters.pages import PackedSite, adapter_page_counts, cut_edit, fold_and_cut, pack_adapter
from preft_jax.shapes import RANK_PAGE


@pytest.mark.parametrize("kind", ADAPTER_CONFIGS)
def test_numpy_and_traced_arrays_are_cut_alike(kind, lively, adapters):
    config, counts = adapters[kind].config, adapter_page_counts(adapters[kind].config, lively.config)
    packed = pack_adapter(adapters[kind], lively.config)
    for layer, edits in enumerate(fold_on_host(config, adapters[kind].params)):
        for site in set(packed) - set(edits):
            assert not any(array[layer].any() for array in packed[site][:3])
        for site, edit in edits.items():
            count, groups = counts[site], config.groups
            on_host = cut_edit(edit, count, groups)
            assert all(isinstance(array, np.ndarray) for array in on_host)
            traced = jax.jit(lambda edit, count=count, groups=groups: cut_edit(edit, count, groups))(edit)
            slots = jax.tree.map(lambda leaf: np.stack([leaf, 2 * leaf]), edit)
            both = cut_edit(slots, count, groups)
            for page, one, two, whole in zip(on_host, traced, both, packed[site], strict=False):
                np.testing.assert_array_equal(one, page)
                np.testing.assert_array_equal(two, np.stack([page, 2 * page]))
                np.testing.assert_array_equal(whole[layer], page)


@pytest.mark.parametrize(("rank", "groups"), [(5, 1), (16, 1), (40, 1), (10, 2), (34, 2)])
def test_a_gradient_comes_back_through_the_cut(rank, groups, rng):
    """Padding takes no part of it, and each rank has its own."""
    d, f, num_pages = 3, 4, -(-rank // groups // RANK_PAGE) * groups
    shapes = (d, rank), (rank,), (rank, f)
    leaves = [jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in shapes]
    cut, back = jax.vjp(
        lambda *leaves: cut_edit(LowRankEdit(*leaves, jnp.zeros(rank, jnp.int32)), num_pages, groups), *leaves
    )
    weights = [jnp.asarray(rng.standard_normal(page.shape), jnp.float32) for page in cut]
    grads = back(tuple(weights))
    column = np.concatenate([g * (num_pages // groups) * RANK_PAGE + np.arange(rank // groups) for g in range(groups)])
    a_DR = np.moveaxis(np.asarray(weights[0]), 0, 1).reshape(d, -1)[:, column]
    np.testing.assert_array_equal(grads[0], a_DR)
    np.testing.assert_array_equal(grads[1], np.asarray(weights[1]).reshape(-1)[column])
    np.testing.assert_array_equal(grads[2], np.asarray(weights[2]).reshape(-1, f)[column])


@pytest.mark.parametrize("kind", ADAPTER_CONFIGS)
def test_one_fold_gives_digest_and_pages(kind, lively, adapters, monkeypatch):
    fresh = Adapter(adapters[kind].config, adapters[kind].params)
    expected = pack_adapter(fresh, lively.config, np.float16)
    folds = []
    monkeypatch.setattr(pages, "fold_on_host", lambda *args: folds.append(args) or fold_on_host(*args))
    digest, packed = fold_and_cut(fresh, lively.config, np.float16)
    assert len(folds) == 1
    assert digest == fresh.digest
    assert list(packed) == list(expected)
    for site, edit in packed.items():
        assert edit.groups == expected[site].groups
        for one, other in zip(edit[:3], expected[site][:3], strict=True):
            np.testing.assert_array_equal(one, other)


def test_what_is_not_finite_is_refused(lively):
    one = random_adapter(AdapterConfig(rank=2, targets=("q",)), lively.config, jax.random.key(0))
    one.params["layers"][0]["q"]["lora_a"] = np.full_like(one.params["layers"][0]["q"]["lora_a"], 1e30)
    fold_and_cut(one, lively.config)
    for dtype, name in ((np.float16, "float16"), (FP8, "float8_e4m3fn")):
        with pytest.raises(AdapterError, match=f"'q' that are NaN or infinite in {name}"):
            fold_and_cut(one, lively.config, dtype)


def pages_of(rng, magnitudes):
    """Return pages of one layer whose ranks have these magnitudes."""
    a, b = rng.standard_normal((1, 1, 40, 16)), rng.standard_normal((1, 1, 16, 56))
    a, b = a * magnitudes, b * magnitudes[:, None]
    return PackedSite(a.astype(np.float32), np.ones((1, 1, 16), np.float32), b.astype(np.float32), (0,))


def test_a_rank_in_fp8_is_within_a_sixteenth_of_each_number(rng):
    """Or of a 1,024th of its scale, where numbers are below 2**-6 of it: e4m3 has 3 bits, and steps of 2**-9 at least.

    Products with scales are rounded to float32.
    """
    plain = pages_of(rng, 10.0 ** np.arange(-12, 4))
    plain.a[..., 7, 3], plain.b[..., 3, 7] = 4e4, -4e4  # An outlier, within the range of a float16 bank.
    plain.a[..., 5], plain.b[..., 5, :] = 0, 0
    plain.a[..., 6] = np.where(np.arange(40) % 2, 3.0, -3.0)  # All are the largest.
    found = plain.in_fp8()
    served = found.scaled()
    for axis, one, own, scale in zip((-2, -1), (plain.a, plain.b), (served.a, served.b), found.scales, strict=True):
        exact, scale = one.astype(np.float64), np.expand_dims(scale.astype(np.float64), axis)
        np.testing.assert_array_equal(np.abs(own.astype(np.float16)).max() <= 4e4, True)
        assert (np.abs(own - exact) <= np.maximum(np.abs(exact) * 2**-4, scale * 2**-10) + np.abs(exact) * 2**-22).all()
    np.testing.assert_array_equal(served.c, plain.c)
    assert not served.a[..., 5].any()
    assert not served.b[..., 5, :].any()
    np.testing.assert_allclose(served.a[..., 6], plain.a[..., 6], rtol=2**-22)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 1e5])
def test_what_no_bank_could_hold_spoils_its_own_rank_of_fp8(bad, rng):
    plain = pages_of(rng, np.full(16, 0.1))
    whole = plain.in_fp8()
    plain.a[0, 0, 3, 2] = bad
    with np.errstate(invalid="ignore"):
        found = plain.in_fp8()
    assert not np.isfinite(found.a[..., 2].astype(np.float32)).all()
    np.testing.assert_array_equal(np.delete(found.a, 2, 3), np.delete(whole.a, 2, 3))
    np.testing.assert_array_equal(found.b, whole.b)
