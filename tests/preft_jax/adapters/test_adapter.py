"""Adapters: what a configuration refuses, and folds and digests against the papers' equations in float64."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from hypothesis import given
from hypothesis import strategies as st

from preft_jax import Adapter, AdapterConfig, AdapterError, ConfigError, ModelConfig, fold, init_adapter, random_adapter
from preft_jax.adapters.adapter import check_fits
from preft_jax.adapters.builtin_kinds import orthonormal_rows
from preft_jax.adapters.config import MAX_RANK, adapter_shapes
from preft_jax.adapters.fold import fold_params
from preft_jax.shapes import LINEAR_SITES

MODEL = ModelConfig(
    vocab_size=32, hidden_size=12, intermediate_size=20, num_hidden_layers=3, num_attention_heads=3,
    num_key_value_heads=1, head_dim=4,
)  # fmt: skip
KEY = jax.random.key(5)

RED = {"kind": "loreft", "rank": 3}


def adapter(key=KEY, **fields):
    return random_adapter(AdapterConfig(**fields), MODEL, key, strength=1.0)


# Configurations.


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"kind": "lorra"}, "'lorra'.*did you mean 'lora'"),
        ({"kind": ""}, "unknown adapter kind ''"),
        ({"kind": None}, "kind"),
        ({"targets": ("q_proj",)}, "unknown target 'q_proj' for kind 'lora'.*allowed: q, k, v, o, gate, up, down"),
        ({"targets": ("gat",)}, "did you mean 'gate'"),
        ({"targets": ("block",)}, "unknown target 'block' for kind 'lora'"),
        ({"targets": ("q", "q")}, "twice"),
        ({"targets": "qv"}, "targets"),
        ({"kind": "loreft", "targets": ("q",)}, "unknown target 'q' for kind 'loreft'.*allowed: block"),
        ({"rank": 0}, "rank 0.*1 to"),
        ({"rank": -3}, "rank -3"),
        ({"rank": True}, "rank True"),
        ({"rank": 8.0}, "rank 8.0"),
        ({"rank": "8"}, "rank '8'"),
        ({"rank": None}, "rank None"),
        ({"rank": MAX_RANK + 1}, f"rank {MAX_RANK + 1}.*1 to {MAX_RANK}"),
        ({"rank_pattern": {"q_proj": 0}}, "rank 0 of 'q_proj'"),
        ({"rank_pattern": {"q_proj": False}}, "rank False of 'q_proj'"),
        ({"rank_pattern": {"q_proj": MAX_RANK + 1}}, "q_proj"),
        ({"rank_pattern": {"(": 4}}, r"'\('"),
        ({"alpha_pattern": {"[": 4.0}}, r"'\['"),
        ({"alpha": float("nan")}, "alpha nan"),
        ({"alpha": float("inf")}, "alpha inf"),
        ({"alpha": "16"}, "alpha '16'"),
        ({"alpha_pattern": {"k_proj": float("inf")}}, "alpha inf of 'k_proj'"),
        ({"positions": "f7+r7"}, "positions 'f7\\+r7'"),
        ({"positions": "f0+l0"}, "edits no token"),
        ({"positions": None}, "positions None"),
        ({"assistant_turns": "keep"}, "assistant_turns 'keep'.*'edit' or 'skip'"),
        ({"dropout": 1.0}, "dropout 1.0"),
        ({"dropout": -0.1}, "dropout -0.1"),
        ({"dropout": float("nan")}, "dropout nan"),
        ({"layers": (0, 0)}, "layers.*repeated"),
        ({"layers": (-1,)}, "layers.*negative"),
        ({"layers": ()}, "layers"),
        ({"layers": 3}, "layers is 3"),
        ({"dropout": "0.1"}, "dropout '0.1'"),
        ({"rank_pattern": {"(?i)q_proj": 4}}, "q_proj"),
        ({"share_weights": False}, "share_weights.*'lora'"),
        ({"share_weights": False, "positions": "f7+l7"}, "share_weights.*'lora'"),
        ({"kind": "loreft", "share_weights": False}, "share_weights.*'prompt'"),
        ({"kind": "loreft", "share_weights": False, "positions": "all"}, "share_weights.*'all'"),
        ({"kind": "loreft", "alpha": 8.0}, "alpha.*'loreft'"),
        ({"kind": "direft", "use_rslora": True}, "use_rslora.*'direft'"),
        ({"kind": "direft", "rank_pattern": {"block": 4}}, "rank_pattern.*'direft'"),
        ({"kind": "loreft", "alpha_pattern": {"block": 4.0}}, "alpha_pattern.*'loreft'"),
        ({"kind": "loreft", "orthonormal": False}, "orthonormal"),
    ],
    ids=str,
)
def test_a_config_that_cannot_work_is_refused_by_name(fields, text):
    with pytest.raises(ConfigError, match=f"(?s){text}"):
        AdapterConfig(**fields)


def test_unknown_fields_are_refused():
    with pytest.raises(TypeError, match="lora_alpha"):
        AdapterConfig(lora_alpha=3)


def test_defaults():
    assert AdapterConfig().targets == LINEAR_SITES
    assert AdapterConfig(kind="loreft").targets == ("block",)
    assert AdapterConfig().positions == "prompt"
    assert AdapterConfig().assistant_turns == "edit"
    assert [AdapterConfig(positions=p).prefill_only for p in ("prompt", "f2", "f2+l2", "all")] == [1, 1, 1, 0]
    with pytest.raises(dataclasses.FrozenInstanceError):
        AdapterConfig().rank = 3


def test_patterns_match_the_end_of_the_module_path_first_match_wins():
    config = AdapterConfig(
        rank=4,
        alpha=3.0,
        rank_pattern={"layers.1.self_attn.q_proj": 5, "q_proj": 6, r"layers\.[02]\.mlp\..*": 7, "v": 8},
        alpha_pattern={"up_proj": 21.0, "o": 2.0},
    )
    assert [config.rank_at(i, "q") for i in range(3)] == [6, 5, 6]
    assert [config.rank_at(i, "down") for i in range(3)] == [7, 4, 7]
    assert [config.rank_at(0, site) for site in ("k", "v", "o")] == [4, 8, 4]
    assert config.scale_at(0, "up") == 21.0 / 7
    assert config.scale_at(1, "up") == 21.0 / 4
    assert config.scale_at(1, "o") == 2.0 / 4
    assert config.scale_at(1, "q") == 3.0 / 5


def test_a_pattern_does_not_match_part_of_a_name_or_another_layer():
    config = AdapterConfig(rank=4, rank_pattern={"proj": 5, "1.self_attn.q_proj": 6, "p_proj": 7})
    assert config.rank_at(11, "q") == 4
    assert config.rank_at(1, "q") == 6
    assert config.rank_at(1, "up") == 4


def test_scale_of_lora_and_rslora():
    assert AdapterConfig(rank=8).scale_at(0, "q") == 1.0
    assert AdapterConfig(rank=8, alpha=4).scale_at(0, "q") == 0.5
    assert AdapterConfig(rank=16, alpha=4, use_rslora=True).scale_at(0, "q") == 1.0


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"layers": (0, 3)}, "layer 3.*layers 0 to 2"),
        ({"kind": "loreft", "rank": 13}, "rank 13.*hidden size 12"),
        ({"kind": "direft", "rank": 13}, "rank 13.*hidden size 12"),
    ],
)
def test_a_config_that_does_not_fit_the_model_is_refused(fields, text):
    with pytest.raises(ConfigError, match=text):
        init_adapter(AdapterConfig(**fields), MODEL, KEY)


# Folds.

FOLDED = {
    "lora": {"rank": 3},
    "alpha": {"rank": 3, "alpha": 7.5},
    "rslora": {"rank": 5, "alpha": 7.5, "use_rslora": True},
    "patterns": {"rank": 3, "alpha": 2.0, "rank_pattern": {"q_proj": 6, "layers.1.mlp.up_proj": 2},
                     "alpha_pattern": {"down_proj": 9.0, "layers.2.self_attn.q_proj": 1.5}},
    "rslora patterns": {"rank": 3, "use_rslora": True, "rank_pattern": {"q_proj": 6}},
    "one site, one layer": {"rank": 3, "targets": ("o",), "layers": (1,)},
    "rank above the width": {"rank": 30, "targets": ("k", "down")},
    "loreft": {"kind": "loreft", "rank": 4},
    "loreft of full rank": {"kind": "loreft", "rank": 12},
    "loreft, own weights": {"kind": "loreft", "rank": 4, "positions": "f2+l3", "share_weights": False},
    "direft": {"kind": "direft", "rank": 4},
    "direft, free": {"kind": "direft", "rank": 4, "orthonormal": False},
    "direft, own weights": {"kind": "direft", "rank": 4, "positions": "f2+l3", "share_weights": False},
}  # fmt: skip


@pytest.mark.parametrize("name", FOLDED)
def test_fold_is_the_papers_intervention(name, rng):
    """Every site, every combination of mask columns; float32 folds of O(1) numbers, 12 to 30 wide: 1e-5."""
    one = adapter(**FOLDED[name])
    folded = fold(one)
    assert len(folded["layers"]) == MODEL.num_hidden_layers
    assert any(folded["layers"])
    for layer, sites in enumerate(folded["layers"]):
        assert set(sites) == set(one.params["layers"][layer])
        for site, edit in sites.items():
            d, f = MODEL.site_shape(site)
            x = rng.standard_normal((4, d))
            y = x if site == "block" else rng.standard_normal((4, f))
            mask = np.array([[0, 0], [1, 0], [0, 1], [1, 1]], bool)
            if one.config.share_weights:
                mask[:, 1] = False
            a, c, b = (reference.f64(leaf) for leaf in edit[:3])
            assert all(leaf.dtype == np.float32 for leaf in edit[:3])
            assert edit.group_R.dtype == np.int32
            switched = mask[:, np.asarray(edit.group_R)]
            ours = y + (switched * (x @ a + c)) @ b
            np.testing.assert_allclose(ours, reference.edited(one, layer, site, x, y, mask), rtol=1e-5, atol=1e-5)
            assert not np.allclose(ours[1], y[1], atol=1e-2)


def test_own_weights_are_two_adapters_one_for_each_end(rng):
    """Group 0's rows fold as an adapter of their own, and so do group 1's."""
    fields = {"kind": "loreft", "rank": 3, "positions": "f2+l3"}
    both = adapter(share_weights=False, **fields)
    folded = fold(both)["layers"]
    for group in range(2):
        own = slice(3 * group, 3 * group + 3)
        half = Adapter(AdapterConfig(**fields), jax.tree.map(lambda leaf, own=own: leaf[own], both.params))
        for sites, alone in zip(folded, fold(half)["layers"], strict=True):
            mine = np.asarray(sites["block"].group_R) == group
            np.testing.assert_allclose(sites["block"].a_DR[:, mine], alone["block"].a_DR, atol=1e-6)
            np.testing.assert_allclose(sites["block"].b_RF[mine], alone["block"].b_RF, atol=1e-6)


@pytest.mark.parametrize("name", FOLDED)
def test_fold_of_a_new_adapter_changes_nothing(name):
    folded = fold(init_adapter(AdapterConfig(**FOLDED[name]), MODEL, KEY))
    for sites in folded["layers"]:
        for edit in sites.values():
            x = np.eye(edit.a_DR.shape[0])
            np.testing.assert_allclose((x @ edit.a_DR + edit.c_R) @ edit.b_RF, 0, atol=1e-6)


def test_a_new_adapter_can_learn():
    """Its gradient is not zero at every leaf, which a fold with both factors zero would give."""
    for fields in ({"rank": 3}, {"kind": "loreft", "rank": 3}, {"kind": "direft", "rank": 3}):
        new = init_adapter(AdapterConfig(**fields), MODEL, KEY)

        def loss(params, config=new.config):
            site = config.targets[0]
            edit = fold_params(config, params)["layers"][0][site]
            return jnp.sum(((jnp.ones((1, MODEL.hidden_size)) @ edit.a_DR + edit.c_R) @ edit.b_RF)[0, :3])

        grads = jax.grad(loss)(new.params)["layers"][0][new.config.targets[0]]
        assert max(float(jnp.abs(leaf).max()) for leaf in grads.values()) > 1e-3


@pytest.mark.parametrize("name", ["rslora patterns", "loreft", "loreft, own weights", "direft"])
def test_gradients_pass_through_the_fold(name, rng):
    """Against central differences of the float64 intervention; 1e-2 of the gradient, for steps in float32 leaves."""
    one = adapter(**FOLDED[name])
    site = one.config.targets[0]
    x = rng.standard_normal((3, MODEL.site_shape(site)[0]))
    seen = rng.standard_normal((3, MODEL.site_shape(site)[1]))
    mask = np.array([[1, 0], [0, not one.config.share_weights], [1, 0]], bool)

    def loss(params):
        edit = fold_params(one.config, params)["layers"][1][site]
        s = jnp.where(mask[:, np.asarray(edit.group_R)], jnp.asarray(x, jnp.float32) @ edit.a_DR + edit.c_R, 0)
        return jnp.sum(jnp.asarray(seen, jnp.float32) * (s @ edit.b_RF))

    grads = jax.grad(loss)(jax.tree.map(jnp.asarray, one.params))["layers"][1][site]
    for leaf, grad in grads.items():
        direction = rng.standard_normal(grad.shape)
        values = []
        for step in (1e-5, -1e-5):
            params = {"layers": [dict(sites) for sites in one.params["layers"]]}
            moved = dict(params["layers"][1][site])
            moved[leaf] = reference.f64(moved[leaf]) + step * direction
            params["layers"][1][site] = moved
            y = np.zeros_like(seen)
            values.append(np.sum(seen * reference.edited(Adapter(one.config, params), 1, site, x, y, mask)))
        expected = (values[0] - values[1]) / 2e-5
        assert float(np.sum(grad * direction)) == pytest.approx(expected, rel=1e-2, abs=1e-3)


def test_fold_reads_the_parameters_it_is_given_in_float32():
    one = adapter(rank=3)
    half = Adapter(one.config, jax.tree.map(lambda leaf: leaf.astype(np.float16), one.params))
    for sites in fold(half)["layers"]:
        assert all(edit.a_DR.dtype == jnp.float32 and edit.b_RF.dtype == jnp.float32 for edit in sites.values())


@given(st.sampled_from([(1, 1), (1, 5), (3, 3), (4, 9)]), st.integers(0, 2**32 - 1))
def test_orthonormal_rows(shape, seed):
    """Rows are orthonormal, span what was given in Gram-Schmidt's order, and stay as they are if they already are."""
    given_rows = np.random.default_rng(seed).standard_normal(shape).astype(np.float32)
    if np.linalg.cond(given_rows) > 1e3:
        return
    rows = np.asarray(orthonormal_rows(given_rows))
    np.testing.assert_allclose(rows @ rows.T, np.eye(shape[0]), atol=1e-5)
    np.testing.assert_allclose(rows, reference.orthonormal(given_rows), atol=1e-3)
    np.testing.assert_allclose(orthonormal_rows(rows), rows, atol=1e-5)
    np.testing.assert_allclose(orthonormal_rows(3 * given_rows), rows, atol=1e-5)


