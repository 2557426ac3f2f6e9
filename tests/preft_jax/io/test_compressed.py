"""Checkpoints in FP8 as llm-compressor writes them: what is read, and what is refused by name."""

import json
import shutil
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from preft_jax.errors import ConfigError, ModelError
from preft_jax.io.hf import load_hf_model
from preft_jax.loading import load_model
from preft_jax.models.linear import Quantized, dequantized
from preft_jax.shapes import LINEAR_SITES

MODELS = Path(__file__).parents[2] / "fixtures" / "models"
WEIGHTS = {
    "num_bits": 8, "type": "float", "strategy": "channel", "symmetric": True, "dynamic": False, "group_size": None,
    "block_structure": None, "actorder": None, "observer": "minmax", "observer_kwargs": {},
}  # fmt: skip
ACTIVATIONS = {**WEIGHTS, "strategy": "token", "dynamic": True, "observer": None}


def config(weights=None, activations=None, **fields):
    group = {
        "targets": ["Linear"], "weights": WEIGHTS | (weights or {}), "output_activations": None,
        "input_activations": ACTIVATIONS if activations is None else ACTIVATIONS | activations,
    }  # fmt: skip
    return {
        "quant_method": "compressed-tensors", "format": "float-quantized", "quantization_status": "compressed",
        "config_groups": {"group_0": group}, "ignore": ["lm_head"], "kv_cache_scheme": None, "sparsity_config": {},
        "global_compression_ratio": 1.5, "version": "0.12.2",
    } | fields  # fmt: skip


@pytest.fixture
def directory(tmp_path):
    """A copy of a small model with biases, its own tensors not in FP8 yet."""
    return Path(shutil.copytree(MODELS / "qwen3", tmp_path / "model"))


def compress(directory, quantization, *, per_tensor=False, change=lambda tensors: None):
    """Write a model's linears in FP8, and return what each stands for."""
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"quantization_config": quantization}))
    path = directory / "model.safetensors"
    tensors, expected = dict(safetensors.numpy.load_file(path)), {}
    for name in [name for name in tensors if name.endswith("_proj.weight")]:
        weight = tensors[name].astype(np.float32)
        scale = np.abs(weight).max(axis=None if per_tensor else 1, keepdims=True).reshape(-1, 1) / np.float32(448)
        scale = (scale[:, 0] if per_tensor else scale).astype(ml_dtypes.bfloat16)
        wide = scale.astype(np.float32).reshape(-1, 1)
        tensors[name] = np.clip(weight / wide, -448, 448).astype(ml_dtypes.float8_e4m3fn)
        tensors[name.removesuffix("weight") + "weight_scale"] = scale
        expected[name] = tensors[name].astype(np.float32) * wide
    change(tensors)
    safetensors.numpy.save_file(tensors, path)
    return expected


@pytest.mark.parametrize("per_tensor", [False, True])
def test_linears_stay_in_fp8_with_their_scales(directory, per_tensor):
    plain = load_model(directory, "float32")
    weights = {"strategy": "tensor"} if per_tensor else {}
    expected = compress(directory, config(weights), per_tensor=per_tensor)
    model = load_model(directory, "float32", check_finite=True)
    assert (model.config, model.quantization) == (plain.config, "none")
    assert model.kv_digest == model.digest != plain.digest
    same = load_model(directory, "float32", quantization="fp8")
    for one, other in zip(*(jax.tree.leaves(m.params) for m in (model, same)), strict=True):
        np.testing.assert_array_equal(one, other)
    modules = {site: "mlp" if site in ("gate", "up", "down") else "self_attn" for site in LINEAR_SITES}
    for i, layer in enumerate(model.params["layers"]):
        assert {name for name, w in layer.items() if isinstance(w, Quantized)} == set(LINEAR_SITES)
        for site in LINEAR_SITES:
            found = dequantized(layer[site], np.float32)
            wanted = expected[f"model.layers.{i}.{modules[site]}.{site}_proj.weight"]
            np.testing.assert_array_equal(found, wanted)
            assert layer[site].scale_F.shape == wanted.shape[:1]
    np.testing.assert_array_equal(model.params["embed"], plain.params["embed"])
    with pytest.raises(ConfigError, match="keep_layers has layer 0, which the checkpoint has in FP8; leave it out"):
        load_model(directory, quantization="fp8", keep_layers=(0,))


