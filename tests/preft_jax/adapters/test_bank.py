"""The adapter bank: pages add up to the fold, writes land where they should, and the allocator's book stays right."""

import copy
import re

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from preft_jax import AdapterConfig, AdapterError, ConfigError, ModelConfig, fold, random_adapter
from preft_jax.adapters.allocator import BankAllocator, SitePages
from preft_jax.adapters.bank import init_bank, write_adapter
from preft_jax.adapters.pages import PackedSite, num_rank_pages, pack_adapter
from preft_jax.shapes import RANK_PAGE, SITES

MODEL = ModelConfig(
    vocab_size=32, hidden_size=12, intermediate_size=20, num_hidden_layers=3, num_attention_heads=3,
    num_key_value_heads=1, head_dim=4,
)  # fmt: skip
KEY = jax.random.key(11)


def adapter(**fields):
    return random_adapter(AdapterConfig(**fields), MODEL, KEY, strength=1.0)


def packed(need, groups=None):
    """Return packed sites that need so many pages each, with tensors of no size: all that the allocator looks at."""
    none = np.zeros(0, np.float32)
    return {site: PackedSite(none, none, none, groups or (0,) * count) for site, count in need.items()}


# Packing.

PACKED = {
    **{f"rank {rank}": {"rank": rank, "targets": ("q", "down")} for rank in (4, 15, 16, 17, 32, 48, 100, 256)},
    "ranks that differ between layers": {"rank": 4, "rank_pattern": {"layers.1.self_attn.q_proj": 33, "up_proj": 16}},
    "some layers": {"rank": 8, "layers": (2,)},
    "loreft": {"kind": "loreft", "rank": 5},
    "own weights": {"kind": "loreft", "rank": 5, "positions": "f2+l3", "share_weights": False},
    "own weights of full rank": {"kind": "direft", "rank": 12, "positions": "f2+l3", "share_weights": False},
}  # fmt: skip


@pytest.mark.parametrize("name", PACKED)
def test_pages_add_up_to_the_fold_group_by_group(name, rng):
    one = adapter(**PACKED[name])
    pages = pack_adapter(one, MODEL)
    folded = jax.tree.map(np.asarray, fold(one)["layers"])
    assert set(pages) == set(one.config.targets)
    for site, page in pages.items():
        d, f = MODEL.site_shape(site)
        count = len(page.groups)
        assert page.a.shape == (3, count, d, RANK_PAGE)
        assert page.c.shape == (3, count, RANK_PAGE)
        assert page.b.shape == (3, count, RANK_PAGE, f)
        assert all(array.dtype == np.float32 for array in page[:3])
        x = rng.standard_normal((5, d))
        for layer, sites in enumerate(folded):
            for group in range(one.config.groups):
                own = [n for n in range(count) if page.groups[n] == group]
                total = sum((x @ page.a[layer, n] + page.c[layer, n]) @ page.b[layer, n] for n in own)
                expected = np.zeros((5, f))
                if site in sites:
                    edit = sites[site]
                    ranks = edit.group_R == group
                    expected = (x @ edit.a_DR[:, ranks] + edit.c_R[ranks]) @ edit.b_RF[ranks]
                # Float32 sums of up to 256 terms, added in another order.
                np.testing.assert_allclose(total, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("rank", "pages"), [(1, 1), (15, 1), (16, 1), (17, 2), (32, 2), (33, 3), (256, 16)])
def test_rank_pages_are_as_few_as_can_be(rank, pages):
    assert num_rank_pages(rank) == pages
    assert len(pack_adapter(adapter(rank=rank, targets=("q",)), MODEL)["q"].groups) == pages


def test_each_group_has_pages_of_its_own():
    """Two groups of rank 5 would fit one page, but a page is switched as a whole."""
    pages = pack_adapter(adapter(kind="loreft", rank=5, positions="f2+l3", share_weights=False), MODEL)
    assert pages["block"].groups == (0, 1)


# The device.


def test_an_empty_bank_is_zeros_and_has_every_site():
    bank = init_bank(MODEL, 5, np.float32)
    assert set(bank.sites) == set(SITES)
    for site, pools in bank.sites.items():
        d, f = MODEL.site_shape(site)
        assert [leaf.shape for leaf in pools] == [(3, 5, d, 16), (3, 5, 16), (3, 5, 16, f)]
        assert not any(np.asarray(leaf).any() for leaf in pools)


def test_a_bank_without_its_null_page_is_refused():
    with pytest.raises(ConfigError, match="got 0 pages"):
        init_bank(MODEL, 0, np.float32)


def test_a_write_fills_its_pages_in_every_layer_and_touches_no_other():
    first, second = adapter(rank=20, targets=("q", "down")), adapter(kind="loreft", rank=3)
    bank = init_bank(MODEL, 7, np.float32)
    places = [{"q": SitePages((5, 2), (0, 0)), "down": SitePages((1, 6), (0, 0))}, {"block": SitePages((4,), (0,))}]
    for one, place in zip((first, second), places, strict=True):
        bank = write_adapter(bank, pack_adapter(one, MODEL), place)
    expected = [pack_adapter(one, MODEL) for one in (first, second)]
    for site, pools in bank.sites.items():
        wanted = [np.zeros(leaf.shape, np.float32) for leaf in pools]
        for pages, place in zip(expected, places, strict=True):
            for n, page in enumerate(place[site].pages if site in place else ()):
                for array, new in zip(wanted, pages[site][:3], strict=True):
                    array[:, page] = new[:, n]
        for ours, array in zip(pools, wanted, strict=True):
            np.testing.assert_array_equal(ours, array)