def test_orthonormal_rows_leaves_negative_unit_rows_alone():
    rows = -np.eye(4, 6, dtype=np.float32)
    np.testing.assert_allclose(orthonormal_rows(rows), rows, atol=1e-6)


# Initialisation.


def test_init_is_lora_as_in_peft_and_loreft_with_orthonormal_rows():
    lora = init_adapter(AdapterConfig(rank=3), MODEL, KEY).params["layers"][0]["down"]
    assert lora["lora_a"].shape == (3, 20)
    assert lora["lora_b"].shape == (12, 3)
    assert not lora["lora_b"].any()
    assert 0.5 * 20**-0.5 < np.abs(lora["lora_a"]).max() <= 20**-0.5
    loreft = init_adapter(AdapterConfig(kind="loreft", rank=3), MODEL, KEY).params["layers"][0]["block"]
    np.testing.assert_allclose(loreft["r"] @ loreft["r"].T, np.eye(3), atol=1e-6)
    np.testing.assert_array_equal(loreft["w"], loreft["r"])
    assert not loreft["b"].any()


def test_init_depends_on_the_key_alone():
    config = AdapterConfig(rank=3)
    first, again = (init_adapter(config, MODEL, jax.random.key(1)) for _ in range(2))
    other = init_adapter(config, MODEL, jax.random.key(2))
    assert first.digest == again.digest
    assert not np.array_equal(first.params["layers"][0]["q"]["lora_a"], other.params["layers"][0]["q"]["lora_a"])
    layers = first.params["layers"]
    assert not np.array_equal(layers[0]["q"]["lora_a"], layers[1]["q"]["lora_a"])


