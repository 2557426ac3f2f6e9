"""vLLM on the workload of ``bench.headline``: random weights, N LoRA adapters on all linears, taken in turn.

    python bench/peer_vllm.py --shape llama3-8b --adapters 64

Needs an interpreter with vllm, torch and safetensors, not this package. One directory of an adapter stands for all N
names: loading costs the same. The last line of its output is one JSON object.
"""

import argparse
import datetime
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

SHAPES = {
    "llama3-8b": {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336,
        "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256,
        "rope_theta": 500000.0, "tie_word_embeddings": False,
    },
    "qwen2.5-0.5b": {
        "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "hidden_size": 896, "intermediate_size": 4864,
        "num_hidden_layers": 24, "num_attention_heads": 14, "num_key_value_heads": 2, "vocab_size": 151936,
        "rope_theta": 1000000.0, "tie_word_embeddings": True,
    },
}  # fmt: skip


def write_model(shape: str, folder: Path) -> None:
    """Write a config; the weights are vLLM's own random ones."""
    common = {"max_position_embeddings": 32768, "rms_norm_eps": 1e-5, "torch_dtype": "bfloat16", "hidden_act": "silu"}
    ends = {"bos_token_id": 1, "eos_token_id": 2}
    (folder / "config.json").write_text(json.dumps(SHAPES[shape] | common | ends))


def write_adapter(shape: str, rank: int, folder: Path) -> None:
    """Write a random LoRA of all linears in PEFT's format."""
    import torch  # pyright: ignore[reportMissingImports]
    from safetensors.torch import save_file

    s: dict[str, Any] = SHAPES[shape]
    d, f = s["hidden_size"], s["intermediate_size"]
    kv = d // s["num_attention_heads"] * s["num_key_value_heads"]
    linears = {
        "self_attn.q_proj": (d, d), "self_attn.k_proj": (d, kv), "self_attn.v_proj": (d, kv),
        "self_attn.o_proj": (d, d), "mlp.gate_proj": (d, f), "mlp.up_proj": (d, f), "mlp.down_proj": (f, d),
    }  # fmt: skip
    tensors = {}
    for layer in range(s["num_hidden_layers"]):
        for name, (width, out) in linears.items():
            key = f"base_model.model.model.layers.{layer}.{name}"
            tensors[f"{key}.lora_A.weight"] = (torch.randn(rank, width) * 0.01).bfloat16()
            tensors[f"{key}.lora_B.weight"] = (torch.randn(out, rank) * 0.01).bfloat16()
    save_file(tensors, str(folder / "adapter_model.safetensors"))
    config = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": rank, "lora_alpha": rank, "lora_dropout": 0.0,
        "bias": "none", "target_modules": sorted(name.split(".")[1] for name in linears),
        "base_model_name_or_path": shape,
    }  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(config))


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--shape", choices=SHAPES, default="llama3-8b")
    add("--adapters", type=int, default=0, help="0: the base model, LoRA switched off")
    add("--rank", type=int, default=16)
    for name, default in (("num-prompts", 1024), ("input-len", 256), ("output-len", 256), ("max-num-seqs", 512)):
        add(f"--{name}", type=int, default=default)
    add("--rounds", type=int, default=1, help="runs of the workload; all are given, the median counts")
    add("--output-json", type=Path, default=None, help="also write the JSON line here")
    return parser.parse_args()


def report(figures: dict[str, Any], path: Path | None) -> None:
    line = json.dumps(figures)
    if path is not None:
        path.write_text(line + "\n")
    print(line)


def main() -> None:
    args = options()
    os.environ |= {
        "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_LOGGING_LEVEL": "WARNING",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_USE_FLASHINFER_SAMPLER": "0",
    }  # fmt: skip

    # This folder's modules are not those that vLLM's packages mean by the same names.
    sys.path = [path for path in sys.path if Path(path or ".").resolve() != Path(__file__).resolve().parent]

    import numpy as np
    import torch  # pyright: ignore[reportMissingImports]
    import vllm  # pyright: ignore[reportMissingImports]
    from vllm.lora.request import LoRARequest  # pyright: ignore[reportMissingImports]

    with tempfile.TemporaryDirectory() as name:
        folder, adapter = Path(name) / "model", Path(name) / "adapter"
        folder.mkdir()
        adapter.mkdir()
        write_model(args.shape, folder)
        lora: dict[str, Any] = {}
        if args.adapters:
            write_adapter(args.shape, args.rank, adapter)
            lora = {"enable_lora": True, "max_loras": args.adapters, "max_cpu_loras": args.adapters}
            lora["max_lora_rank"] = max(8, args.rank)
        start = time.perf_counter()
        llm = vllm.LLM(
            model=str(folder), load_format="dummy", skip_tokenizer_init=True, seed=0, max_num_seqs=args.max_num_seqs,
            max_model_len=args.input_len + args.output_len + 16, gpu_memory_utilization=0.92,
            enable_prefix_caching=False, **lora,
        )  # fmt: skip
        ready = time.perf_counter() - start

        def serve(prompts: list[Any], length: int, adapters: list[Any] | None) -> float:
            params = vllm.SamplingParams(temperature=0.0, max_tokens=length, ignore_eos=True, detokenize=False)
            start = time.perf_counter()
            outputs = llm.generate(prompts, params, lora_request=adapters, use_tqdm=False)
            seconds = time.perf_counter() - start
            assert all(len(output.outputs[0].token_ids) == length for output in outputs)
            return seconds

        own = [LoRARequest(f"adapter-{i}", i + 1, str(adapter)) for i in range(args.adapters)]
        loading = serve([{"prompt_token_ids": [5, 6, 7]}] * len(own), 1, own) if own else 0.0
        each = [own[i % len(own)] for i in range(args.num_prompts)] if own else None
        prefills, wholes = [], []
        for number in range(args.rounds + 1):
            rng = np.random.default_rng(number)
            tokens = rng.integers(3, SHAPES[args.shape]["vocab_size"] - 1, (args.num_prompts, args.input_len))
            prompts = [{"prompt_token_ids": row.tolist()} for row in tokens]
            if number == 0:  # Not counted.
                serve(prompts[:64], 8, each and each[:64])
                continue
            prefills.append(serve(prompts, 1, each))
            wholes.append(serve(prompts, args.output_len, each))
    rates = [args.num_prompts * args.output_len / seconds for seconds in wholes]
    figures = {
        "who": "vllm",
        "versions": {"vllm": vllm.__version__, "torch": torch.__version__},
        "device": {"kind": torch.cuda.get_device_name()},
        "date": datetime.date.today().isoformat(),
        **{key: value for key, value in vars(args).items() if key != "output_json"},
        "ready_s": round(ready, 1),
        "loading_s": round(loading, 1),
        "prefill_tokens_per_s": round(args.num_prompts * args.input_len / float(np.median(prefills)), 1),
        "output_throughput": round(float(np.median(rates)), 1),
        "throughputs": [round(rate, 1) for rate in rates],
    }
    report(figures, args.output_json)


if __name__ == "__main__":
    main()
