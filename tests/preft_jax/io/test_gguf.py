"""GGUF files: dequantisation, each architecture against the same model as safetensors, tokenizers, damaged files."""

import json
from pathlib import Path

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gguf.constants import GGMLQuantizationType as Type

from preft_jax.config import PRESETS
from preft_jax.errors import ModelError, PreftError
from preft_jax.io.gguf import load_gguf, read_config
from preft_jax.io.gguf_file import open_gguf
from preft_jax.io.hf import load_hf_model
from preft_jax.io.weights import tensor_slots, tensors_of
from preft_jax.loading import load_model
from preft_jax.models.family import GGUF_NAMES
from preft_jax.models.registry import GGUF_FAMILIES
from preft_jax.rope import LinearRope
from preft_jax.text.tokenizer import gguf_tokenizer

MODELS = Path(__file__).parents[2] / "fixtures" / "models"
SMOLLM2 = Path(__file__).parents[2] / "fixtures" / "smollm2"

LETTERS = [*range(33, 127), *range(161, 173), *range(174, 256)]
BYTE_TOKENS = [chr(b) for b in LETTERS] + [chr(256 + i) for i in range(256 - len(LETTERS))]


def half_order_to_pairs(weight: np.ndarray, heads: int) -> np.ndarray:
    """Permute query or key rows as converters to GGUF do for the llama architecture."""
    rows, columns = weight.shape
    return weight.reshape(heads, 2, rows // heads // 2, columns).swapaxes(1, 2).reshape(rows, columns)


def add_metadata(writer: gguf.GGUFWriter, config) -> None:
    """Write what a converter writes about a config."""
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_bos_token_id(config.bos_token_id)
    writer.add_eos_token_id(config.eos_token_ids[0])
    if config.rope_scaling is not None:
        writer.add_rope_scaling_orig_ctx_len(config.rope_scaling.original_max_position_embeddings)


def llama3_factors(config) -> np.ndarray:
    """Compute a converter's ``rope_freqs`` tensor, from the definition, one frequency at a time."""
    scaling = config.rope_scaling
    factors = []
    for i in range(0, config.head_dim, 2):
        wavelength = 2 * np.pi * config.rope_theta ** (i / config.head_dim)
        if wavelength < scaling.original_max_position_embeddings / scaling.high_freq_factor:
            factors.append(1.0)
        elif wavelength > scaling.original_max_position_embeddings / scaling.low_freq_factor:
            factors.append(scaling.factor)
        else:
            smooth = (scaling.original_max_position_embeddings / wavelength - scaling.low_freq_factor) / (
                scaling.high_freq_factor - scaling.low_freq_factor
            )
            factors.append(1 / ((1 - smooth) / scaling.factor + smooth))
    return np.array(factors, np.float32)


def write_gguf(path: Path, config, params, *, tokenizer=None, extra=None, drop=(), metadata=None) -> Path:
    """Write a model as an F32 GGUF file, permuting queries and keys for the llama architecture."""
    writer = gguf.GGUFWriter(path, config.model_type)
    add_metadata(writer, config)
    for key, value in (metadata or {}).items():
        getattr(writer, key)(*value)
    if tokenizer is not None:
        tokenizer(writer)
    slots = tensor_slots(config, GGUF_NAMES)
    heads = {"q": config.num_attention_heads, "k": config.num_key_value_heads}
    for name, tensor in tensors_of(params, slots).items():
        site = slots[name].path[-1]
        if config.model_type == "llama" and site in heads:
            tensor = half_order_to_pairs(tensor, heads[site])
        if name not in drop:
            writer.add_tensor(name, tensor.astype(np.float32))
    if config.rope_scaling is not None:
        writer.add_tensor("rope_freqs.weight", llama3_factors(config))
    for name, tensor in (extra or {}).items():
        writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def byte_level(pre: str, *, merges=(), add_bos=None, template=None):
    """Return what writes a byte-level tokenizer with one control and one user-defined token."""

    def write(writer: gguf.GGUFWriter) -> None:
        tokens = [*BYTE_TOKENS[:200], "<|end|>", "<tool>", *("".join(merge.split()) for merge in merges)]
        types = [1] * 200 + [3, 4] + [1] * len(merges)
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(pre)
        writer.add_token_list(tokens)
        writer.add_token_types(types)
        writer.add_token_merges(list(merges))
        if add_bos is not None:
            writer.add_add_bos_token(add_bos)
        if template is not None:
            writer.add_chat_template(template)

    return write


@pytest.fixture(scope="module", params=["llama3", "smollm2", "qwen2", "qwen3"])
def converted(request, tmp_path_factory):
    """A fixture model (config, params) and the same model as a GGUF file."""
    config, params, _ = load_hf_model(MODELS / request.param, jnp.float32)
    path = tmp_path_factory.mktemp("gguf") / f"{request.param}.gguf"
    return config, params, write_gguf(path, config, params)


@pytest.fixture(scope="module")
def sample(tmp_path_factory):
    """A whole small GGUF file with a tokenizer, as bytes."""
    config, params, _ = load_hf_model(MODELS / "smollm2", jnp.float32)
    path = tmp_path_factory.mktemp("gguf") / "sample.gguf"
    return write_gguf(path, config, params, tokenizer=byte_level("smollm", merges=["a b"])).read_bytes()


def test_same_model_as_safetensors(converted):
    """Every architecture gives the config and the parameters that the safetensors give, bit for bit."""
    config, params, path = converted
    loaded_config, loaded_params, tokenizer = load_gguf(path, jnp.float32)
    # GGUF names one end token; generation_config.json may name more.
    assert loaded_config.eos_token_ids == config.eos_token_ids[:1]
    fields = {**vars(loaded_config), "eos_token_ids": config.eos_token_ids}
    assert fields == vars(config)
    assert tokenizer is None
    jax.tree.map(np.testing.assert_array_equal, loaded_params, params)


def reference_dequantise(raw: bytes, kind: Type) -> list[float]:
    """Dequantise by the formats' definitions, one number at a time."""
    block = {Type.Q4_0: 18, Type.Q4_1: 20, Type.Q8_0: 34, Type.F16: 2, Type.BF16: 2, Type.F32: 4}[kind]
    values: list[float] = []
    for start in range(0, len(raw), block):
        part = raw[start : start + block]
        half = float(np.frombuffer(part[:2], "<f2")[0])
        if kind == Type.Q4_0:
            values += [half * ((byte & 15) - 8) for byte in part[2:]] + [half * ((byte >> 4) - 8) for byte in part[2:]]
        elif kind == Type.Q4_1:
            low = float(np.frombuffer(part[2:4], "<f2")[0])
            values += [half * (byte & 15) + low for byte in part[4:]] + [half * (byte >> 4) + low for byte in part[4:]]
        elif kind == Type.Q8_0:
            values += [half * (byte - 256 * (byte > 127)) for byte in part[2:]]
        elif kind == Type.F16:
            values.append(half)
        elif kind == Type.BF16:
            values.append(float(np.frombuffer(b"\0\0" + part, "<f4")[0]))
        else:
            values.append(float(np.frombuffer(part, "<f4")[0]))
    return values


def random_raw(kind: Type, rows: int, blocks: int, rng: np.random.Generator) -> np.ndarray:
    """Return random file bytes ``[rows, bytes]`` of a type, with finite scales."""
    if kind in (Type.F32, Type.F16, Type.BF16):
        values = rng.standard_normal((rows, 32 * blocks)).astype(np.float32)
        if kind == Type.BF16:
            return (values.view(np.uint32) >> 16).astype(np.uint16).view(np.uint8)
        return values.astype(np.float16 if kind == Type.F16 else np.float32).view(np.uint8)
    scales = {Type.Q4_0: 1, Type.Q4_1: 2, Type.Q8_0: 1}[kind]
    quants = 32 if kind == Type.Q8_0 else 16
    raw = rng.integers(0, 256, (rows, blocks, 2 * scales + quants)).astype(np.uint8)
    raw[..., : 2 * scales] = rng.standard_normal((rows, blocks, scales)).astype(np.float16).view(np.uint8)
    return raw.reshape(rows, -1)


@pytest.mark.parametrize("kind", [Type.F32, Type.F16, Type.BF16, Type.Q4_0, Type.Q4_1, Type.Q8_0], ids=lambda k: k.name)
def test_dequantises_by_definition(tmp_path, rng, kind):
    raw = random_raw(kind, 5, 3, rng)
    writer = gguf.GGUFWriter(tmp_path / "one.gguf", "llama")
    # A first tensor of an odd size, so that the second one does not begin at the data section's start.
    writer.add_tensor("first", np.ones(3, np.float32))
    writer.add_tensor("second", raw, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    found = open_gguf(tmp_path / "one.gguf").read("second")
    assert found.dtype == np.float32
    # Products of two float32 round once here and in float64 there: a relative 2^-23, absolute for sums near zero.
    expected = np.array(reference_dequantise(raw.tobytes(), kind)).reshape(5, 96)
    np.testing.assert_allclose(found, expected, rtol=2.5e-7, atol=2e-6)


def test_unsupported_tensor_type_is_named(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "k.gguf", "llama")
    writer.add_tensor("blk.0.attn_q.weight", np.zeros((1, 144), np.uint8), raw_dtype=Type.Q4_K)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ModelError, match=r"attn_q.* type Q4_K.*allowed: F32, F16, BF16, Q4_0, Q4_1, Q8_0"):
        open_gguf(tmp_path / "k.gguf")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"drop": ["blk.0.ffn_up.weight"]}, r"missing: blk.0.ffn_up.weight \[96, 72\]"),
        ({"extra": {"blk.0.attn_q.bias": np.zeros(72, np.float32)}}, r"extra: blk.0.attn_q.bias \[72\]"),
        ({"extra": {"rope_freqs.weight": np.full(4, 2.0, np.float32)}}, "frequency factors"),
        ({"metadata": {"add_expert_count": (4,)}}, "expert_count = 4"),
        ({"metadata": {"add_sliding_window": (64,)}}, "sliding_window = 64"),
        ({"metadata": {"add_rope_scaling_type": (gguf.RopeScalingType.YARN,)}}, "rope.scaling.type = 'yarn'"),
        ({"metadata": {"add_rope_scaling_type": (gguf.RopeScalingType.LONGROPE,)}}, "type = 'longrope'"),
        ({"metadata": {"add_rope_scaling_factor": (0.5,)}}, "at least 1"),
        ({"metadata": {"add_rope_scaling_factor": (-4.0,)}}, "factor = -4.0"),
        ({"metadata": {"add_rope_scaling_attn_factors": (1.5,)}}, "attn_factor = 1.5"),
        ({"metadata": {"add_rope_scaling_yarn_log_mul": (0.1,)}}, "yarn_log_mul"),
        ({"metadata": {"add_uint32": ("llama.rope.dimension_count_swa", 8)}}, "dimension_count_swa = 8"),
        ({"metadata": {"add_float32": ("llama.logit_scale", 0.25)}}, "logit_scale = 0.25"),
        ({"metadata": {"add_bool": ("llama.attention.causal", False)}}, "causal = False"),
        ({"metadata": {"add_array": ("llama.rope.dimension_sections", [8, 4, 4, 0])}}, "dimension_sections"),
        (
            {"metadata": {"add_string": ("tokenizer.ggml.eot_token_id", "2")}},
            "eot_token_id = '2'; a token id is expected",
        ),
        ({"tokenizer": byte_level("deepseek-llm")}, "tokenizer.ggml.pre 'deepseek-llm'.*allowed: smollm"),
        ({"tokenizer": lambda writer: writer.add_tokenizer_model("llama")}, "type 'llama'.*allowed: 'gpt2'"),
        ({"tokenizer": byte_level("smollm", merges=["a b", "ab ÿÿ"])}, "merges do not fit"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(tmp_path, change, message):
    config, params, _ = load_hf_model(MODELS / "smollm2", jnp.float32)
    with pytest.raises(ModelError, match=message):
        load_gguf(write_gguf(tmp_path / "bad.gguf", config, params, **change), jnp.float32)


@pytest.mark.parametrize(
    ("metadata", "scaling"),
    [
        ({"add_rope_scaling_factor": (4.0,)}, LinearRope(factor=4.0)),
        ({"add_float32": ("llama.rope.scale_linear", 8.0)}, LinearRope(factor=8.0)),
        ({"add_rope_scaling_factor": (2.0,), "add_float32": ("llama.rope.scale_linear", 8.0)}, LinearRope(factor=2.0)),
        ({"add_rope_scaling_type": (gguf.RopeScalingType.LINEAR,), "add_rope_scaling_factor": (4.0,)},
         LinearRope(factor=4.0)),
        ({"add_rope_scaling_type": (gguf.RopeScalingType.NONE,), "add_rope_scaling_factor": (4.0,)}, None),
        ({"add_rope_scaling_factor": (1.0,)}, None),
        ({"add_rope_scaling_factor": (0.0,)}, None),
        ({"add_rope_scaling_finetuned": (True,), "add_vocab_size": (7,), "add_expert_count": (0,),
          "add_bool": ("llama.attention.causal", True)}, None),
    ],
)  # fmt: skip
def test_rotary_scaling_means_what_it_means_to_llama_cpp(tmp_path, metadata, scaling):
    """A factor without a type is linear, its old key counts where the new one is missing, type none scales nothing."""
    config, params, _ = load_hf_model(MODELS / "smollm2", jnp.float32)
    path = write_gguf(tmp_path / "scaled.gguf", config, params, metadata=metadata)
    assert read_config(open_gguf(path)).rope_scaling == scaling


def test_two_rotary_scalings_at_once_are_refused(tmp_path):
    config, params, _ = load_hf_model(MODELS / "llama3", jnp.float32)
    path = write_gguf(tmp_path / "two.gguf", config, params, metadata={"add_rope_scaling_factor": (4.0,)})
    with pytest.raises(ModelError, match=r"both a rotary scaling factor 4\.0 and factors"):
        read_config(open_gguf(path))


def test_other_architecture_is_refused_by_name(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "gemma.gguf", "gemma")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ModelError, match=f"'gemma'; allowed: {', '.join(GGUF_FAMILIES)}"):
        load_gguf(tmp_path / "gemma.gguf", jnp.float32)