def test_unedited_layers_are_empty():
    params = init_adapter(AdapterConfig(rank=3, layers=(2, 0), targets=("q", "v")), MODEL, KEY).params
    assert [set(sites) for sites in params["layers"]] == [{"q", "v"}, set(), {"q", "v"}]


# Digests.


def bumped(one, layer=1, site=None, leaf=None, by=1e-3):
    """Return the adapter with one number of one leaf changed."""
    site = site or one.config.targets[0]
    leaf = leaf or next(iter(one.params["layers"][layer][site]))
    params = jax.tree.map(np.copy, one.params)
    params["layers"][layer][site][leaf].flat[0] += by
    return Adapter(one.config, params)


def test_equal_adapters_have_equal_digests():
    for fields in ({"rank": 3}, RED):
        assert adapter(**fields).digest == adapter(**fields).digest
        assert len(adapter(**fields).digest) == 64


def test_digest_is_of_what_is_computed_and_not_of_how_it_is_stored():
    one = adapter(rank=3)
    on_device = Adapter(one.config, jax.tree.map(jnp.asarray, one.params))
    reordered = Adapter(one.config, {"layers": [dict(reversed(sites.items())) for sites in one.params["layers"]]})
    assert one.digest == on_device.digest == reordered.digest


@pytest.mark.parametrize(
    "fields", [{"dropout": 0.1}, {"base_model": "someone/else"}, {"base_model_digest": "f" * 64}]
)  # fmt: skip
def test_digest_ignores_training_and_names(fields):
    one = adapter(rank=3)
    assert Adapter(dataclasses.replace(one.config, **fields), one.params).digest == one.digest


