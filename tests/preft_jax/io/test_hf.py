"""Hugging Face directories: reading every stored form, refusing damaged ones, and writing."""

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
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from preft_jax.config import PRESETS
from preft_jax.errors import ConfigError, ModelError, PreftError
from preft_jax.io import hf
from preft_jax.io.hf import load_hf_model, save_hf_model, weight_files
from preft_jax.models.modules import abstract_params, init_params
from preft_jax.text.tokenizer import byte_tokenizer, load_tokenizer

MODELS = Path(__file__).parents[2] / "fixtures" / "models"
FAMILIES = sorted(path.name for path in MODELS.iterdir())


@pytest.fixture(params=FAMILIES)
def family(request):
    """A directory of each model: sharded float32, tied bfloat16, float16 with biases, float32 with head norms ..."""
    return MODELS / request.param


def copy_model(name: str, tmp_path: Path) -> Path:
    """Return a copy of a fixture model that a test may damage."""
    directory = tmp_path / "model"
    shutil.copytree(MODELS / name, directory)
    return directory


def edit_json(path: Path, **fields) -> None:
    """Change fields of a JSON file; ``None`` removes one."""
    content = json.loads(path.read_text())
    content.update(fields)
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))


def edit_tensors(directory: Path, change) -> None:
    """Rewrite a model's tensors after ``change`` edited the dict of them."""
    path = directory / "model.safetensors"
    tensors = safetensors.numpy.load_file(path)
    change(tensors)
    safetensors.numpy.save_file(tensors, path)


def stored_tensors(directory: Path) -> dict[str, np.ndarray]:
    """Return all tensors of a directory in float32."""
    found = {}
    for path in weight_files(directory):
        found |= safetensors.numpy.load_file(path)
    return {name: tensor.astype(np.float32) for name, tensor in found.items()}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_tree_has_the_models_structure_and_values(family, dtype):
    config, params, tokenizer = load_hf_model(family, dtype)
    assert tokenizer is None
    expected = abstract_params(config, dtype)
    assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), params) == jax.tree.map(
        lambda leaf: (leaf.shape, leaf.dtype), expected
    )
    tensors = stored_tensors(family)

    def rounded(name):
        return tensors[name].astype(jnp.dtype(dtype))

    layer = params["layers"][1]
    np.testing.assert_array_equal(params["embed"], rounded("model.embed_tokens.weight"))
    np.testing.assert_array_equal(layer["q"], rounded("model.layers.1.self_attn.q_proj.weight").T)
    np.testing.assert_array_equal(layer["down"], rounded("model.layers.1.mlp.down_proj.weight").T)
    np.testing.assert_array_equal(layer["mlp_norm"], rounded("model.layers.1.post_attention_layernorm.weight"))
    if config.qkv_bias:
        np.testing.assert_array_equal(layer["k_bias"], rounded("model.layers.1.self_attn.k_proj.bias"))
    if config.qk_norm:
        np.testing.assert_array_equal(layer["k_norm"], rounded("model.layers.1.self_attn.k_norm.weight"))
    if not config.tie_word_embeddings:
        np.testing.assert_array_equal(params["lm_head"], rounded("lm_head.weight").T)


def test_arrays_do_not_alias_the_file(tmp_path):
    directory = copy_model("qwen3", tmp_path)
    _, params, _ = load_hf_model(directory, "float32")
    before = np.array(params["embed"])
    path = directory / "model.safetensors"
    with path.open("r+b") as file:
        file.write(b"\0" * path.stat().st_size)
    np.testing.assert_array_equal(params["embed"], before)


def test_generation_config_adds_end_tokens(tmp_path):
    config, _, _ = load_hf_model(MODELS / "llama3", "float32")
    assert config.eos_token_ids == (1, 2)
    directory = copy_model("qwen2", tmp_path)
    (directory / "generation_config.json").unlink()
    assert load_hf_model(directory, "float32")[0].eos_token_ids == (1,)


def test_rotary_buffers_and_repeated_tied_heads_are_ignored(tmp_path):
    directory = copy_model("qwen3", tmp_path)

    def add(tensors):
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(16, np.float32)
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()

    edit_tensors(directory, add)
    config, params, _ = load_hf_model(directory, "float32")
    assert config.tie_word_embeddings
    assert "lm_head" not in params


HEADS = {
    "another": lambda embed: embed[::-1].copy(),
    "one value": lambda embed: np.concatenate([embed[:-1], embed[-1:] + np.eye(1, embed.shape[1], dtype=embed.dtype)]),
    "another dtype": lambda embed: embed.astype(np.float16) * np.float16(2),
    "nan": lambda embed: np.full_like(embed, np.nan),
}


@pytest.mark.parametrize("name", HEADS)
def test_a_head_that_differs_is_used_though_the_config_ties_it(tmp_path, caplog, name):
    directory = copy_model("qwen3", tmp_path)
    head = HEADS[name](stored_tensors(directory)["model.embed_tokens.weight"])
    edit_tensors(directory, lambda tensors: tensors.update({"lm_head.weight": head}))
    config, params, _ = load_hf_model(directory, "float32")
    assert not config.tie_word_embeddings
    np.testing.assert_array_equal(params["lm_head"], head.T.astype(np.float32))
    assert "lm_head.weight differs from model.embed_tokens.weight" in caplog.text