def test_truncated_file_is_always_an_error(tmp_path, rng, sample):
    path = tmp_path / "cut.gguf"
    for cut in [0, 1, 4, 8, 23, len(sample) - 1, *rng.integers(24, len(sample), 40)]:
        path.write_bytes(sample[:cut])
        with pytest.raises(ModelError, match=r"cut\.gguf"):
            load_gguf(path, jnp.float32)


def test_tensor_data_that_is_cut_short_is_found_before_it_is_read(tmp_path, sample):
    end = max(info.start + info.size for info in _open(tmp_path, sample).tensors.values())
    with pytest.raises(ModelError, match=r"tensor '.*' ends at byte .*: it is cut short"):
        _open(tmp_path, sample[: end - 1])


def test_absurd_layer_count_is_refused_before_it_is_built(tmp_path, sample):
    damaged = bytearray(sample)
    key = b"llama.block_count"
    value = damaged.index(key) + len(key) + 4
    damaged[value : value + 4] = (1 << 30).to_bytes(4, "little")
    (tmp_path / "deep.gguf").write_bytes(damaged)
    with pytest.raises(ModelError, match="claims 1073741824 layers"):
        load_gguf(tmp_path / "deep.gguf", jnp.float32)


def test_damaged_header_is_an_error_or_loads(tmp_path, rng, sample):
    """Whatever byte of the header is flipped: no hang, no crash, no exception of another kind."""
    path = tmp_path / "flipped.gguf"
    header = min(info.start for info in _open(tmp_path, sample).tensors.values())
    refused = 0
    for at in [*range(24), *rng.integers(24, header, 60)]:
        damaged = bytearray(sample)
        damaged[at] ^= 1 << int(rng.integers(8))
        path.write_bytes(damaged)
        try:
            load_gguf(path, jnp.float32)
        except PreftError:
            refused += 1
    # Magic, version, counts: each of those 24 bytes matters.
    assert refused >= 24