@pytest.mark.parametrize("leaf", ["lora_a", "lora_b"])
def test_digest_sees_every_leaf_of_lora(leaf):
    one = adapter(rank=3)
    digests = {bumped(one, layer, site, leaf).digest for layer in range(3) for site in LINEAR_SITES}
    assert len(digests | {one.digest}) == 22


def test_digest_sees_every_leaf_of_reft():
    one = adapter(**RED)
    digests = {bumped(one, layer, "block", leaf).digest for layer in range(3) for leaf in ("w", "b", "r")}
    assert len(digests | {one.digest}) == 10


@pytest.mark.parametrize(
    "fields",
    [
        {"positions": "all"},
        {"positions": "f3+l2"},
        {"assistant_turns": "skip"},
        {"alpha": 4.0},
        {"use_rslora": True},
        {"alpha_pattern": {"q_proj": 4.0}},
    ],
)  # fmt: skip
def test_digest_sees_position_rule_turn_rule_and_scale(fields):
    one = adapter(rank=3)
    assert Adapter(dataclasses.replace(one.config, **fields), one.params).digest != one.digest


def test_digest_sees_kind_and_orthonormality():
    one = adapter(kind="direft", rank=3)
    params = init_adapter(AdapterConfig(kind="direft", rank=3), MODEL, KEY).params
    digests = {
        Adapter(AdapterConfig(kind="direft", rank=3), one.params).digest,
        Adapter(AdapterConfig(kind="direft", rank=3, orthonormal=False), one.params).digest,
        Adapter(AdapterConfig(kind="loreft", rank=3), one.params).digest,
    }
    assert len(digests) == 3
    # Folds that are bit for bit alike, all zero but for B: the kind alone tells these two apart.
    still = {"layers": [{"block": {"w": s["block"]["r"], "b": s["block"]["b"], "r": s["block"]["r"]}}
                        for s in params["layers"]]}  # fmt: skip
    assert (
        Adapter(AdapterConfig(kind="loreft", rank=3), still).digest
        != Adapter(AdapterConfig(kind="direft", rank=3), params).digest
    )