def test_an_equal_head_of_another_dtype_is_tied(tmp_path, caplog):
    directory = copy_model("qwen3", tmp_path)

    def add(tensors):
        tensors["model.embed_tokens.weight"] = tensors["model.embed_tokens.weight"].astype(ml_dtypes.bfloat16)
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].astype(np.float32)

    edit_tensors(directory, add)
    assert load_hf_model(directory, "float32")[0].tie_word_embeddings
    assert not caplog.text


@pytest.mark.parametrize(
    ("head", "message"),
    [
        (np.zeros((3, 64), np.float32), r"shape of lm_head.weight: \[3, 64\]"),
        (np.zeros((256, 64), np.int8), "dtype of lm_head.weight: I8"),
    ],
)
def test_a_head_that_cannot_be_one_is_refused_though_the_config_ties_it(tmp_path, head, message):
    directory = copy_model("qwen3", tmp_path)
    edit_tensors(directory, lambda tensors: tensors.update({"lm_head.weight": head}))
    with pytest.raises(ModelError, match=message):
        load_hf_model(directory, "float32")


def rename_many(tensors):
    for name in [name for name in tensors if ".mlp." in name]:
        tensors[name + "_"] = tensors.pop(name)


DAMAGED_TENSORS = {
    "missing": (lambda t: t.pop("model.norm.weight"), r"missing: model.norm.weight \[64\]"),
    "missing bias": (lambda t: t.pop("model.layers.0.self_attn.q_proj.bias"), "missing: .*q_proj.bias"),
    "untied without head": (lambda t: t.pop("lm_head.weight"), r"missing: lm_head.weight \[256, 64\]"),
    "extra": (lambda t: t.update(foo=np.zeros(3, np.float32)), r"extra: foo \[3\]"),
    "wrong shape": (
        lambda t: t.update({"model.norm.weight": np.zeros(65, np.float32)}),
        r"shape of model.norm.weight: \[65\] in the file, \[64\] by the config",
    ),
    "wrong dtype": (
        lambda t: t.update({"model.norm.weight": np.zeros(64, np.int32)}),
        r"(?s)allowed dtypes: F32, F16, BF16.*dtype of model.norm.weight: I32",
    ),
    "many": (rename_many, r"(?s)(missing: .*){6}(extra: .*){2}and 4 more"),
}


@pytest.mark.parametrize("damage", DAMAGED_TENSORS)
def test_wrong_tensors_are_reported_as_differences(tmp_path, damage):
    change, message = DAMAGED_TENSORS[damage]
    directory = copy_model("qwen2", tmp_path)
    edit_tensors(directory, change)
    with pytest.raises(ModelError, match=message):
        load_hf_model(directory, "float32")


DAMAGED_FILES = {
    "no config": ("qwen2", lambda d: (d / "config.json").unlink(), "config.json does not exist"),
    "config is no JSON": ("qwen2", lambda d: (d / "config.json").write_text("{"), "cannot be read as JSON"),
    "config is a list": ("qwen2", lambda d: (d / "config.json").write_text("[1]"), "holds a JSON list"),
    "config lacks a field": ("qwen2", lambda d: edit_json(d / "config.json", hidden_size=None), "lacks 'hidden_size'"),
    "config has a string": ("qwen2", lambda d: edit_json(d / "config.json", hidden_size="x"), "hidden_size|wrong type"),
    "config of another size": ("qwen2", lambda d: edit_json(d / "config.json", vocab_size=99), "shape of model.embed"),
    "another family": ("qwen2", lambda d: edit_json(d / "config.json", model_type="gpt2"), "'gpt2' is not supported"),
    "bad end token": ("qwen2", lambda d: edit_json(d / "generation_config.json", eos_token_id="x"), "eos_token_id 'x'"),
    "bad end tokens": ("qwen2", lambda d: edit_json(d / "config.json", eos_token_id=[1, "x"]), "eos_token_id has 'x'"),
    "no weights": ("qwen2", lambda d: (d / "model.safetensors").unlink(), "neither model.safetensors nor"),
    "pickle only": (
        "qwen2",
        lambda d: (d / "model.safetensors").rename(d / "pytorch_model.bin"),
        "pytorch_model.bin is a pickle and is not read",
    ),
    "missing shard": (
        "llama3",
        lambda d: (d / "model-00002-of-00002.safetensors").unlink(),
        "model-00002-of-00002.safetensors, which .* does not exist",
    ),
    "index outside": (
        "llama3",
        lambda d: edit_json(d / "model.safetensors.index.json", weight_map={"lm_head.weight": "../x.safetensors"}),
        "'../x.safetensors', which is not beside it",
    ),
    "index without map": (
        "llama3",
        lambda d: edit_json(d / "model.safetensors.index.json", weight_map=None),
        "no 'weight_map'",
    ),
    "a tensor twice": (
        "llama3",
        lambda d: shutil.copy(d / "model-00001-of-00002.safetensors", d / "model-00002-of-00002.safetensors"),
        "in two files",
    ),
    "corrupt tokenizer": ("qwen2", lambda d: (d / "tokenizer.json").write_text("{}"), "cannot read the tokenizer"),
    "tokenizer without vocabulary": (
        "qwen2",
        lambda d: (d / "tokenizer_config.json").write_text("{}"),
        "tokenizer_config.json and no vocabulary",
    ),
}


