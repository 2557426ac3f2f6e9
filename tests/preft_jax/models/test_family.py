"""Families are records: what is said of one is what its configs and files are read by."""

import dataclasses

import pytest

from preft_jax.config import PRESETS, config_from_hf, config_to_hf
from preft_jax.errors import ConfigError
from preft_jax.io.weights import tensor_slots
from preft_jax.models.modules import abstract_params
from preft_jax.models.registry import FAMILIES, GGUF_FAMILIES

each_family = pytest.mark.parametrize("record", FAMILIES.values(), ids=FAMILIES)


def config_of(record):
    return dataclasses.replace(PRESETS["tiny"], model_type=record.model_type, **record.layer_options({}))


@each_family
def test_a_config_is_read_back_as_it_was_written(record):
    written = config_to_hf(config_of(record))
    assert written["architectures"] == [record.architecture]
    assert config_from_hf(written) == config_of(record)


@each_family
def test_the_tables_name_every_parameter_once(record):
    config = config_of(record)
    leaves = sum(len(layer) for layer in abstract_params(config)["layers"]) + len(abstract_params(config)) - 1
    for names in (record.hf_names, record.gguf_names):
        assert len(tensor_slots(config, names)) == leaves


@each_family
def test_what_is_not_computed_is_refused_by_name(record):
    written = config_to_hf(config_of(record))
    for field in record.refused:
        with pytest.raises(ConfigError, match=field):
            config_from_hf(written | {field: True})
    with pytest.raises(ConfigError, match="hidden_act 'gelu' is not supported; allowed: 'silu'"):
        config_from_hf(written | {"hidden_act": "gelu"})


def test_only_qwen2_may_have_biases_of_attention():
    assert config_from_hf(config_to_hf(config_of(FAMILIES["qwen2"])) | {"attention_bias": True}).qkv_bias
    with pytest.raises(ConfigError, match="attention_bias true is not supported for model_type 'llama'"):
        config_from_hf(config_to_hf(config_of(FAMILIES["llama"])) | {"attention_bias": True})


@pytest.mark.parametrize("model_type", ["gpt2", ["llama"]])
def test_another_family_is_refused_with_those_there_are(model_type):
    with pytest.raises(ConfigError, match=f"is not supported; allowed: {', '.join(FAMILIES)}"):
        config_from_hf({"model_type": model_type})


def test_gguf_architectures_are_of_one_family_each():
    assert {"llama", "qwen2", "qwen3"} <= GGUF_FAMILIES.keys()
    assert [record for record in GGUF_FAMILIES.values() if record.gguf_permuted] == [FAMILIES["llama"]]
