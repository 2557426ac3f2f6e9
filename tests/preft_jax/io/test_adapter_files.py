"""Adapter directories: exact round trips, and refusals that show what is wrong."""

import dataclasses
import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from adapter_dirs import CONFIG, FIXTURES, MODEL, TENSORS, assert_same, copy_fixture, edit_config, edit_tensors, make

from preft_jax.adapters.adapter import Adapter, fold
from preft_jax.adapters.config import AdapterConfig
from preft_jax.errors import AdapterError
from preft_jax.io.adapter_files import load_adapter, read_adapter, save_adapter

CONFIGS = {
    "default": AdapterConfig(rank=4),
    "all-token": AdapterConfig(rank=4, alpha=8, positions="all", base_model="org/base"),
    "everything": AdapterConfig(
        rank=4,
        alpha=7.5,
        use_rslora=True,
        targets=("v", "q", "down"),
        layers=(2, 0),
        rank_pattern={"q": 2, r"layers\.2\.self_attn\.v_proj": 6, "q_proj": 3},
        alpha_pattern={"mlp.down_proj": 3, "v": 1.25},
        positions="f3+l2",
        assistant_turns="skip",
        dropout=0.1,
        base_model="org/base",
        base_model_digest="ab" * 32,
        orthonormal=False,
    ),
    "all but answers": AdapterConfig(rank=2, positions="all", assistant_turns="skip"),
    "loreft": AdapterConfig(kind="loreft", rank=3),
    "loreft unshared": AdapterConfig(kind="loreft", rank=4, positions="f7+l7", share_weights=False, layers=(1,)),
    "direft": AdapterConfig(kind="direft", rank=2, positions="all", dropout=0.25, assistant_turns="skip"),
    "direft free": AdapterConfig(kind="direft", rank=2, orthonormal=False, base_model="x", base_model_digest="cd" * 32),
    "prefix": AdapterConfig(kind="prefix", rank=5, base_model_digest="cd" * 32),
}


# Round trips.


@pytest.mark.parametrize("name", CONFIGS)
def test_native_round_trip_is_exact(tmp_path: Path, name: str, rng: np.random.Generator) -> None:
    adapter = make(CONFIGS[name], rng)
    save_adapter(tmp_path / "a", adapter)
    found = load_adapter(tmp_path / "a", MODEL)
    assert_same(found, adapter)
    assert found.digest == adapter.digest
    assert sorted(os.listdir(tmp_path / "a")) == [CONFIG, TENSORS]


@pytest.mark.parametrize("name", CONFIGS)
def test_reading_without_the_model_gives_the_same_adapter(tmp_path: Path, name: str, rng: np.random.Generator) -> None:
    adapter = make(CONFIGS[name], rng)
    save_adapter(tmp_path / "a", adapter)
    found = read_adapter(tmp_path / "a")
    assert (found.config, found.digest) == (adapter.config, adapter.digest)


@pytest.mark.parametrize("name", CONFIGS)
def test_saving_what_was_loaded_writes_the_same_bytes(tmp_path: Path, name: str, rng: np.random.Generator) -> None:
    save_adapter(tmp_path / "a", make(CONFIGS[name], rng))
    save_adapter(tmp_path / "b", load_adapter(tmp_path / "a", MODEL))
    for file in (CONFIG, TENSORS):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def test_a_native_lora_says_its_rule_in_the_preft_object(tmp_path: Path, rng: np.random.Generator) -> None:
    save_adapter(tmp_path, make(AdapterConfig(rank=4, base_model_digest="ab"), rng))
    contents = json.loads((tmp_path / CONFIG).read_text())
    assert contents["preft"] == {
        "version": 1,
        "kind": "lora",
        "positions": "prompt",
        "assistant_turns": "edit",
        "base_model_digest": "ab",
        "alpha": None,
    }
    assert (contents["peft_type"], contents["r"], contents["lora_alpha"]) == ("LORA", 4, 4)
    names = set(safetensors.numpy.load_file(tmp_path / TENSORS))
    assert "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight" in names
    assert "base_model.model.model.layers.2.mlp.down_proj.lora_B.weight" in names


def test_a_reft_adapter_is_no_peft_adapter(tmp_path: Path, rng: np.random.Generator) -> None:
    save_adapter(tmp_path, make(CONFIGS["loreft"], rng))
    assert "peft_type" not in json.loads((tmp_path / CONFIG).read_text())
    names = set(safetensors.numpy.load_file(tmp_path / TENSORS))
    assert names == {f"layers.{i}.block.{leaf}" for i in range(3) for leaf in ("w", "b", "r")}


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision_parameters_are_stored_and_cast_exactly(
    tmp_path: Path, dtype: Any, rng: np.random.Generator
) -> None:
    adapter = make(CONFIGS["loreft"], rng)
    half = Adapter(adapter.config, jax.tree.map(lambda x: x.astype(dtype), adapter.params))
    save_adapter(tmp_path, half)
    assert {x.dtype for x in safetensors.numpy.load_file(tmp_path / TENSORS).values()} == {np.dtype(dtype)}
    assert_same(load_adapter(tmp_path, MODEL), half)