@pytest.mark.parametrize("damage", DAMAGED_FILES)
def test_damaged_directories_are_refused(tmp_path, damage):
    name, change, message = DAMAGED_FILES[damage]
    directory = copy_model(name, tmp_path)
    change(directory)
    with pytest.raises(PreftError, match=message) as caught:
        load_hf_model(directory, "float32")
    assert str(directory) in str(caught.value)


def test_truncated_safetensors_is_always_an_error(tmp_path, rng):
    directory = copy_model("qwen2", tmp_path)
    path = directory / "model.safetensors"
    whole = path.read_bytes()
    for cut in [0, 7, 8, len(whole) - 1, *rng.integers(9, len(whole), 15)]:
        path.write_bytes(whole[:cut])
        with pytest.raises(ModelError, match="not a whole safetensors file"):
            load_hf_model(directory, "float32")


def test_a_tokenizer_without_a_fast_form_is_refused_at_load(tmp_path, monkeypatch):
    (tmp_path / "vocab.json").write_text("{}")
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", lambda *_, **__: transformers.ByT5Tokenizer())
    with pytest.raises(ModelError, match="is a ByT5Tokenizer, which has no fast form"):
        load_tokenizer(tmp_path)


def test_tokenizer_json_is_taken_as_it_stands(tmp_path):
    """A class named in tokenizer_config.json does not replace the pre-tokenizer, as it does in AutoTokenizer."""
    tokenizer = Tokenizer(models.BPE(vocab={"1": 0, "2": 1, "12": 2, "<|endoftext|>": 3}, merges=[("1", "2")]))
    digits = pre_tokenizers.Digits(individual_digits=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "GPT2Tokenizer"}))
    assert load_tokenizer(tmp_path).encode("12") == [0, 1]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_saved_model_loads_back_equal(tmp_path, family, dtype):
    config, params, _ = load_hf_model(family, dtype)
    save_hf_model(tmp_path / "new" / "saved", config, params, byte_tokenizer())
    loaded_config, loaded_params, tokenizer = load_hf_model(tmp_path / "new" / "saved", dtype)
    assert loaded_config == config
    jax.tree.map(np.testing.assert_array_equal, loaded_params, params)
    assert tokenizer.encode("hé<|im_end|>") == byte_tokenizer().encode("hé<|im_end|>")
    chat = [{"role": "user", "content": "hi"}]
    assert tokenizer.apply_chat_template(chat, tokenize=False) == byte_tokenizer().apply_chat_template(
        chat, tokenize=False
    )
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["saved"]


def test_saved_file_is_in_the_layout_of_hugging_face(tmp_path):
    config = dataclasses.replace(PRESETS["tiny"], tie_word_embeddings=False)
    params = init_params(config, jax.random.key(0), jnp.bfloat16)
    save_hf_model(tmp_path / "saved", config, params)
    tensors = safetensors.numpy.load_file(tmp_path / "saved" / "model.safetensors")
    down = tensors["model.layers.2.mlp.down_proj.weight"]
    assert down.shape == (config.hidden_size, config.intermediate_size)
    assert down.dtype == ml_dtypes.bfloat16
    np.testing.assert_array_equal(down, np.asarray(params["layers"][2]["down"]).T)
    assert tensors["lm_head.weight"].shape == (config.vocab_size, config.hidden_size)
    content = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert (content["architectures"], content["dtype"]) == (["LlamaForCausalLM"], "bfloat16")


def test_saving_refuses_a_directory_with_files(tmp_path):
    config = PRESETS["tiny"]
    params = init_params(config, jax.random.key(0))
    (tmp_path / "keep").write_text("mine")
    with pytest.raises(ModelError, match="exists already"):
        save_hf_model(tmp_path, config, params)
    assert [path.name for path in tmp_path.iterdir()] == ["keep"]


def test_failed_save_leaves_nothing(tmp_path, monkeypatch):
    def fail(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(hf.safetensors.numpy, "save_file", fail)
    with pytest.raises(ModelError, match="No space left"):
        save_hf_model(tmp_path / "saved", PRESETS["tiny"], init_params(PRESETS["tiny"], jax.random.key(0)))
    assert list(tmp_path.iterdir()) == []


def test_config_error_names_the_file(tmp_path):
    directory = copy_model("qwen2", tmp_path)
    edit_json(directory / "config.json", hidden_act="gelu")
    with pytest.raises(ConfigError, match=r"config\.json: hidden_act 'gelu'"):
        load_hf_model(directory, "float32")