def _open(tmp_path: Path, data: bytes):
    path = tmp_path / "whole.gguf"
    path.write_bytes(data)
    return open_gguf(path)


@pytest.mark.parametrize("offset", [8, 16], ids=["tensor count", "metadata count"])
@pytest.mark.parametrize("count", [1 << 20, (1 << 64) - 1])
def test_absurd_counts_end_at_the_end_of_the_file(tmp_path, sample, offset, count):
    damaged = bytearray(sample)
    damaged[offset : offset + 8] = count.to_bytes(8, "little")
    with pytest.raises(ModelError):
        _open(tmp_path, bytes(damaged))


@pytest.mark.parametrize(
    ("pre", "text", "pieces"),
    [
        ("smollm", "a 1234b", ["a", "Ġ", "1", "2", "3", "4", "b"]),
        ("llama-bpe", "a 12345b", ["a", "Ġ", "123", "45", "b"]),
        ("qwen2", "a 123b", ["a", "Ġ", "1", "2", "3", "b"]),
        ("gpt-2", "a 1234b", ["a", "Ġ1234", "b"]),
    ],
)
def test_pre_tokenizers_split_digits_as_the_models_do(tmp_path, pre, text, pieces):
    config, params, _ = load_hf_model(MODELS / "smollm2", jnp.float32)
    path = write_gguf(tmp_path / "one.gguf", config, params, tokenizer=byte_level(pre))
    tokenizer = gguf_tokenizer(open_gguf(path).metadata, config.vocab_size, "one.gguf")
    found = tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str(text)
    assert [piece for piece, _ in found] == pieces