def test_base_model_can_be_named_at_saving(tmp_path: Path, rng: np.random.Generator) -> None:
    save_adapter(tmp_path, make(CONFIGS["default"], rng), base_model="org/other")
    assert load_adapter(tmp_path, MODEL).config.base_model == "org/other"


# Tensors.


def test_missing_extra_and_misshapen_tensors_are_shown(tmp_path: Path) -> None:
    directory = copy_fixture(tmp_path, "lora")
    prefix = "base_model.model.model.layers.1.self_attn"

    def change(tensors: dict[str, np.ndarray]) -> None:
        tensors[f"{prefix}.qq_proj.lora_A.weight"] = tensors.pop(f"{prefix}.q_proj.lora_A.weight")
        tensors[f"{prefix}.v_proj.lora_A.weight"] = np.zeros((4, 63), np.float32)

    edit_tensors(directory, change)
    with pytest.raises(AdapterError) as raised:
        load_adapter(directory, MODEL)
    message = str(raised.value)
    assert f"missing {prefix}.q_proj.lora_A.weight [4, 64]" in message
    assert f"extra {prefix}.qq_proj.lora_A.weight [4, 64]" in message
    assert f"{prefix}.v_proj.lora_A.weight has shape [4, 63], expected [4, 64]" in message


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("base_model.model.model.embed_tokens.lora_embedding_A", "embeddings cannot be edited"),
        ("base_model.model.lm_head.weight", "lm_head cannot be edited or replaced"),
        ("base_model.model.model.layers.0.self_attn.q_proj.lora_magnitude_vector", "use_dora is not supported"),
    ],
)
def test_extra_tensors_are_explained(tmp_path: Path, name: str, reason: str) -> None:
    directory = copy_fixture(tmp_path, "lora")
    edit_tensors(directory, lambda tensors: tensors.update({name: np.zeros((2, 2), np.float32)}))
    with pytest.raises(AdapterError, match=re.escape(f"extra {name} [2, 2] ({reason}")):
        load_adapter(directory, MODEL)


@pytest.mark.parametrize("read", [read_adapter, lambda path: load_adapter(path, MODEL)], ids=["read", "load"])
def test_a_rank_that_is_not_the_tensors_is_an_error(tmp_path: Path, read: Callable[[Path], Adapter]) -> None:
    directory = copy_fixture(tmp_path, "lora")
    edit_config(directory, lambda contents: contents.update(r=8))
    with pytest.raises(
        AdapterError, match=r"lora_A\.weight has shape \[4, 64\], expected \[8, (64|\*)\].* and \d+ more"
    ):
        read(directory)


@pytest.mark.parametrize("dtype", [np.int32, np.float64, np.uint8])
def test_dtypes_that_are_not_weights_are_refused(tmp_path: Path, dtype: type) -> None:
    directory = copy_fixture(tmp_path, "rslora")
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    edit_tensors(directory, lambda tensors: tensors.update({name: tensors[name].astype(dtype)}))
    with pytest.raises(AdapterError, match=f"q_proj.lora_A.weight has dtype {np.dtype(dtype)}, allowed: float32"):
        load_adapter(directory, MODEL)


