"""Learned prefixes in the files of Hugging Face PEFT (prefix tuning)."""

import json

import numpy as np
import pytest
import safetensors.numpy
from adapter_dirs import CONFIG, MODEL, TENSORS, assert_same, edit_config, edit_tensors, make

from preft_jax.adapters.config import AdapterConfig
from preft_jax.errors import AdapterError
from preft_jax.io.adapter_files import load_adapter, read_adapter, save_adapter

LENGTH, LAYERS, HEADS, CHANNELS = 5, MODEL.num_hidden_layers, MODEL.num_key_value_heads, MODEL.head_dim


@pytest.fixture
def prefix(rng):
    return make(AdapterConfig(kind="prefix", rank=LENGTH, base_model="org/base"), rng)


def test_an_export_is_what_peft_reads(tmp_path, prefix):
    """PEFT splits the width into layers times two, heads and channels, in this order."""
    save_adapter(tmp_path, prefix, format="peft")
    contents = json.loads((tmp_path / CONFIG).read_text())
    assert (contents["peft_type"], contents["task_type"]) == ("PREFIX_TUNING", "CAUSAL_LM")
    assert (contents["num_virtual_tokens"], contents["prefix_projection"]) == (LENGTH, False)
    assert "preft" not in contents
    tensors = safetensors.numpy.load_file(tmp_path / TENSORS)
    past = tensors["prompt_embeddings"].reshape(1, LENGTH, LAYERS * 2, HEADS, CHANNELS).transpose(2, 0, 3, 1, 4)
    for layer, sites in enumerate(prefix.params["layers"]):
        for which, name in enumerate("kv"):
            expected = sites["prefix"][name].reshape(LENGTH, HEADS, CHANNELS).transpose(1, 0, 2)
            np.testing.assert_array_equal(past[2 * layer + which, 0], expected)


def test_what_peft_wrote_is_read_with_and_without_its_model(tmp_path, prefix):
    save_adapter(tmp_path, prefix, format="peft")
    assert_same(load_adapter(tmp_path, MODEL), prefix)
    with pytest.raises(AdapterError, match=r"num_layers is None; .*load the adapter for its base model"):
        read_adapter(tmp_path)
    sizes = {"num_layers": LAYERS, "token_dim": HEADS * CHANNELS, "num_attention_heads": HEADS, "peft_version": "0.21"}
    edit_config(tmp_path, lambda contents: contents.update(sizes))
    assert_same(read_adapter(tmp_path), prefix)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"num_virtual_tokens": 4}, r"prompt_embeddings .*\[4, 192\]"),
        ({"num_virtual_tokens": None}, "lacks 'num_virtual_tokens'"),
        ({"num_virtual_tokens": 1025}, "rank 1025"),
        ({"num_layers": 2}, "num_layers is 2; the base model has 3"),
        ({"num_layers": "3"}, "num_layers is '3'; give an integer"),
        ({"task_type": "SEQ_CLS"}, "task_type is 'SEQ_CLS'; only 'CAUSAL_LM'"),
        ({"num_transformer_submodules": 2}, "num_transformer_submodules is 2; only 1"),
        ({"token_dims": 3}, "token_dims"),
    ],
)
def test_what_is_no_prefix_of_the_model_is_refused(change, told, tmp_path, prefix):
    save_adapter(tmp_path, prefix, format="peft")
    edit_config(tmp_path, lambda contents: contents.update(change))
    with pytest.raises(AdapterError, match=told):
        load_adapter(tmp_path, MODEL)


def test_a_width_that_its_layers_do_not_divide_is_told(tmp_path, prefix):
    save_adapter(tmp_path, prefix, format="peft")
    edit_config(tmp_path, lambda contents: contents.update(num_layers=LAYERS))
    edit_tensors(tmp_path, lambda tensors: tensors.update(prompt_embeddings=tensors["prompt_embeddings"][:, 1:].copy()))
    with pytest.raises(AdapterError, match="no multiple of 2 x 3"):
        read_adapter(tmp_path)