def test_a_linear_that_is_not_in_fp8_stays_as_it_is(directory):
    def plain(tensors):
        tensors["model.layers.0.self_attn.o_proj.weight"] = np.ones(
            tensors["model.layers.0.self_attn.o_proj.weight"].shape, ml_dtypes.bfloat16
        )
        del tensors["model.layers.0.self_attn.o_proj.weight_scale"]

    compress(directory, config(), change=plain)
    _, params, _ = load_hf_model(directory, "float32")
    assert isinstance(params["layers"][1]["o"], Quantized)
    assert isinstance(params["layers"][0]["o"], jax.Array)


@pytest.mark.parametrize(
    ("quantization", "reason"),
    [
        (True, "quantization_config is True"),
        (config(quant_method="gptq"), "quantization_config.quant_method is 'gptq', and 'compressed-tensors' is"),
        (config(format="int-quantized"), "format is 'int-quantized', and 'float-quantized' is supported"),
        (config(kv_cache_scheme={"num_bits": 8}), "kv_cache_scheme is {'num_bits': 8}, which is not supported"),
        (config(sparsity_config={"format": "sparse-24"}), "sparsity_config is"),
        (config(transform_config={"R1": {}}), "transform_config is"),
        (config(config_groups={}), "config_groups is {}"),
        (
            config({"strategy": "block", "block_structure": [128, 128]}),
            r"weights.strategy is 'block', and 'channel' or",
        ),
        (config({"num_bits": 4}), "weights.num_bits is 4, and 8 is supported"),
        (config({"type": "int"}), "weights.type is 'int'"),
        (config({"group_size": 128}), "weights.group_size is 128, which is not supported"),
        (config(activations={"dynamic": False}), "input_activations.dynamic is False, and True is supported"),
        (config(activations={"strategy": "tensor"}), "input_activations.strategy is 'tensor', and 'token'"),
        ({**config(), "config_groups": {"a": {"weights": WEIGHTS}}}, "config_groups.a.input_activations is None"),
        ({**config(), "config_groups": {"a": {"weights": {"num_bits": 8}}}}, "config_groups.a.weights lacks 'type'"),
        ({"quant_method": "fp8"}, "quant_method is 'fp8', and 'compressed-tensors'|lacks 'format'"),
    ],
)
def test_what_is_not_computed_is_refused_by_name(directory, quantization, reason):
    compress(directory, quantization)
    with pytest.raises(ConfigError, match=reason) as caught:
        load_hf_model(directory, "float32")
    assert "compressed-tensors FP8 is read" in str(caught.value)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (
            lambda t: t.pop("model.layers.1.mlp.up_proj.weight_scale"),
            "missing: model.layers.1.mlp.up_proj.weight_scale",
        ),
        (
            lambda t: t.update({"model.layers.0.mlp.up_proj.input_scale": np.ones(1, np.float32)}),
            "extra: .*input_scale",
        ),
        (
            lambda t: t.update({"model.layers.0.mlp.up_proj.weight_scale": np.ones((3, 1), np.float32)}),
            "shape of model.layers.0.mlp.up_proj.weight_scale",
        ),
        (
            lambda t: t.update({"model.norm.weight": t["model.norm.weight"].astype(ml_dtypes.float8_e4m3fn)}),
            "dtype of model.norm.weight: F8_E4M3",
        ),
    ],
)
def test_tensors_that_do_not_belong_are_named(directory, change, reason):
    compress(directory, config(), change=change)
    with pytest.raises(ModelError, match=reason):
        load_hf_model(directory, "float32")


def test_fp8_that_no_config_tells_of_is_refused(directory):
    compress(directory, None)
    with pytest.raises(ModelError, match=r"dtype of model\.layers.*_proj.weight: F8_E4M3"):
        load_hf_model(directory, "float32")