@pytest.mark.parametrize("name", ["default", "loreft"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_values_that_are_not_finite_are_neither_loaded_nor_saved(
    tmp_path: Path, name: str, value: float, rng: np.random.Generator
) -> None:
    adapter = make(CONFIGS[name], rng)
    save_adapter(tmp_path, adapter)
    edit_tensors(tmp_path, lambda tensors: next(iter(tensors.values())).__setitem__((0, ...), value))
    with pytest.raises(AdapterError, match="values that are not finite"):
        load_adapter(tmp_path, MODEL)
    broken = Adapter(adapter.config, jax.tree.map(lambda x: np.full_like(x, value), adapter.params))
    with pytest.raises(AdapterError, match="values that are not finite"):
        save_adapter(tmp_path, broken)


def test_an_adapter_for_another_shape_is_refused(tmp_path: Path, rng: np.random.Generator) -> None:
    save_adapter(tmp_path, make(CONFIGS["default"], rng))
    with pytest.raises(AdapterError, match=r"expected \[4, 32\]"):
        load_adapter(tmp_path, dataclasses.replace(MODEL, hidden_size=32))
    with pytest.raises(AdapterError, match=r"missing base_model\.model\.model\.layers\.3\."):
        load_adapter(tmp_path, dataclasses.replace(MODEL, num_hidden_layers=4))
    with pytest.raises(AdapterError, match=r"extra base_model\.model\.model\.layers\.2\."):
        load_adapter(tmp_path, dataclasses.replace(MODEL, num_hidden_layers=2))


@pytest.mark.parametrize(
    "change",
    [
        lambda params: params["layers"][0].pop("block"),
        lambda params: params["layers"][0]["block"].pop("b"),
        lambda params: params["layers"][0]["block"].update(r=np.zeros((3, 64), np.int32)),
        lambda params: params["layers"][0]["block"].update(w=np.zeros((2, 64), np.float32)),
        lambda params: params["layers"][0].update(q={"w": np.zeros((3, 64), np.float32)}),
    ],
    ids=["site", "leaf", "dtype", "rank", "other site"],
)
def test_parameters_that_are_not_the_configs_are_not_saved(
    tmp_path: Path, change: Callable[[Any], object], rng: np.random.Generator
) -> None:
    adapter = make(CONFIGS["loreft"], rng)
    params = jax.tree.map(np.asarray, adapter.params)
    change(params)
    with pytest.raises(AdapterError, match=r"layers\.0\.(block|q)\.\w"):
        save_adapter(tmp_path / "a", Adapter(adapter.config, params))
    assert not (tmp_path / "a").exists()


# The preft object.


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("default", {"position": "all"}, r"unknown key .*'position' \(did you mean 'positions'\?\)"),
        ("default", {"rank": 4}, "unknown key .*'rank'"),
        ("default", {"version": 2}, "version 2.*upgrade preft-jax"),
        ("default", {"version": None}, "version None"),
        ("default", {"kind": "lorax"}, r"kind 'lorax' \(did you mean 'lora'\?\)"),
        ("default", {"kind": ["lora"]}, "unknown kind"),
        ("default", {"positions": "first"}, "positions 'first' is not a rule"),
        ("default", {"positions": 7}, "positions of the 'preft' object is 7"),
        ("default", {"assistant_turns": "keep"}, "assistant_turns 'keep'"),
        ("default", {"base_model_digest": 3}, "base_model_digest"),
        ("default", {"alpha": 3}, "alpha of the 'preft' object is 3"),
        ("default", {"rank_pattern": {"q": 2}}, "rank_pattern is {} but the 'preft' object says {'q': 2}"),
        ("everything", {"share_weights": False, "positions": "prompt"}, "share_weights false needs a ReFT kind"),
        ("loreft", {"rank": "3"}, "rank of the 'preft' object is '3'"),
        ("loreft", {"rank": 4}, r"w has shape \[3, 64\], expected \[4, 64\]"),
        ("loreft", {"rank": 65}, "rank 65 is larger than the model's hidden size 64"),
        ("loreft", {"layers": [0, 5]}, "layers names layer 5"),
        ("loreft", {"layers": [0, 0]}, "negative or repeated"),
        ("loreft", {"layers": [0.5]}, "layers of the 'preft' object"),
        ("loreft", {"orthonormal": 1}, "orthonormal of the 'preft' object is 1"),
        ("loreft", {"dropout": 1.0}, "dropout 1.0 is not allowed"),
    ],
)
def test_bad_preft_objects_are_refused(
    tmp_path: Path, name: str, change: dict[str, Any], message: str, rng: np.random.Generator
) -> None:
    save_adapter(tmp_path, make(CONFIGS[name], rng))
    edit_config(tmp_path, lambda contents: contents["preft"].update(change))
    with pytest.raises(AdapterError, match=message) as raised:
        load_adapter(tmp_path, MODEL)
    assert str(tmp_path) in str(raised.value)


@pytest.mark.parametrize(("name", "key"), [("default", "positions"), ("loreft", "rank"), ("loreft", "kind")])
def test_missing_keys_of_the_preft_object_are_named(
    tmp_path: Path, name: str, key: str, rng: np.random.Generator
) -> None:
    save_adapter(tmp_path, make(CONFIGS[name], rng))
    edit_config(tmp_path, lambda contents: contents["preft"].pop(key))
    with pytest.raises(AdapterError, match=key):
        load_adapter(tmp_path, MODEL)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("default", {"lora_alpha": 8}, "lora_alpha is 8 but the 'preft' object says alpha null"),
        ("default", {"preft": None}, "'preft' is None, not an object"),
        ("default", {"peft_type": None}, "peft_type None is not supported"),
        ("loreft", {"peft_type": "LORA"}, "unknown key of .*'peft_type'"),
        ("loreft", {"base_model_name_or_path": 5}, "base_model_name_or_path is 5"),
    ],
)
def test_contradictions_with_the_preft_object_are_refused(
    tmp_path: Path, name: str, change: Any, message: str, rng: np.random.Generator
) -> None:
    save_adapter(tmp_path, make(CONFIGS[name], rng))
    edit_config(tmp_path, lambda contents: contents.update(change))
    with pytest.raises(AdapterError, match=message):
        load_adapter(tmp_path, MODEL)