def test_digest_sees_shared_weights():
    """Two groups of rank 2, and one of rank 4, from the same rows."""
    fields = {"kind": "direft", "positions": "f3+l2", "orthonormal": False}
    own = adapter(rank=2, share_weights=False, **fields)
    assert Adapter(AdapterConfig(rank=4, **fields), own.params).digest != own.digest


def test_digest_sees_which_site_and_which_layer():
    one = adapter(rank=3, targets=("gate",), layers=(0,))
    empty = {}
    leaves = one.params["layers"][0]["gate"]
    moved = [
        Adapter(AdapterConfig(rank=3, targets=("up",), layers=(0,)), {"layers": [{"up": leaves}, empty, empty]}),
        Adapter(AdapterConfig(rank=3, targets=("gate",), layers=(1,)), {"layers": [empty, {"gate": leaves}, empty]}),
    ]
    assert len({one.digest, *(m.digest for m in moved)}) == 3


# Fit.


def test_an_adapter_fits_its_model():
    for fields in FOLDED.values():
        check_fits(adapter(**fields), MODEL)


def without(params, layer, site, leaf):
    params = {"layers": [{name: dict(leaves) for name, leaves in sites.items()} for sites in params["layers"]]}
    del params["layers"][layer][site][leaf]
    return params


def test_misfits_are_listed_by_name_with_shapes():
    one = adapter(rank=3)
    params = without(one.params, 1, "q", "lora_a")
    params["layers"][2]["k"]["lora_c"] = np.zeros((2, 5), np.float32)
    params["layers"][0]["up"]["lora_b"] = np.zeros((21, 3), np.float32)
    with pytest.raises(AdapterError) as caught:
        check_fits(Adapter(one.config, params), MODEL)
    text = str(caught.value)
    assert "missing layers.1.q.lora_a [3, 12]" in text
    assert "extra layers.2.k.lora_c [2, 5]" in text
    assert "layers.0.up.lora_b has shape [21, 3], expected [20, 3]" in text


