"""A model cut over devices serves what one device serves; ``test_tensor_parallel.py`` runs this on eight.

Sums over devices are other sums than a device's own, so log-probabilities are equal within ``ATOL`` of
``engine_runs``; tokens are the same ones.
"""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import PREFIX
from engine_runs import ATOL, TIGHT, request, serve
from hlo import assert_in_place

from kernels import dispatch
from preft_jax import (
    AdapterConfig,
    ConfigError,
    ModelError,
    SamplingParams,
    adapter_of_edits,
    forward,
    load_model,
    logprobs,
    random_adapter,
)
from preft_jax.adapters.bank import bank_axes, init_bank
from preft_jax.config import PRESETS
from preft_jax.device.mesh import Placement
from preft_jax.device.packed import pack
from preft_jax.io.hf import save_hf_model
from preft_jax.loading import serving_model, spread_model
from preft_jax.models import fused, linear
from preft_jax.models.cache import cache_axes, init_cache
from preft_jax.models.layout import fused_layout
from preft_jax.models.linear import logical_axes
from preft_jax.models.modules import abstract_params, init_params
from preft_jax.shapes import BANK_SITES, SITES
from serve.engine import programs as device
from serve.engine.arrays import Arrays, constants_of
from serve.engine.config import EngineConfig
from serve.engine.engine import Engine
from serve.engine.handover import hand_over
from serve.engine.programs import Slots
from serve.engine.rank_pages import RankPages
from serve.engine.spread import WHOLE, Spread, bytes_of
from serve.store.files import AdapterFiles
from serve.store.host import AdapterStore
from serve.store.names import Registry
from train.trainer import Trainer

WIDE = dataclasses.replace(
    PRESETS["tiny"], num_hidden_layers=2, num_attention_heads=8, num_key_value_heads=4, head_dim=8, qkv_bias=True,
    qk_norm=True, tie_word_embeddings=False, model_type="qwen3",
)  # fmt: skip
"""Two layers, four KV heads, an output head of its own."""
GPU = EngineConfig(max_num_seqs=8, max_model_len=512, prefill_tokens=256, max_rank=16).resolve("gpu")
TEN_PAGES = dataclasses.replace(TIGHT, bank_pages=12, bank_sites=BANK_SITES)


@pytest.fixture(scope="module")
def wide(lively):
    """Return a model of the shape ``WIDE`` with loud weights."""
    rng = np.random.default_rng(3)

    def louder(path, leaf):
        if leaf.ndim == 1:
            return (1 + 0.2 * rng.standard_normal(leaf.shape)).astype(np.float32)
        sigma = 0.15 if "embed" in jax.tree_util.keystr(path) else leaf.shape[0] ** -0.5
        return (sigma * rng.standard_normal(leaf.shape)).astype(np.float32)

    params = jax.tree_util.tree_map_with_path(louder, init_params(WIDE, jax.random.key(0)))
    return dataclasses.replace(lively, config=WIDE, params=jax.tree.map(jnp.asarray, params))


@pytest.fixture(scope="module")
def wide_adapters():
    configs = {
        "lora": AdapterConfig(rank=8), "lora_r24": AdapterConfig(rank=24, targets=("q", "v", "o", "down")),
        "loreft": AdapterConfig(kind="loreft", rank=8), "direft": AdapterConfig(kind="direft", rank=16),
    }  # fmt: skip
    keys = jax.random.split(jax.random.key(1), len(configs))
    drawn = {
        name: random_adapter(config, WIDE, key, strength=0.7)
        for (name, config), key in zip(configs.items(), keys, strict=True)
    }
    return {**drawn, "constants": constants(WIDE)}


def constants(config):
    """Return an adapter of edits that have a constant, at every site of the first layer and the last."""
    rng = np.random.default_rng(4)
    edits = {
        (layer, site): tuple(rng.standard_normal(shape) * 0.3 for shape in ((d, 5), (5,), (5, f)))
        for layer in (0, config.num_hidden_layers - 1)
        for site, (d, f) in ((site, config.site_shape(site)) for site in SITES)
    }
    return adapter_of_edits(edits, config, positions="prompt")


