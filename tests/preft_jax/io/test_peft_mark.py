"""Prefill-only adapters that come back from PEFT: what they are for is known by their mark."""

import json
import re
import shutil

import numpy as np
import pytest

from preft_jax.adapters.config import AdapterConfig
from preft_jax.errors import AdapterError
from preft_jax.io.adapter_files import load_adapter, save_adapter
from tests.adapter_dirs import CONFIG, FIXTURES, MODEL, assert_same, edit_config, make

pytestmark = pytest.mark.host

RETURNED = FIXTURES.parent / "returned"
NAMES = ("prompt", "ends")


def ours(name):
    return load_adapter(RETURNED / "ours" / name, MODEL)


def computes(adapter):
    """What an adapter adds to layer 1's q, float32 ``[F, D]``."""
    edit = adapter.params["layers"][1]["q"]
    return edit["lora_b"] @ edit["lora_a"] * adapter.config.scale_at(1, "q")


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("way", ["resaved", "continued", "combined"])
def test_what_comes_back_from_peft_edits_the_tokens_that_it_did(way, name):
    directory, expected = RETURNED / way / name, ours(name)
    assert "preft" not in json.loads((directory / CONFIG).read_text())
    with pytest.warns(
        UserWarning, match=f"comes back from PEFT.*positions '{re.escape(expected.config.positions)}'"
    ) as said:
        found = load_adapter(directory, MODEL)
    assert str(directory) in str(said[0].message)
    for field in ("kind", "rank", "positions", "assistant_turns", "base_model_digest", "use_rslora", "targets"):
        assert getattr(found.config, field) == getattr(expected.config, field), field
    # 1e-2: of "continued", whose factors are stored in bfloat16. PEFT applies a scale twice to a weighted sum.
    factor = {"resaved": 1.0, "continued": 0.25, "combined": 0.25}[way]
    twice = expected.config.scale_at(1, "q") if (way, name) == ("combined", "ends") else 1.0
    np.testing.assert_allclose(computes(found), factor * twice * computes(expected), rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("name", NAMES)
def test_the_fixtures_are_what_is_written_today(tmp_path, name):
    save_adapter(tmp_path / name, ours(name))
    for file in (RETURNED / "ours" / name).iterdir():
        assert file.read_bytes() == (tmp_path / name / file.name).read_bytes()


def test_one_that_came_back_is_ours_again_once_it_is_saved(tmp_path):
    with pytest.warns(UserWarning, match="comes back"):
        found = load_adapter(RETURNED / "resaved" / "ends", MODEL)
    save_adapter(tmp_path, found)
    assert_same(load_adapter(tmp_path, MODEL), found)


def test_an_all_token_adapter_comes_back_with_its_base_and_without_a_word(tmp_path, rng):
    config = AdapterConfig(rank=2, targets=("q",), positions="all", base_model_digest="1" * 64)
    save_adapter(tmp_path, make(config, rng))
    edit_config(tmp_path, lambda contents: contents.pop("preft"))
    found = load_adapter(tmp_path, MODEL).config
    assert (found.positions, found.base_model_digest) == ("all", "1" * 64)


def test_an_export_for_other_tools_has_no_mark(tmp_path):
    save_adapter(tmp_path, ours("prompt"), format="peft", allow_prefill_only_as_peft=True)
    assert load_adapter(tmp_path, MODEL).config.positions == "all"


OTHER = {"positions": "all", "assistant_turns": "skip", "base_model_digest": "1" * 64}


@pytest.mark.parametrize("field", OTHER)
def test_a_mark_that_contradicts_the_object_is_refused(tmp_path, field):
    directory = shutil.copytree(RETURNED / "ours" / "prompt", tmp_path / "adapter")
    edit_config(directory, lambda contents: contents["preft"].update({field: OTHER[field]}))
    with pytest.raises(
        AdapterError, match=f"the 'preft' object has {field} '{OTHER[field]}', and its mark in megatron_core has"
    ):
        load_adapter(directory, MODEL)


@pytest.mark.parametrize(
    "mark",
    ["preft:", "preft:{", "preft:[]", "preft:" + "[" * 10**5, 'preft:{"version": 1, "kind": "lora"}',
     'preft:{"version": 1, "kind": "direft", "positions": "all", "assistant_turns": "edit", "x": null}'],
)  # fmt: skip
def test_a_mark_that_cannot_be_read_is_refused(tmp_path, mark):
    directory = shutil.copytree(RETURNED / "resaved" / "prompt", tmp_path / "adapter")
    edit_config(directory, lambda contents: contents.update(megatron_core=mark))
    with pytest.raises(AdapterError, match=r"megatron_core is 'preft:.*no mark of a LoRA"):
        load_adapter(directory, MODEL)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [("version", 2, "has version 2"), ("positions", "promt", "promt"), ("positions", 3, "positions of the 'preft'"),
     ("assistant_turns", "keep", "keep"), ("base_model_digest", 7, "SHA-256 in hex")],
)  # fmt: skip
@pytest.mark.filterwarnings("ignore:.*comes back from PEFT")
def test_what_a_mark_says_is_checked_as_the_object_is(tmp_path, field, value, message):
    directory = shutil.copytree(RETURNED / "resaved" / "prompt", tmp_path / "adapter")

    def change(contents):
        mark = json.loads(contents["megatron_core"].removeprefix("preft:")) | {field: value}
        contents["megatron_core"] = "preft:" + json.dumps(mark)

    edit_config(directory, change)
    with pytest.raises(AdapterError, match=message):
        load_adapter(directory, MODEL)
