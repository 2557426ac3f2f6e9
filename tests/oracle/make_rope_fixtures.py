"""Makes ``rope/configs.json``: rotary settings as configs say them, and the frequencies that transformers reads."""

import argparse
import itertools
import json
from pathlib import Path

import torch
import transformers
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

PLACES = {
    "rope_theta": (None, 500.0),
    "rope_parameters": (
        None,
        {"rope_type": "default", "rope_theta": 10000.0},
        {"rope_type": "default", "rope_theta": 2000.0},
        {"rope_type": "linear", "factor": 4.0},
        {"type": "linear", "factor": 2.0, "rope_theta": 300.0},
    ),
    "rope_scaling": (
        None,
        {},
        {"type": "linear", "factor": 8.0},
        {"rope_type": "default"},
        {"factor": 4.0},
        {"rope_type": "linear", "factor": 1.0, "rope_theta": 700.0},
        {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
        {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
        {"type": "dynamic", "factor": 4.0},
        {"rope_type": "linear", "type": "default", "factor": 4.0},
        {"rope_type": "linear", "factor": 2.0, "partial_rotary_factor": 0.5},
    ),
    "original_max_position_embeddings": (None, 32),
    "partial_rotary_factor": (None, 0.5),
}  # fmt: skip
MODEL = {
    "model_type": "llama", "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 64, "max_position_embeddings": 256,
}  # fmt: skip


def read(settings: dict) -> tuple[list[float], float] | None:
    """Return transformers' frequencies and what it multiplies cosines with, or None if it refuses the settings."""
    try:
        config = transformers.LlamaConfig.from_dict(json.loads(json.dumps(MODEL | settings)))
        rotary = LlamaRotaryEmbedding(config)
    except Exception:
        return None
    return [float(f"{x:.7g}") for x in rotary.inv_freq.to(torch.float32).tolist()], float(rotary.attention_scaling)


def main() -> None:
    """Write the fixture."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True)
    output = parser.parse_args().output
    output.mkdir(parents=True, exist_ok=True)
    transformers.logging.set_verbosity_error()
    cases = []
    for values in itertools.product(*PLACES.values()):
        settings = {name: value for name, value in zip(PLACES, values, strict=True) if value is not None}
        if "partial_rotary_factor" in settings and len(settings) > 2:
            continue
        found = read(settings)
        cases.append({"settings": settings, "inv_freq": found and found[0], "attention_scaling": found and found[1]})
    text = ",\n ".join(json.dumps(case) for case in cases)
    (output / "configs.json").write_text(f'{{"model": {json.dumps(MODEL)}, "cases": [\n {text}\n]}}\n')


if __name__ == "__main__":
    main()
