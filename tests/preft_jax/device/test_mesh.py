"""One table says where arrays lie: each parameter by its name, KV and rank pages by their axes."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, PartitionSpec

from preft_jax.adapters.bank import bank_axes, init_bank
from preft_jax.device.mesh import SINGLE, TABLE, Placement, spec
from preft_jax.errors import ConfigError
from preft_jax.models.cache import KV_AXES
from preft_jax.models.layout import fused_layout
from preft_jax.models.linear import logical_axes
from preft_jax.models.params import AXES, layer_specs, outer_specs

FSDP, TENSOR = AbstractMesh((4,), ("fsdp",)), AbstractMesh((2,), ("tensor",))


def specs(mesh, params):
    return jax.tree.map(lambda leaf, axes: spec(mesh, leaf.shape, axes), params, logical_axes(params))


@pytest.mark.parametrize("transpose", [False, True])
def test_every_weight_is_cut_in_every_layout_and_norms_are_whole(lively, transpose):
    for params in (lively.params, fused_layout(lively.params, transpose=transpose)):
        found = specs(FSDP, params)
        for leaf, one in zip(*map(jax.tree.leaves, (params, found)), strict=True):
            assert [axis for axis in one if axis] == (["fsdp"] if leaf.ndim == 2 else [])


def test_a_linear_and_the_one_behind_it_are_cut_along_the_axis_that_they_share(lively):
    layer = specs(TENSOR, lively.params)["layers"][0]
    assert layer["q"] == layer["up"] == PartitionSpec(None, "tensor")
    assert layer["o"] == layer["down"] == PartitionSpec("tensor", None)


def test_what_does_not_divide_stays_whole():
    assert spec(FSDP, (64, 6), AXES["q"]) == PartitionSpec(None, None)


def test_one_axis_of_the_mesh_cuts_one_axis_of_an_array_the_first_that_divides():
    assert spec(FSDP, (8, 12), ("heads", "mlp")) == PartitionSpec("fsdp", None)
    assert spec(FSDP, (6, 12), ("heads", "mlp")) == PartitionSpec(None, "fsdp")
    both = AbstractMesh((2, 4), ("tensor", "fsdp"))
    assert spec(both, (8, 12, 16), ("heads", "mlp", "vocab")) == PartitionSpec("tensor", "fsdp", None)


def test_kv_pages_are_cut_as_their_linears():
    assert spec(TENSOR, (9, 16, 4, 32), KV_AXES) == PartitionSpec(None, None, "tensor", None)


def test_rank_pages_are_cut_as_their_linears_and_those_of_the_stream_are_whole(lively):
    bank = jax.eval_shape(lambda: init_bank(lively.config, 3, jnp.float32))
    found = jax.tree.map(lambda leaf, axes: spec(TENSOR, leaf.shape, axes), bank, bank_axes(bank.sites)).sites
    whole = PartitionSpec(None, None, None)
    assert found["q"] == found["gate"] == (PartitionSpec(*[None] * 4), whole, PartitionSpec(None, None, None, "tensor"))
    assert found["o"] == found["down"] == (PartitionSpec(None, None, "tensor", None), whole, PartitionSpec(*[None] * 4))
    assert found["block"] == (PartitionSpec(*[None] * 4), whole, PartitionSpec(*[None] * 4))


@pytest.mark.parametrize(
    ("text", "cuts", "told"),
    [
        ("fsdp=2", "tp", "does not run over fsdp, which cuts weights and batches for training; give tp=N"),
        ("tp=2", "fsdp", "does not run over tp, which cuts the model for serving; give fsdp=N"),
        ("tp=1,dp=2", "tp", "does not run over dp, copies of the model: start one server for each; give tp=N"),
        ("tp=99", "tp", "asks for 99 devices"),
        ("tp=0", "tp", "asks for 0 devices"),
        ("tp=", "tp", "is 'tp='; give tp, or tp=N for N devices"),
        ("two", "fsdp", "is 'two'; give fsdp, or fsdp=N for N devices"),
    ],
)
def test_a_mesh_that_a_program_does_not_have_is_refused(text, cuts, told):
    with pytest.raises(ConfigError, match=told):
        Placement.parse(text, cuts=cuts)


@pytest.mark.parametrize("text", [None, "tp=1", "tp=1,dp=1", "fsdp=1"])
def test_one_device_has_no_mesh(text):
    placement = Placement.parse(text, cuts="tp")
    assert placement == SINGLE
    assert (placement.num_devices, placement.num_shards, placement.tensor) == (1, 1, 1)


def test_every_axis_that_a_parameter_names_is_in_the_table(lively):
    config = dataclasses.replace(lively.config, qkv_bias=True, qk_norm=True, tie_word_embeddings=False)
    for one in (*layer_specs(config).values(), *outer_specs(config).values()):
        assert len(one.axes) == len(one.shape)
        assert set(one.axes) <= set(TABLE)
    assert {axis for axes in AXES.values() for axis in axes} | set(KV_AXES) <= set(TABLE)


def test_an_equal_cut_of_the_fused_linears_is_the_fused_linears_of_the_cut_heads(lively, rng):
    """Shard s of q|k|v holds the query heads of its KV groups, their keys and their values."""
    config = lively.config
    layer = lively.params["layers"][0] | {
        f"{site}_bias": jnp.asarray(rng.standard_normal(config.site_shape(site)[1]), jnp.float32) for site in "qkv"
    }
    shards = config.num_key_value_heads
    params = lively.params | {"layers": [layer]}
    cut = fused_layout(params, transpose=False, shards=shards)["layers"][0]
    for s in range(shards):
        own = {name: np.split(np.asarray(layer[name]), shards, axis=-1)[s] for name in ("q", "k", "v", "gate", "up")}
        own |= {f"{site}_bias": np.split(np.asarray(layer[f"{site}_bias"]), shards)[s] for site in "qkv"}
        alone = fused_layout(params | {"layers": [layer | own]}, transpose=False)["layers"][0]
        for name in ("qkv", "gate_up", "qkv_bias"):
            np.testing.assert_array_equal(np.split(np.asarray(cut[name]), shards, axis=-1)[s], alone[name])
    with pytest.raises(ConfigError, match="cannot be cut into 7 equal parts"):
        fused_layout(params, transpose=False, shards=7)


def test_an_axis_given_twice_is_refused():
    with pytest.raises(ConfigError, match="--mesh is 'tp=1,tp=2', which has tp twice; give it once"):
        Placement.parse("tp=1,tp=2", cuts="tp")
