"""PEFT's adapters: what its configs select, tensors that come back the same, and what is refused by name."""

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import safetensors.numpy
from adapter_dirs import CONFIG, FIXTURES, MODEL, TENSORS, assert_same, copy_fixture, edit_config, make

from preft_jax.adapters.config import PEFT_MODULES, AdapterConfig
from preft_jax.errors import AdapterError
from preft_jax.io.adapter_files import load_adapter, read_adapter, save_adapter

pytestmark = pytest.mark.host

PEFT_NAMES = ("lora", "rslora", "patterns", "regex", "all_linear")

PEFT_CONFIGS = {
    "lora": {"rank": 4, "alpha": 8, "dropout": 0.1},
    "rslora": {"rank": 8, "alpha": 4, "use_rslora": True, "targets": ("q", "v")},
    "patterns": {
        "rank": 4,
        "alpha": 6,
        "targets": ("q", "v", "down"),
        "layers": (0, 2),
        "rank_pattern": {r"layers\.2\.self_attn\.v_proj": 6, "q_proj": 2},
        "alpha_pattern": {"model.layers.0.mlp.down_proj": 3, "v_proj": 12},
    },
    "regex": {"rank": 3, "alpha": 3, "targets": ("q", "k", "gate"), "layers": (1, 2)},
    "all_linear": {"rank": 2, "alpha": 2, "targets": ("q", "k", "v", "gate", "up")},
}


@pytest.mark.parametrize("name", PEFT_NAMES)
def test_peft_adapters_load_as_all_token_adapters(name: str) -> None:
    expected = AdapterConfig(positions="all", base_model="tiny-llama", **PEFT_CONFIGS[name])
    adapter = load_adapter(FIXTURES / name, MODEL)
    assert adapter.config == expected
    stored = safetensors.numpy.load_file(FIXTURES / name / TENSORS)
    leaves = jax.tree.leaves(adapter.params)
    assert len(leaves) == len(stored)
    layer = adapter.params["layers"][2]["q"]
    prefix = f"base_model.model.model.layers.2.{PEFT_MODULES['q']}"
    np.testing.assert_array_equal(layer["lora_a"], stored[f"{prefix}.lora_A.weight"].astype(np.float32))
    np.testing.assert_array_equal(layer["lora_b"], stored[f"{prefix}.lora_B.weight"].astype(np.float32))


@pytest.mark.parametrize("name", PEFT_NAMES)
def test_peft_adapters_come_back_with_the_same_tensors(tmp_path: Path, name: str) -> None:
    save_adapter(tmp_path, load_adapter(FIXTURES / name, MODEL), format="peft")
    ours = safetensors.numpy.load_file(tmp_path / TENSORS)
    theirs = safetensors.numpy.load_file(FIXTURES / name / TENSORS)
    assert set(ours) == set(theirs)
    for key, tensor in theirs.items():
        np.testing.assert_array_equal(ours[key], tensor.astype(np.float32))
    assert "preft" not in json.loads((tmp_path / CONFIG).read_text())
    assert_same(load_adapter(tmp_path, MODEL), load_adapter(FIXTURES / name, MODEL))