def test_an_adapter_of_another_depth_or_width_does_not_fit():
    one = adapter(rank=3)
    deeper = dataclasses.replace(MODEL, num_hidden_layers=4)
    wider = dataclasses.replace(MODEL, hidden_size=16)
    with pytest.raises(AdapterError, match=r"missing layers\.3\.q\.lora_a"):
        check_fits(one, deeper)
    with pytest.raises(AdapterError, match=r"layers\.0\.q\.lora_a has shape \[3, 12\], expected \[3, 16\]"):
        check_fits(one, wider)
    with pytest.raises(AdapterError, match=r"extra layers\.2\.down\.lora_a \[3, 20\]"):
        check_fits(one, dataclasses.replace(MODEL, num_hidden_layers=2))


def test_a_long_list_of_misfits_is_cut_and_counted():
    one = adapter(rank=3)
    with pytest.raises(AdapterError, match=r"and \d+ more"):
        check_fits(Adapter(one.config, {"layers": [{}, {}, {}]}), MODEL)


def test_shapes_follow_rank_patterns_and_groups():
    config = AdapterConfig(rank=3, rank_pattern={"layers.1.self_attn.k_proj": 5})
    shapes = adapter_shapes(config, MODEL)["layers"]
    assert shapes[1]["k"] == {"lora_a": (5, 12), "lora_b": (4, 5)}
    assert shapes[0]["k"] == {"lora_a": (3, 12), "lora_b": (4, 3)}
    own = AdapterConfig(kind="direft", rank=3, positions="f1+l1", share_weights=False)
    assert adapter_shapes(own, MODEL)["layers"][0]["block"] == {"w": (6, 12), "b": (6,), "r": (6, 12)}