def asked(rng, adapters, kinds):
    """Return requests, the last two with a prompt that is the first one's and goes on, so that it finds its KV."""
    prompts = [rng.integers(0, 250, 5 + 4 * i).tolist() for i in range(len(kinds))]
    prompts[-1] = prompts[-2][:24] + prompts[-1][:9]
    return [
        request(
            prompt, adapters.get(kind), seed=i, max_tokens=4 + i,
            sampling=SamplingParams(temperature=0.7 * (i % 2), ignore_eos=True),
        )
        for i, (prompt, kind) in enumerate(zip(prompts, kinds, strict=True))
    ]  # fmt: skip


def assert_equal(ours, theirs):
    for group, others in zip(ours, theirs, strict=True):
        for sample, other in zip(group, others, strict=True):
            assert sample.token_ids == other.token_ids
            np.testing.assert_allclose(sample.logprobs, other.logprobs, atol=ATOL)


def test_two_devices_serve_every_kind_of_adapter_as_one(lively, adapters, rng):
    """Chunked prompts, preemption, a prefix from the cache, all-token adapters, and edits with constants.

    Of a constant where the input is cut, the sum over devices has one; each has its heads of a learned prefix.
    """
    prefix = random_adapter(PREFIX, lively.config, jax.random.key(2))
    adapters = {**adapters, "constants": constants(lively.config), "prefix": prefix}
    kinds = ("constants", "lora", "direft", "loreft_f3l2", "lora_all", "lora_r24", None, "loreft", "lora_pattern")
    requests = asked(rng, adapters, (None, "prefix", *kinds, "direft_free", "direft_free"))
    alone = serve(Engine(lively, TEN_PAGES), requests)
    engine = Engine(spread_model(lively, "tp=2"), TEN_PAGES)
    assert_equal(serve(engine, requests), alone)
    assert engine.stats.preemptions
    assert engine.stats.prefix_hit_tokens
    engine.sleep()
    assert_equal(serve(engine, requests[:4]), alone[:4])
    assert engine.stats.recompiles == engine.stats.device_failures == 0


def test_four_devices_serve_over_fused_operations_with_mixed_calls_as_one(wide, wide_adapters, rng, monkeypatch):
    monkeypatch.setattr(fused, "why_not", lambda params: None)
    config = dataclasses.replace(TEN_PAGES, all_token=False, prefill_tokens=64, mixed_tokens=64)
    requests = asked(rng, wide_adapters, (None, "constants", "direft", "lora_r24", "loreft", "lora", "lora"))
    alone = serve(Engine(wide, config), requests, every=2)
    engine = Engine(spread_model(wide, "tp=4"), config)
    assert_equal(serve(engine, requests, every=2), alone)
    assert engine.stats.mixed_calls
    # Each device has a fourth of what is cut.
    cache = engine.runner.cache
    assert bytes_of(cache) * 4 == sum(pool.nbytes for pool in cache.kv)
    layer = engine.runner.params["layers"][0]
    assert all(bytes_of(layer[name]) * 4 == layer[name].nbytes for name in ("qkv", "o", "gate_up", "down", "qkv_bias"))
    pools = engine.runner.bank.sites
    assert bytes_of(pools["q"].b_LPRF) * 4 == pools["q"].b_LPRF.nbytes
    assert bytes_of(pools["o"].a_LPDR) * 4 == pools["o"].a_LPDR.nbytes
    assert bytes_of(pools["block"].a_LPDR) == pools["block"].a_LPDR.nbytes


def test_what_two_devices_prefill_one_decodes_and_the_other_way_round(lively, adapters, rng):
    """KV that is handed over lies as no device has it."""
    requests = asked(rng, adapters, ("lora_r24", "direft"))
    alone = serve(Engine(lively, TEN_PAGES), requests)
    cut = spread_model(lively, "tp=2")
    prefill = dataclasses.replace(TEN_PAGES, all_token=False, bank_sites=SITES, role="prefill")
    decode = dataclasses.replace(prefill, bank_pages=1, role="decode")
    for first, then in ((cut, lively), (lively, cut)):
        given = hand_over(Engine(first, prefill), requests)
        rest = [handover.request(one) for handover, one in zip(given, requests, strict=True)]
        assert_equal(serve(Engine(then, decode), rest), alone)