def test_ranks_and_scales_follow_the_patterns() -> None:
    config = load_adapter(FIXTURES / "patterns", MODEL).config
    assert config.rank_at(0, "q") == 2
    assert config.rank_at(2, "v") == 6
    assert config.scale_at(0, "q") == 6 / 2
    assert config.scale_at(2, "v") == 12 / 6
    assert config.scale_at(0, "down") == 3 / 4
    assert config.scale_at(2, "down") == 6 / 4


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"layers_to_transform": 2}, {"layers": (2,)}),
        ({"layers_to_transform": [2, 0], "layers_pattern": ["h", "layers"]}, {"layers": (2, 0)}),
        ({"layers_to_transform": [1, 7]}, {"layers": (1,)}),
        ({"layers_to_transform": []}, {"layers": None}),
        ({"target_modules": "ALL-LINEAR"}, {"targets": tuple(PEFT_MODULES)}),
        ({"target_modules": "all-linear", "exclude_modules": ["mlp.up_proj", "down_proj", "gate_proj"]},
         {"targets": ("q", "k", "v", "o")}),
        ({"target_modules": r".*\.layers\.[01]\.self_attn\.(k|v)_proj"}, {"targets": ("k", "v"), "layers": (0, 1)}),
        ({"target_modules": [f"model.layers.{i}.mlp.up_proj" for i in (0, 2)]}, {"targets": ("up",), "layers": (0, 2)}),
        ({"target_modules": ["self_attn.q_proj", "c_attn"]}, {"targets": ("q",)}),
        ({"rank_pattern": {"^model.layers.0.self_attn.q_proj": 5, "q_proj|v_proj": 3}},
         {"rank_pattern": {"^model.layers.0.self_attn.q_proj": 5, "q_proj|v_proj": 3}}),
        ({"rank_pattern": {"q": 9}}, {"rank_pattern": {}}),
        ({"eva_config": {"rho": 2.0}, "init_lora_weights": "eva", "peft_version": "9", "new_feature": None}, {}),
    ],
)  # fmt: skip
def test_peft_rules_of_selection(
    tmp_path: Path, change: dict[str, Any], expected: dict[str, Any], rng: np.random.Generator
) -> None:
    config = AdapterConfig(**({"rank": 4, "alpha": 8, "targets": ("q", "v"), "positions": "all"} | expected))
    save_adapter(tmp_path, make(config, rng), format="peft")
    edit_config(tmp_path, lambda contents: contents.update({"layers_to_transform": None, **change}))
    if "target_modules" not in change:
        edit_config(tmp_path, lambda contents: contents.update(target_modules=["v_proj", "q_proj"]))
    assert load_adapter(tmp_path, MODEL).config == config


ALORA = AdapterConfig(rank=4, positions="all", alora_invocation_tokens=(7, 7, 3), base_model="tiny-llama")
"""What PEFT calls an activated LoRA."""


def test_an_activated_lora_of_peft_edits_every_token_from_its_marker_on(tmp_path: Path) -> None:
    directory = copy_fixture(tmp_path, "lora")
    edit_config(directory, lambda contents: contents.update(alora_invocation_tokens=[7, 7, 3]))
    adapter = load_adapter(directory, MODEL)
    assert (adapter.config.positions, adapter.config.alora_invocation_tokens) == ("all", (7, 7, 3))
    assert not adapter.config.prefill_only
    assert read_adapter(directory).config == adapter.config


@pytest.mark.parametrize("format", ["peft", "preft"])
def test_an_activated_lora_is_saved_with_its_marker(tmp_path: Path, format: str, rng: np.random.Generator) -> None:
    adapter = make(ALORA, rng)
    save_adapter(tmp_path, adapter, format=format)
    contents = json.loads((tmp_path / CONFIG).read_text())
    assert contents["alora_invocation_tokens"] == [7, 7, 3]
    assert ("preft" in contents) == (format == "preft")
    found = load_adapter(tmp_path, MODEL)
    assert (found.config.positions, found.config.alora_invocation_tokens) == ("all", (7, 7, 3))


def test_one_for_prompts_alone_is_exported_with_the_flag_only(tmp_path: Path, rng: np.random.Generator) -> None:
    adapter = make(AdapterConfig(rank=4, alora_invocation_tokens=(5,)), rng)
    with pytest.raises(AdapterError, match="ALL TOKENS FROM ITS MARKER ON, generated ones too"):
        save_adapter(tmp_path, adapter, format="peft")
    save_adapter(tmp_path / "a", adapter, format="peft", allow_prefill_only_as_peft=True)
    exported = load_adapter(tmp_path / "a", MODEL)
    assert (exported.config.positions, exported.config.alora_invocation_tokens) == ("all", (5,))
    save_adapter(tmp_path / "b", adapter)
    assert_same(load_adapter(tmp_path / "b", MODEL), adapter)


def test_other_kinds_keep_a_marker_in_their_own_object(tmp_path: Path, rng: np.random.Generator) -> None:
    for at, kind in enumerate(("loreft", "direft", "edits")):
        adapter = make(AdapterConfig(kind=kind, rank=3, alora_invocation_tokens=(1, 2)), rng)
        save_adapter(tmp_path / str(at), adapter)
        assert_same(load_adapter(tmp_path / str(at), MODEL), adapter)


