"""Layers over fused kernels compute what layers over plain operations compute.

On a CPU the fused operations are compositions in plain JAX: the two ways add up the same numbers in another order.
float32, logits of order 1: 2e-4, as for other changes of shape.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels import dispatch
from preft_jax.adapters.allocator import BankAllocator
from preft_jax.adapters.bank import init_bank, write_adapter
from preft_jax.adapters.edit_mask import make_edit_mask
from preft_jax.adapters.pages import pack_adapter
from preft_jax.models import forward, fused, linear
from preft_jax.models.batch import DecodeBatch, Span, pack_prefill
from preft_jax.models.cache import init_cache
from preft_jax.models.layout import fused_layout
from preft_jax.models.modules import init_params
from preft_jax.quantize import quantize

PAGE_SIZE, PAGES, TILE = 8, 24, 16
LENGTHS = (19, 7, 33)
ATOL = 2e-4


@pytest.fixture
def batch(lively, adapters, rng):
    """Return a bank with two adapters, and a batch of three prompts: LoRA, base, and a ReFT at chosen positions."""
    config = lively.config
    bank, allocator = init_bank(config, 12, jnp.float32), BankAllocator(12)
    places, masks = [], []
    for name, length in zip(("lora_r24", None, "loreft_f3l2"), LENGTHS, strict=True):
        place, mask = {}, np.zeros_like(make_edit_mask(length, "prompt"))
        if name is not None:
            adapter = adapters[name]
            packed = pack_adapter(adapter, config)
            place = allocator.allocate(packed)
            bank = write_adapter(bank, packed, place)
            mask = make_edit_mask(length, adapter.config.positions, groups=adapter.config.groups)
        places.append(place)
        masks.append(mask)
    tables = np.split(np.arange(PAGES), len(LENGTHS))
    spans = [
        Span(
            tokens=rng.integers(0, config.vocab_size, length).astype(np.int32),
            start=0,
            edit_mask=mask,
            kv_pages=table,
            adapter_pages=place,
        )
        for length, mask, table, place in zip(LENGTHS, masks, tables, places, strict=True)
    ]
    return bank, pack_prefill(
        spans, num_tokens=64, num_requests=4, page_table_width=8, page_size=PAGE_SIZE, tile=TILE
    )  # fmt: skip


def both_ways(monkeypatch, run):
    """Return what ``run`` gives with the layers one by one, and over fused operations."""
    plain = run()
    monkeypatch.setattr(fused, "why_not", lambda params: None)
    return plain, run()


def with_options(model, rng, **options):
    """Return the config of a model with other options, and its weights with random ones for what they add."""
    config = dataclasses.replace(model.config, **options)
    layers = init_params(config, jax.random.key(3))["layers"]
    added = [
        {name: jnp.asarray(1 + 0.3 * rng.standard_normal(leaf.shape), jnp.float32) for name, leaf in layer.items()}
        for layer in layers
    ]
    return config, model.params | {
        "layers": [new | old for new, old in zip(added, model.params["layers"], strict=True)]
    }


@pytest.mark.parametrize(
    "options", [{}, {"qkv_bias": True}, {"qk_norm": True}, {"sliding_window": 9}], ids=lambda options: "+".join(options)
)
def test_prefill_with_edits_and_then_decode(options, lively, batch, monkeypatch, rng):
    config, params = with_options(lively, rng, **options)
    params = fused_layout(params, transpose=False)
    bank, packed = batch

    def run():
        cache = init_cache(config, PAGES, PAGE_SIZE, jnp.float32)
        logits, cache = forward.prefill(config, params, bank, cache, packed, max_query_len=64)
        rows = DecodeBatch(
            jnp.argmax(logits, axis=1).astype(jnp.int32),
            jnp.asarray([*LENGTHS, -1], jnp.int32),
            jnp.asarray(packed.page_table_BP),
        )
        return logits[: len(LENGTHS)], cache, forward.decode(config, params, cache, rows)[0][: len(LENGTHS)]

    (plain, plain_cache, plain_next), (ours, cache, following) = both_ways(monkeypatch, run)
    assert np.abs(np.asarray(plain)).max() > 1
    np.testing.assert_allclose(ours, plain, atol=ATOL)
    np.testing.assert_allclose(following, plain_next, atol=ATOL)
    for pool, expected in zip(cache.kv, plain_cache.kv, strict=True):
        np.testing.assert_allclose(pool, expected, atol=ATOL)


def test_what_reads_a_product_in_fp8_adds_the_bias(lively, batch, monkeypatch, rng):
    """Plain operations round to float32 once more; 0.1: that moves an activation to the next number of FP8 at times."""
    monkeypatch.setattr(linear, "gpu_has_fp8", lambda: True)
    config, params = with_options(lively, rng, qkv_bias=True)
    params = fused_layout(quantize(params), transpose=False)
    bank, packed = batch

    def run(params=params):
        cache = init_cache(config, PAGES, PAGE_SIZE, jnp.float32)
        return np.asarray(forward.prefill(config, params, bank, cache, packed, max_query_len=64)[0])[: len(LENGTHS)]

    plain, ours = both_ways(monkeypatch, run)
    np.testing.assert_allclose(ours, plain, atol=0.1)
    layers = [layer | {"qkv_bias": jnp.zeros_like(layer["qkv_bias"])} for layer in params["layers"]]
    assert np.abs(run(params | {"layers": layers}) - ours).max() > 1


def test_the_edits_of_every_site_arrive(lively, batch, monkeypatch):
    """Without this the comparison above could agree on doing nothing."""
    config, params = lively.config, fused_layout(lively.params, transpose=False)
    bank, packed = batch
    monkeypatch.setattr(fused, "why_not", lambda params: None)

    def run(bank):
        cache = init_cache(config, PAGES, PAGE_SIZE, jnp.float32)
        return np.asarray(forward.prefill(config, params, bank, cache, packed, max_query_len=64)[0])

    edited = run(bank)
    assert np.abs(edited - run(None))[[0, 2]].max(axis=1).min() > 1e-2
    np.testing.assert_allclose(edited[1], run(None)[1], atol=ATOL)
    for site in ("q", "v", "o", "down", "block"):
        without = bank.sites | {site: jax.tree.map(jnp.zeros_like, bank.sites[site])}
        assert np.abs(edited - run(bank._replace(sites=without)))[[0, 2]].max() > 1e-3, site


def test_why_layers_are_not_fused(lively):
    params = fused_layout(lively.params, transpose=False)
    if jax.default_backend() == "cpu":
        assert fused.why_not(params) == "this backend has no fused kernels"
    with dispatch.preferring("triton"):
        assert fused.why_not(params) is None
        assert fused.why_not(fused_layout(lively.params, transpose=True)) is None
        assert "not in the serving layout" in (fused.why_not(lively.params) or "")
    with dispatch.preferring("pallas_tpu"):
        assert fused.why_not(params) == "this backend has no fused kernels"


@pytest.mark.parametrize("transpose", [False, True])
def test_a_consumed_tree_leaves_nothing_but_the_fused_one(lively, transpose):
    given = jax.tree.map(jnp.array, lively.params)
    wanted = jax.tree.map(np.asarray, fused_layout(lively.params, transpose=transpose))
    made = fused_layout(given, transpose=transpose, consume=True)
    for one, other in zip(*map(jax.tree.leaves, (made, wanted)), strict=True):
        np.testing.assert_array_equal(np.asarray(one), other)
    gone = {"q", "k", "v", "gate", "up", *(("o", "down") if transpose else ())}
    for layer in given["layers"]:
        assert {name for name, leaf in layer.items() if leaf.is_deleted()} == gone
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(lively.params))
    assert fused_layout(made, transpose=transpose, consume=True) is made


def test_decode_steps_with_all_token_adapters(lively, batch, monkeypatch):
    """Rows with LoRA, without, and with ReFT, whose edit lies between a layer and the next one's norm."""
    config, params = lively.config, fused_layout(lively.params, transpose=False)
    bank, packed = batch
    page = {site: np.asarray(tiles.page_NE) for site, tiles in packed.tiles.items()}
    # The first tile is the first prompt's, the last one the third's.
    pages = {site: jnp.asarray([page_NE[0], np.zeros_like(page_NE[0]), page_NE[-1]]) for site, page_NE in page.items()}
    assert min(int(pages[site][at].max()) for at, site in ((0, "q"), (0, "down"), (2, "block"))) > 0

    def run(pages=pages):
        cache, logits = init_cache(config, 3, PAGE_SIZE, jnp.float32), None
        for position in range(2):
            tokens = [3 + position, 5, 7 - position]
            rows = DecodeBatch(*(jnp.asarray(x, jnp.int32) for x in (tokens, [position] * 3, [[0], [1], [2]])))
            logits, cache = forward.decode_adapted(config, params, bank, pages, cache, rows)
        return logits, cache

    (plain, plain_cache), (ours, cache) = both_ways(monkeypatch, run)
    np.testing.assert_allclose(ours, plain, atol=ATOL)
    for pool, expected in zip(cache.kv, plain_cache.kv, strict=True):
        np.testing.assert_allclose(pool, expected, atol=ATOL)
    for site, row in (("q", 0), ("v", 0), ("o", 0), ("down", 0), ("block", 2)):
        without, _ = run(pages | {site: jnp.zeros_like(pages[site])})
        assert np.abs(without - ours)[row].max() > 1e-3, site