def test_adapters_of_a_store_come_in_equal_parts_over_the_devices_links(wide, wide_adapters, rng):
    """A bank of few pages: adapters come and go. In FP8, each device turns its own part to the bank's dtype."""
    model = spread_model(wide, "tp=2")
    store = AdapterStore(AdapterFiles(model, dtype="fp8"), Registry(), host_bytes=1 << 24)
    names = {name: store.publish(name, adapter) for name, adapter in wide_adapters.items()}
    config = dataclasses.replace(TEN_PAGES, all_token=False, bank_pages=4, adapter_dtype="fp8")
    requests = asked(rng, wide_adapters, ("lora", "direft", "lora_r24", "loreft", "lora"))
    named = [dataclasses.replace(one, adapter=names[kind]) for one, kind in zip(
        requests, ("lora", "direft", "lora_r24", "loreft", "lora"), strict=True
    )]  # fmt: skip
    engine = Engine(model, config, store=store)
    assert_equal(serve(engine, named), serve(Engine(wide, config), requests))
    slab = engine.runner.rank_pages.nothing("write-whole-pages")[0][0]
    assert bytes_of(slab) * 2 == slab.nbytes


def test_products_in_fp8_have_their_scales_before_devices_add_them(rng, monkeypatch):
    """What o and down read is rounded with each device's own scales, so two devices round a little otherwise."""
    monkeypatch.setattr(fused, "why_not", lambda params: None)
    monkeypatch.setattr(linear, "gpu_has_fp8", lambda: True)
    whole, cut = (load_model("tiny", quantization="fp8", mesh=mesh) for mesh in ("tp=1", "tp=2"))
    adapter = random_adapter(AdapterConfig(rank=8), whole.config, jax.random.key(3), strength=0.7)
    requests = [dataclasses.replace(one, max_tokens=1) for one in asked(rng, {"lora": adapter}, (None, "lora", "lora"))]
    config = dataclasses.replace(TEN_PAGES, all_token=False)
    for group, others in zip(serve(Engine(cut, config), requests), serve(Engine(whole, config), requests), strict=True):
        assert group[0].token_ids == others[0].token_ids
        np.testing.assert_allclose(group[0].logprobs, others[0].logprobs, atol=0.03)


def collectives(text):
    """Return how many collectives of each kind an optimised program has."""
    kinds = ("all-reduce", "all-gather", "reduce-scatter", "collective-permute", "all-to-all")
    return {kind: len(re.findall(rf" {kind}(?:-start)?\(", text)) for kind in kinds}


def own(arrays):
    """Return a device's parts of arrays, as shapes."""
    return [jax.ShapeDtypeStruct(x.sharding.shard_shape(x.shape), x.dtype) for x in jax.tree.leaves(arrays)]


@pytest.mark.parametrize(("vocab", "around"), [(256, 1), (250, 0)])
def test_a_decode_step_sums_twice_a_layer_and_works_in_place(wide, vocab, around, compiled_here, monkeypatch):
    """Beside that, embeddings are summed and logits gathered; a vocabulary that does not divide is whole everywhere."""
    config = dataclasses.replace(WIDE, vocab_size=vocab)
    model = dataclasses.replace(wide, config=config, params=init_params(config, jax.random.key(0)))
    runner = Engine(spread_model(model, "tp=4"), dataclasses.replace(TIGHT, num_kv_pages=37, bank_pages=5)).runner
    text = {}
    for name in ("decode-6", "prefill-32", "copy-pages", "write-pages"):
        text[name] = runner.programs.trace(name).lower().compile().as_text()
    for name in ("decode-6", "prefill-32", "copy-pages"):
        assert_in_place(text[name], own(runner.cache))
    assert_in_place(text["write-pages"], own(runner.bank))
    none = {"reduce-scatter": 0, "collective-permute": 0, "all-to-all": 0}
    layers = config.num_hidden_layers
    assert collectives(text["decode-6"]) == {"all-reduce": 2 * layers + around, "all-gather": around, **none}
    # Plain operations add an edit to a device's part of an output. Of fused ones, what o and down shrink goes along.
    assert collectives(text["prefill-32"]) == {"all-reduce": 2 * layers + around, "all-gather": around, **none}
    monkeypatch.setattr(fused, "why_not", lambda params: None)
    text["fused"] = runner.programs.trace("prefill-32").lower().compile().as_text()
    assert collectives(text["fused"]) == collectives(text["prefill-32"])
    assert collectives(text["copy-pages"]) == {"all-reduce": 0, "all-gather": 0, **none}