@pytest.mark.parametrize(
    ("marker", "message"),
    [
        ("text", "alora_invocation_tokens is 'text'; give a list of token ids"),
        ([], "give a tuple of 1 to 256 token ids"),
        ([1.5], "give a tuple of 1 to 256 token ids"),
        ([-1], "give a tuple of 1 to 256 token ids"),
        ([True], "give a tuple of 1 to 256 token ids"),
        ([3] * 257, "give a tuple of 1 to 256 token ids"),
        ([10**6], "holds the token 1000000; the base model has tokens 0 to"),
    ],
)
def test_a_marker_that_is_none_is_refused(tmp_path: Path, marker: Any, message: str) -> None:
    directory = copy_fixture(tmp_path, "lora")
    edit_config(directory, lambda contents: contents.update(alora_invocation_tokens=marker))
    with pytest.raises(AdapterError, match=message) as raised:
        load_adapter(directory, MODEL)
    assert str(directory) in str(raised.value)


def test_different_targets_by_layer_are_refused(tmp_path: Path, rng: np.random.Generator) -> None:
    save_adapter(tmp_path, make(AdapterConfig(rank=4, positions="all"), rng), format="peft")
    expression = r"model\.layers\.(0\.self_attn\.q_proj|1\.self_attn\.[qk]_proj)"
    edit_config(tmp_path, lambda contents: contents.update(target_modules=expression))
    with pytest.raises(AdapterError, match="selects q in layer 0 but q, k in layer 1; only the same targets"):
        load_adapter(tmp_path, MODEL)


REFUSED = {
    "use_dora": True,
    "modules_to_save": ["lm_head"],
    "bias": "lora_only",
    "lora_bias": True,
    "fan_in_fan_out": True,
    "target_parameters": ["mlp.experts.gate_up_proj"],
    "trainable_token_indices": [1, 2],
    "layer_replication": [[0, 2], [1, 3]],
    "use_qalora": True,
    "use_bdlora": {"nblocks": 2},
    "arrow_config": {"top_k": 3},
    "kasa_config": {"beta": 1},
    "monteclora_config": {"num_samples": 8},
    "megatron_config": {"x": 1},
    "task_type": "SEQ_CLS",
    "init_lora_weights": "pissa_niter_4",
    "peft_type": "IA3",
    "a_new_feature": True,
    "target_modules": ["q_proj", "embed_tokens"],
}


@pytest.mark.parametrize("key", REFUSED)
def test_what_cannot_be_computed_is_refused_by_name(tmp_path: Path, key: str) -> None:
    directory = copy_fixture(tmp_path, "lora")
    edit_config(directory, lambda contents: contents.update({key: REFUSED[key]}))
    with pytest.raises(AdapterError, match=key) as raised:
        load_adapter(directory, MODEL)
    assert str(directory) in str(raised.value)
    with pytest.raises(AdapterError, match=key):
        read_adapter(directory)


@pytest.mark.parametrize("value", ["olora", "loftq", "corda", "lora_ga", "pissa"])
def test_initialisations_that_change_the_base_are_refused(tmp_path: Path, value: str) -> None:
    directory = copy_fixture(tmp_path, "lora")
    edit_config(directory, lambda contents: contents.update(init_lora_weights=value))
    with pytest.raises(AdapterError, match=f"init_lora_weights '{value}'.*path_initial_model_for_weight_conversion"):
        load_adapter(directory, MODEL)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("r", "4"), ("r", True), ("r", 0), ("r", 4.0), ("r", None), ("lora_alpha", "8"), ("lora_alpha", None),
        ("lora_alpha", float("nan")), ("lora_dropout", 1.5), ("use_rslora", "yes"), ("target_modules", None),
        ("target_modules", 3), ("target_modules", ["qproj"]), ("target_modules", "(q_proj"), ("target_modules", [3]),
        ("layers_to_transform", ["0"]), ("layers_to_transform", True), ("layers_to_transform", [9]),
        ("layers_pattern", "layers"), ("rank_pattern", [4]), ("rank_pattern", {"q_proj": "4"}),
        ("rank_pattern", {"(": 4}), ("alpha_pattern", {"q_proj": None}), ("exclude_modules", "*"),
        ("base_model_name_or_path", 3),
    ],
)  # fmt: skip
def test_bad_values_in_a_peft_config_are_named(tmp_path: Path, key: str, value: Any) -> None:
    directory = copy_fixture(tmp_path, "lora")
    edit_config(directory, lambda contents: contents.update({key: value}))
    with pytest.raises(AdapterError, match=key.replace("lora_", "")):
        load_adapter(directory, MODEL)