def test_a_layer_sees_its_own_pages_and_one_null_page():
    place = {"down": SitePages((2,), (0,))}
    pages = pack_adapter(adapter(rank=5, targets=("down",)), MODEL)["down"]
    bank = write_adapter(init_bank(MODEL, 3, np.float32), {"down": pages}, place)
    for layer in range(3):
        pool, page = bank.at(layer, "down", np.asarray([[0, 2]], np.int32))
        assert page[0, 0] == 0
        for array, new in zip(pool, pages[:3], strict=True):
            np.testing.assert_array_equal(array[page[0, 1]], new[layer, 0])


@pytest.mark.skipif("jax.default_backend() != 'cpu'", reason="where kernels are XLA's own")
def test_layers_have_one_kernel_on_a_cpu():
    """Kernels that differ in a number of a layer would be compiled for each."""
    bank, page = init_bank(MODEL, 3, np.float32), np.asarray([2, 1], np.int32)

    def kernels(layer):
        def rows(bank, page):
            pool, page = bank.at(layer, "q", page)
            return pool.a_PDR[page], bank.own(layer, "q").b_PRF * 2

        text = jax.jit(rows).lower(bank, page).compile().as_text().split("ENTRY")[0]
        return re.sub(r", metadata=\{[^}]*\}", "", text)

    first, second = [kernels(layer) for layer in (1, 2)]
    assert "fused" in first
    assert first == second


def test_a_write_replaces_what_a_page_held():
    """Also where the new adapter has zeros: ranks that do not fill a page, and layers that it does not edit."""
    old, new = adapter(rank=16, targets=("q",)), adapter(rank=3, targets=("q",), layers=(1,))
    place = {"q": SitePages((1,), (0,))}
    bank = write_adapter(init_bank(MODEL, 2, np.float32), pack_adapter(old, MODEL), place)
    bank = write_adapter(bank, pack_adapter(new, MODEL), place)
    pages = pack_adapter(new, MODEL)["q"]
    pools = bank.sites["q"]
    np.testing.assert_array_equal(pools.a_LPDR[:, 1], pages.a[:, 0])
    np.testing.assert_array_equal(pools.b_LPRF[:, 1], pages.b[:, 0])
    assert [np.asarray(layer[1]).any() for layer in pools.a_LPDR] == [False, True, False]


def test_a_bfloat16_bank_holds_rounded_factors_and_an_exact_bias():
    one = adapter(kind="direft", rank=3)
    pages = pack_adapter(one, MODEL)
    bank = write_adapter(init_bank(MODEL, 2, jax.numpy.bfloat16), pages, {"block": SitePages((1,), (0,))})
    pools = bank.sites["block"]
    np.testing.assert_array_equal(pools.a_LPDR[:, 1], pages["block"].a[:, 0].astype(jax.numpy.bfloat16))
    np.testing.assert_array_equal(pools.c_LPR[:, 1], pages["block"].c[:, 0])


# The allocator.

needs = st.dictionaries(st.sampled_from(SITES), st.integers(1, 4), min_size=1)
actions = st.lists(st.one_of(needs, st.integers(0, 9)), max_size=40)


@given(st.integers(1, 9), actions)
def test_pages_are_never_given_twice_and_never_lost(num_pages, actions):
    """Any sequence of allocations and releases (an integer releases one of those held)."""
    allocator = BankAllocator(num_pages)
    held = []
    for action in actions:
        if isinstance(action, int):
            if held:
                allocator.release(held.pop(action % len(held)))
            continue
        taken = {site: sum(len(where[site].pages) for where in held if site in where) for site in SITES}
        fits = all(taken[site] + count <= num_pages - 1 for site, count in action.items())
        before = copy.deepcopy(allocator)
        try:
            held.append(allocator.allocate(packed(action)))
        except AdapterError:
            assert not fits
            assert all(allocator.free_pages(site) == before.free_pages(site) for site in SITES)
        else:
            assert fits
            assert {site: len(place.pages) for site, place in held[-1].items()} == action
        for site in SITES:
            pages = [page for where in held if site in where for page in where[site].pages]
            assert len(set(pages)) == len(pages)
            assert all(1 <= page < num_pages for page in pages)
            assert allocator.free_pages(site) == num_pages - 1 - len(pages)


def test_allocation_carries_the_groups():
    where = BankAllocator(5).allocate(packed({"block": 2}, groups=(0, 1)))
    assert where["block"].groups == (0, 1)


def test_a_full_bank_says_how_much_is_free_and_what_to_do():
    allocator = BankAllocator(4)
    allocator.allocate(packed({"q": 2}))
    with pytest.raises(AdapterError, match=r"needs 2 rank pages at 'q' and 1 of 3 are free.*more pages"):
        allocator.allocate(packed({"v": 1, "q": 2}))
    assert allocator.free_pages("v") == 3


def test_a_site_that_the_bank_does_not_hold_is_refused_by_name():
    with pytest.raises(AdapterError, match=r"'block'.*holds q, v"):
        BankAllocator(4, ("q", "v")).allocate(packed({"q": 1, "block": 1}))
