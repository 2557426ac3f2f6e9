"""The peer's side of ``bench.cpu_generation``: Hugging Face transformers with torch, and peft, in a process of its own.

Run by the benchmark with a Python that has torch; reads one JSON command a line from standard input and answers each
with one JSON line: ``{"prompts": [[token ids]], "new_tokens": n, "adapter": bool}`` gives ``{"seconds": s, "tokens":
[[token
ids]]}``.
"""

import json
import sys
import time

import peft  # pyright: ignore[reportMissingImports]
import torch  # pyright: ignore[reportMissingImports]
import transformers


def main() -> None:
    """Load the model and the adapter named on the command line, then answer commands until the input ends."""
    model_dir, adapter_dir, threads = sys.argv[1:4]
    torch.set_num_threads(int(threads))
    base = transformers.AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32).eval()
    adapted = peft.PeftModel.from_pretrained(
        transformers.AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32), adapter_dir
    ).eval()
    names = {"torch": torch, "transformers": transformers, "peft": peft}
    print(json.dumps({"versions": {name: module.__version__ for name, module in names.items()}}), flush=True)
    for line in sys.stdin:
        command = json.loads(line)
        model = adapted if command["adapter"] else base
        ids = torch.tensor(command["prompts"])
        new = command["new_tokens"]
        start = time.perf_counter()
        with torch.inference_mode():
            out = model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                do_sample=False,
                min_new_tokens=new,
                max_new_tokens=new,
                pad_token_id=0,
            )
        seconds = time.perf_counter() - start
        print(json.dumps({"seconds": seconds, "tokens": out[:, ids.shape[1] :].tolist()}), flush=True)


if __name__ == "__main__":
    main()
