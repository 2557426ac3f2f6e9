"""LoRA fine-tuning with transformers, peft and torch on random weights: what ``bench.sft`` runs as its peer.

Needs an interpreter with these packages; the last line of its output is one JSON object. Full sequences of random
tokens, all seven linears, AdamW on the adapter, a bfloat16 base, SDPA attention.
"""

import argparse
import json
import statistics
import time

LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]

SHAPES = {
    "llama3-8b": {
        "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": 8, "vocab_size": 128256, "rope_theta": 500000.0,
    },
    "tiny": {
        "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4,
        "num_key_value_heads": 2, "vocab_size": 512,
    },
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", choices=SHAPES, required=True)
    for name, default in (("batch", 2), ("seq", 2048), ("rank", 16), ("steps", 6)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--checkpointing", action="store_true")
    parser.add_argument("--autocast", action="store_true", help="so that the adapter's products are in bfloat16, too")
    args = parser.parse_args()

    import peft  # pyright: ignore[reportMissingImports]
    import torch  # pyright: ignore[reportMissingImports]
    import transformers

    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    shape = {**SHAPES[args.shape], "max_position_embeddings": max(8192, args.seq), "attn_implementation": "sdpa"}
    torch.set_default_dtype(torch.bfloat16)
    with torch.device(device):
        base = transformers.LlamaForCausalLM(transformers.LlamaConfig(**shape))
    torch.set_default_dtype(torch.float32)
    num_params = sum(parameter.numel() for parameter in base.parameters())
    lora = peft.LoraConfig(r=args.rank, lora_alpha=args.rank, task_type="CAUSAL_LM", target_modules=LINEARS)
    model = peft.get_peft_model(base, lora)
    if args.checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.enable_input_require_grads()
    model.train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=device == "cuda")
    seconds, losses = [], []
    for _ in range(args.steps):
        tokens = torch.randint(0, shape["vocab_size"], (args.batch, args.seq), device=device)
        start = time.perf_counter()
        with torch.autocast(device, torch.bfloat16, enabled=args.autocast):
            loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.item())
        seconds.append(time.perf_counter() - start)
    rate = args.batch * args.seq / statistics.median(seconds[2:])
    print(
        json.dumps(
            {
                "who": "transformers + peft",
                "autocast": args.autocast,
                "versions": {p.__name__: p.__version__ for p in (torch, transformers, peft)},
                "tokens_per_s": round(rate, 1),
                "tflops_4n": round(4 * num_params * rate / 1e12, 1),
                "peak_gib": round(torch.cuda.max_memory_allocated() / 2**30, 1) if device == "cuda" else None,
                "losses": [round(loss, 4) for loss in losses],
            }
        )
    )


if __name__ == "__main__":
    main()