@pytest.mark.parametrize("quantization", ["none", "fp8"])
def test_weights_are_read_and_drawn_in_the_parts_of_each_device(tmp_path, quantization):
    """The same numbers as on one device; no device has more than its part of a linear."""
    config = dataclasses.replace(WIDE, qk_norm=False, model_type="qwen2")
    save_hf_model(tmp_path / "model", config, init_params(config, jax.random.key(0)))
    for name, seed in ((str(tmp_path / "model"), 0), ("tiny", 5)):
        whole = load_model(name, dtype="bfloat16", seed=seed, quantization=quantization)
        cut = load_model(name, dtype="bfloat16", seed=seed, quantization=quantization, mesh="tp=2")
        assert cut.digest == whole.digest
        assert "2 devices" in repr(cut)
        for one, other in zip(*map(jax.tree.leaves, (cut.params, whole.params)), strict=True):
            np.testing.assert_array_equal(np.asarray(one, np.float32), np.asarray(other, np.float32))
        serving = serving_model(cut, 4)
        for layer in serving.params["layers"]:
            for site in ("qkv", "o", "gate_up", "down"):
                largest = max(jax.tree.leaves(layer[site]), key=lambda leaf: leaf.nbytes)
                assert bytes_of(largest) * 2 == largest.nbytes
        assert bytes_of(serving.params["embed"]) * 2 == serving.params["embed"].nbytes


def test_what_computes_on_one_device_refuses_a_model_that_is_cut(lively):
    model = spread_model(lively, "tp=2")
    for call in (lambda: logprobs(model, [[1, 2]], [[3]]), lambda: Trainer(model), lambda: spread_model(model, "tp=2")):
        with pytest.raises(ModelError, match=r"several devices|2 devices"):
            call()


def test_the_serving_layout_of_a_cut_model_is_an_engines_alone(tiny):
    """``[q_i|k_i|v_i]`` would be read as ``[q|k|v]``; canonical weights are right however they are cut."""
    tokens = np.arange(6, dtype=np.int32)[None]
    cut = load_model("tiny", dtype="float32", mesh="tp=2")
    expected = forward(tiny.config, tiny.params, tokens)
    np.testing.assert_allclose(forward(cut.config, cut.params, tokens), expected, atol=1e-4)
    with pytest.raises(ConfigError, match="qkv lies in the serving layout over 2 devices, which an engine alone"):
        forward(cut.config, serving_model(cut, 4).params, tokens)


def test_a_mesh_for_training_cuts_no_model(tiny):
    mesh = Placement.parse("fsdp=2")
    for cut in (lambda: spread_model(tiny, mesh), lambda: load_model("tiny", mesh=mesh)):
        with pytest.raises(ConfigError, match="mesh has the axes fsdp; a model is cut by tp=N alone"):
            cut()