@pytest.mark.parametrize(
    ("pre", "add_bos", "expected"),
    [("smollm", None, False), ("smollm", True, True), ("llama-bpe", None, True), ("llama-bpe", False, False)],
)
def test_bos_is_added_where_the_file_or_its_family_says_so(tmp_path, pre, add_bos, expected):
    config, params, _ = load_hf_model(MODELS / "smollm2", jnp.float32)
    path = write_gguf(tmp_path / "one.gguf", config, params, tokenizer=byte_level(pre, add_bos=add_bos))
    _, _, tokenizer = load_gguf(path, jnp.float32)
    ids = tokenizer.encode("ab")
    assert ids == ([config.bos_token_id] if expected else []) + [BYTE_TOKENS.index("a"), BYTE_TOKENS.index("b")]


def test_special_tokens_merges_and_template(tmp_path):
    config, params, _ = load_hf_model(MODELS / "smollm2", jnp.float32)
    tokenizer = byte_level("smollm", merges=["a b"], template="{{ messages[0]['content'] }}!")
    _, _, tokenizer = load_gguf(write_gguf(tmp_path / "one.gguf", config, params, tokenizer=tokenizer), jnp.float32)
    assert tokenizer.encode("ab<|end|><tool>") == [202, 200, 201]
    assert tokenizer.decode([202, 200, 201], skip_special_tokens=True) == "ab<tool>"
    assert tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False) == "hi!"
    assert tokenizer.eos_token_id == config.eos_token_ids[0]