# Files.


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff\xfe", b"null", b"[" * 100_000, b"{}"])
def test_damaged_configs_are_named(tmp_path: Path, content: bytes, rng: np.random.Generator) -> None:
    save_adapter(tmp_path, make(CONFIGS["default"], rng))
    (tmp_path / CONFIG).write_bytes(content)
    with pytest.raises(AdapterError, match=CONFIG):
        load_adapter(tmp_path, MODEL)


@pytest.mark.parametrize("file", [CONFIG, TENSORS])
def test_missing_files_are_named(tmp_path: Path, file: str, rng: np.random.Generator) -> None:
    save_adapter(tmp_path, make(CONFIGS["default"], rng))
    (tmp_path / file).unlink()
    with pytest.raises(AdapterError, match=f"{file} does not exist"):
        load_adapter(tmp_path, MODEL)


def test_a_missing_directory_and_a_pickle_are_refused(tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match="nowhere is not a directory"):
        load_adapter(tmp_path / "nowhere", MODEL)
    directory = copy_fixture(tmp_path, "lora")
    (directory / TENSORS).rename(directory / "adapter_model.bin")
    with pytest.raises(AdapterError, match="a pickle, which can run code and is never read"):
        load_adapter(directory, MODEL)


# Base models.


def model_with(digest: str | None, name: str | None = None) -> Any:
    return SimpleNamespace(config=MODEL, digest=digest, name=name)


def test_another_base_model_is_refused_unless_allowed(tmp_path: Path, rng: np.random.Generator) -> None:
    adapter = make(AdapterConfig(rank=2, base_model="org/base", base_model_digest="aa"), rng)
    save_adapter(tmp_path, adapter)
    assert_same(load_adapter(tmp_path, model_with("aa")), adapter)
    with pytest.raises(AdapterError, match=r"digest aa \(org/base\); this one has bb.*allow_base_mismatch=True"):
        load_adapter(tmp_path, model_with("bb"))
    rebased = Adapter(dataclasses.replace(adapter.config, base_model_digest="bb"), adapter.params)
    assert_same(load_adapter(tmp_path, model_with("bb"), allow_base_mismatch=True), rebased)
    assert_same(load_adapter(tmp_path, MODEL), adapter)


def test_a_peft_adapter_for_another_name_warns() -> None:
    with pytest.warns(UserWarning, match="trained on 'tiny-llama' and is loaded for 'org/other'.*only its shapes"):
        load_adapter(FIXTURES / "regex", model_with("aa", "org/other"))
    load_adapter(FIXTURES / "regex", model_with("aa", "/models/Tiny-Llama/"))
    load_adapter(FIXTURES / "regex", model_with("aa", "org/other"), allow_base_mismatch=True)


# Exports.


@pytest.mark.parametrize("name", ["default", "everything", "all but answers"])
def test_a_prefill_only_export_to_peft_asks_for_the_flag(tmp_path: Path, name: str, rng: np.random.Generator) -> None:
    adapter = make(CONFIGS[name], rng)
    with pytest.raises(AdapterError, match=r"EVERY TOOL .* ALL TOKENS.*allow_prefill_only_as_peft=True"):
        save_adapter(tmp_path / "a", adapter, format="peft")
    assert not (tmp_path / "a").exists()
    save_adapter(tmp_path / "a", adapter, format="peft", allow_prefill_only_as_peft=True)
    exported = load_adapter(tmp_path / "a", MODEL)
    assert exported.config.positions == "all"
    for a, b in zip(jax.tree.leaves(fold(exported)), jax.tree.leaves(fold(adapter)), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize(
    ("config", "format", "message"),
    [
        (CONFIGS["loreft"], "peft", "PEFT has no loreft adapters"),
        (CONFIGS["default"], "native", "unknown format 'native'"),
    ],
)
def test_exports_that_cannot_be(
    tmp_path: Path, config: AdapterConfig, format: str, message: str, rng: np.random.Generator
) -> None:
    with pytest.raises(AdapterError, match=message):
        save_adapter(tmp_path / "a", make(config, rng), format=format, allow_prefill_only_as_peft=True)
    assert not (tmp_path / "a").exists()