def test_a_model_that_cannot_be_cut_so_is_refused(lively):
    with pytest.raises(ConfigError, match="cannot be cut over 4 devices: num_key_value_heads 2 is no multiple of it; "
                                          "give tp=1 or 2"):  # fmt: skip
        load_model("tiny", mesh="tp=4")
    with pytest.raises(ConfigError, match="give tp=1 or 2"):
        spread_model(lively, "tp=8")
    for text, message in (
        ("fsdp=2", "does not run over fsdp, which cuts weights and batches for training; give tp=N"),
        ("tp=2,dp=2", "does not run over dp, copies of the model: start one server for each; give tp=N"),
        ("tp=9", "asks for 9 devices; there are 8"), ("tp=x", "give tp, or tp=N for N devices"),
    ):  # fmt: skip
        with pytest.raises(ConfigError, match=message):
            load_model("tiny", mesh=text)
    with pytest.raises(ConfigError, match="does not run over tp, which cuts the model for serving; give fsdp=N"):
        Placement.parse("tp=2")
    assert load_model("tiny", mesh="tp=1,dp=1").placement == Placement.single()


def lying(spread, tree, axes):
    """Return shapes of arrays that lie so."""

    def one(leaf, own):
        sharding = spread.placement.sharding(leaf.shape, own)
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    return jax.tree.map(one, tree, axes)


@pytest.mark.parametrize(("name", "devices"), [("llama3-70b", 2), ("llama3-70b", 8)])
def test_every_operation_of_a_devices_part_is_a_kernel_of_a_gpu(name, devices, caplog):
    """Lowered for one: what a kernel does not take is logged."""
    triton = pytest.importorskip("kernels.triton")
    config = dataclasses.replace(PRESETS[name], num_hidden_layers=2)
    spread, bf16 = Spread(Placement.parse(f"tp={devices}", cuts="tp"), config), jnp.bfloat16
    layout = functools.partial(fused_layout, transpose=False, shards=devices)
    params = jax.eval_shape(layout, abstract_params(config, bf16))
    params = lying(spread, params, logical_axes(params))
    bank = lying(spread, jax.eval_shape(lambda: init_bank(config, 5, bf16)), bank_axes(SITES))
    cache = lying(spread, jax.eval_shape(lambda: init_cache(config, 37, 64, bf16)), cache_axes(config))
    runner_arrays = Arrays(GPU, 8, 4, True, lambda tree: tree)
    logits, slots = jax.ShapeDtypeStruct((8, config.vocab_size), jnp.float32), Slots.empty(8)
    tokens = pack(runner_arrays.packed([], lambda _: {}, 256))
    rows, picks = runner_arrays.rows([], 8), runner_arrays.picks([], [], [], 8)
    pages = RankPages(config, spread, SITES, bf16, 8)
    with dispatch.preferring("triton"), triton.lowering_for(90):
        traced = {
            "prefill": spread.trace(
                functools.partial(device.prefill, spread.config, 256), (params, bank, cache, logits, tokens),
                out=(cache, WHOLE, WHOLE), donate=(2, 3),
            ),
            "decode": spread.trace(
                functools.partial(device.decode, spread.config, 8), (params, cache, logits, slots, rows),
                out=(cache, WHOLE), donate=(1, 2),
            ),
            "decode_adapted": spread.trace(
                functools.partial(device.decode_adapted, spread.config, 8),
                (params, bank, runner_arrays.row_pages([], lambda _: {}, 8), cache, logits, slots, rows),
                out=(cache, WHOLE), donate=(3, 4),
            ),
            "draw": spread.trace(
                device.draw_plain, (logits, slots, picks, constants_of([], 8, plainly=True)[1]), out=WHOLE
            ),
            **{name: pages.trace(name, bank) for name in pages.programs},
        }  # fmt: skip
        texts = {name: one.lower(lowering_platforms=("cuda",)).as_text() for name, one in traced.items()}
    assert not [record for record in caplog.records if record.name == "preft.kernels"], caplog.text
    calls = {name: text.count("@triton_kernel_call") for name, text in texts.items()}
    assert calls == {
        "prefill": 22, "decode": 11, "decode_adapted": 31, "draw": 1, "write-whole-pages": 7, "write-pages": 8
    }  # fmt: skip
    sums = {name: text.count("stablehlo.all_reduce") for name, text in texts.items()}
    # In a prefill, what o and down shrink is summed with what they give.
    assert [sums[name] for name in ("prefill", "decode", "decode_adapted", "draw")] == [9, 5, 5, 0]