def test_answers_end_where_the_file_or_its_template_says(tmp_path, monkeypatch):
    monkeypatch.setenv("PREFT_CACHE", str(tmp_path / "cache"))
    config, params, _ = load_hf_model(MODELS / "smollm2", jnp.float32)
    template = "{% for m in messages %}{{ m.content }}<|end|>\n{% endfor %}"

    def ends(template, *named):
        metadata = {"add_uint32": named} if named else {}
        tokenizer = byte_level("smollm", template=template)
        path = write_gguf(tmp_path / "one.gguf", config, params, tokenizer=tokenizer, metadata=metadata)
        return load_model(path, "float32").config.eos_token_ids

    assert ends(None) == (1,)
    assert ends(template) == (1, 200)
    assert ends(template, "tokenizer.ggml.eot_token_id", 7) == (1, 7, 200)
    assert ends(None, "tokenizer.ggml.eom_token_id", 8) == (1, 8)
    with pytest.raises(ModelError, match=r"one.gguf has a chat template that cannot be read"):
        ends("{% endfor %}")


def test_smollm2_config(smollm2):
    assert smollm2.config == PRESETS["smollm2-135m"]
    assert sum(leaf.size for leaf in jax.tree.leaves(smollm2.params)) == smollm2.config.num_params()


@pytest.mark.parametrize(
    "text",
    ["Hello, world!", "x = 12345.678", "  two  spaces\n\n\ttab", "Größe 東京 🙂 é", "<|im_start|>user\nhi<|im_end|>"],
)
def test_smollm2_tokenizer_round_trip(smollm2, text):
    assert smollm2.tokenizer.decode(smollm2.tokenizer.encode(text)) == text


def test_smollm2_tokenizer_properties(smollm2):
    tokenizer = smollm2.tokenizer
    digits = tokenizer.convert_ids_to_tokens(tokenizer.encode("2024"))
    assert digits == ["2", "0", "2", "4"]
    assert tokenizer.encode("<|im_start|>") == [1]
    assert tokenizer.encode("<|im_end|>") == [2]
    assert (tokenizer.bos_token, tokenizer.eos_token, len(tokenizer)) == ("<|im_start|>", "<|im_end|>", 49152)


def test_smollm2_tokenizer_gives_the_ids_the_fixtures_were_made_for(smollm2):
    prompts = json.loads((SMOLLM2 / "prompts.json").read_text())
    for entry in prompts["texts"]:
        assert smollm2.tokenizer.encode(entry["text"]) == entry["token_ids"]
