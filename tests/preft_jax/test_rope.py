"""Rotary settings: read as transformers reads them, wherever they stand, or refused by name."""

import dataclasses
import json
import re
from pathlib import Path

import numpy as np
import pytest

from preft_jax.config import PRESETS, config_from_hf, config_to_hf
from preft_jax.errors import ConfigError
from preft_jax.models.forward import rope_frequencies
from preft_jax.models.registry import FAMILIES
from preft_jax.rope import LinearRope, Llama3Rope, rope_from_hf

pytestmark = pytest.mark.host

FIXTURE = json.loads((Path(__file__).parents[1] / "fixtures" / "rope" / "configs.json").read_text())
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 64}  # fmt: skip


def test_every_config_is_read_as_transformers_reads_it_or_refused():
    """Where both read one, the frequencies agree; what only transformers reads is one of the kinds named below."""
    read, refused = 0, []
    for case in FIXTURE["cases"]:
        settings = case["settings"]
        try:
            config = config_from_hf(FIXTURE["model"] | settings)
        except ConfigError as error:
            refused.append(str(error))
            continue
        read += 1
        assert case["inv_freq"] is not None, settings
        assert case["attention_scaling"] == 1.0, settings
        # 1e-6: float32 on both sides, and the fixture has seven digits.
        np.testing.assert_allclose(rope_frequencies(config), case["inv_freq"], rtol=1e-6, err_msg=str(settings))
    assert read > 50
    assert all(re.search("rope|partial_rotary_factor|original_max_position_embeddings", error) for error in refused)


@pytest.mark.parametrize(
    ("settings", "theta", "scaling"),
    [
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}, "rope_scaling": LLAMA3}, 1e4, Llama3Rope),
        ({"rope_parameters": {"rope_theta": 5e5}, "rope_theta": 2e4}, 5e5, None),
        ({"rope_scaling": {"type": "linear", "factor": 4}, "rope_theta": 5e5}, 5e5, LinearRope),
        ({"rope_parameters": LLAMA3, "rope_scaling": {}}, 1e4, Llama3Rope),
        ({"rope_scaling": {"rope_type": "linear", "factor": 2.0, "partial_rotary_factor": 1.0}}, 1e4, LinearRope),
    ],
)  # fmt: skip
def test_the_place_that_counts(settings, theta, scaling):
    found = rope_from_hf(settings)
    assert found[0] == theta
    assert type(found[1]) is (scaling or type(None))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rope_parameters": {"rope_type": "default"}, "rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "'yarn'"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "'dynamic' is not supported; allowed: 'default'"),
        ({"rope_scaling": {"factor": 4.0}}, "'default' has 'factor' 4.0, which this type does not use"),
        ({"rope_scaling": {"rope_type": None, "factor": 4.0}}, "type None is not supported"),
        ({"rope_scaling": {"rope_type": "linear", "type": "default", "factor": 4.0}}, "correct one of them"),
        ({"rope_scaling": {"rope_type": "linear"}}, "lacks 'factor'"),
        ({"rope_scaling": {"rope_type": "linear", "factor": "4"}}, "factor is '4'; give a number"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 0.5}}, "at least 1"),
        ({"rope_scaling": {"rope_type": "linear", "factor": float("nan")}}, "at least 1"),
        ({"rope_scaling": LLAMA3 | {"attention_factor": 1.2}}, "has 'attention_factor' 1.2"),
        ({"rope_scaling": LLAMA3, "original_max_position_embeddings": 32}, "64 in rope_scaling and 32 beside it"),
        ({"rope_parameters": {"rope_theta": 5e5}, "rope_scaling": LLAMA3}, "rope_theta is 500000.0 in rope_parameters"),
        ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "has 'full_attention'"),
        ({"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}}, "rope_parameters.partial_rotary"),
        ({"partial_rotary_factor": 0.25}, "partial_rotary_factor 0.25 is not supported"),
        ({"rope_parameters": [1]}, "give an object"),
        ({"rope_theta": "10000"}, "rope_theta is '10000'; give a positive number"),
    ],
)
def test_what_is_not_understood_is_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        rope_from_hf(settings)


@pytest.mark.parametrize("scaling", [LinearRope(factor=4.0), Llama3Rope(**{k: LLAMA3[k] for k in list(LLAMA3)[1:]})])
def test_scaling_is_read_back_as_it_was_written(scaling):
    config = dataclasses.replace(PRESETS["tiny"], rope_scaling=scaling, rope_theta=500.0)
    assert config_from_hf(config_to_hf(config)) == config


@pytest.mark.parametrize(
    "field",
    [
        {"rope_ratio": 8}, {"rope_interleaved": True}, {"rope_type": "linear"}, {"rotary_pct": 0.25},
        {"no_rope_layers": [0]},
        {"final_logit_softcapping": 30.0}, {"attention_multiplier": 0.5}, {"logit_scale": 0.25}, {"scale_emb": 12},
        {"num_local_experts": 8}, {"qk_layernorm": True}, {"bias": True}, {"quantization": {"bits": 4}},
        {"sliding_window_pattern": 6}, {"is_causal": False}, {"layer_types": ["sliding_attention", "full_attention"]},
        {"clip_qkv": 1.0}, {"causal": False}, {"activation_function": "gelu"}, {"scale_attn_weights": False},
        {"norm_eps": 0.1},
    ],
    ids=lambda field: next(iter(field)),
)  # fmt: skip
def test_a_field_that_changes_some_model_is_refused_where_it_is_not_known(field):
    for record in FAMILIES.values():
        written = config_to_hf(dataclasses.replace(PRESETS["tiny"], model_type=record.model_type))
        with pytest.raises(ConfigError, match=next(iter(field))):
            config_from_hf(written | field)


@pytest.mark.parametrize(
    "field",
    [
        {"rope_interleaved": False}, {"use_mrope": False}, {"logit_scale": 1.0}, {"num_experts": 0},
        {"max_window_layers": 28},
        {"router_aux_loss_coef": 0.1}, {"transformers.js_config": {"kv_cache_dtype": "fp16"}}, {"layer_types": None},
        {"unsloth_version": "2025.1"}, {"quantization_config": None}, {"initializer_range": 0.02},
        {"pretraining_tp": 2},
    ],
    ids=lambda field: next(iter(field)),
)  # fmt: skip
def test_fields_that_are_off_or_compute_nothing_pass(field):
    written = config_to_hf(PRESETS["tiny"])
    assert config_from_hf(written | field) == PRESETS["tiny"]
