"""Write what PEFT and torch compute when they train a LoRA, for the tests of our trainer. Needs torch and peft, in the
versions that ``.ci/oracle`` names.

    python tests/oracle/make_training_fixture.py --output tests/fixtures/training

The base model is ``tests/fixtures/models/llama3``, in float32. ``--output`` gets

    init/          the adapter before training, as PEFT writes it: r 8, alpha 16, all seven linears, no dropout
    final/         the same adapter after the 50 steps of ``losses``
    oracle.npz     tokens         int32 [50, 2, 24]: the batch of each step; 5 different ones, over and over
                   losses         float64 [50]: the mean over all next tokens, before the step's update
                   grad_norms     float64 [50]: the global norm of the gradients of ``losses``, before clipping
                   losses_masked  float64 [50]: trained from ``init`` again, the first 10 tokens of a row not labels
    versions.json  the versions of torch, transformers and peft

Everything is computed in float32; losses and norms are stored in float64 as they are. Each step clips the gradients'
global norm to 1 (torch divides by norm + 1e-6) and updates with AdamW: weight decay 0.01 on all of the adapter's
tensors, a constant learning rate of 5e-3.
"""

import argparse
import json
from pathlib import Path

import numpy as np
import peft
import torch
import transformers

MODEL = Path(__file__).parent.parent / "fixtures" / "models" / "llama3"
LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
STEPS = 50
DISTINCT = 5
"""Random tokens have nothing in common to learn: only batches that come again let the loss fall."""
BATCH_SHAPE = (2, 24)
UNLABELLED = 10
IGNORED_LABEL = -100
MAX_GRAD_NORM = 1.0


def make_tokens(vocab_size: int) -> np.ndarray:
    """Return the token ids of every step, int32 ``[STEPS, *BATCH_SHAPE]``."""
    batches = np.random.default_rng(0).integers(0, vocab_size, (DISTINCT, *BATCH_SHAPE)).astype(np.int32)
    return batches[np.arange(STEPS) % DISTINCT]


def load_base() -> transformers.LlamaForCausalLM:
    """Load the base model in float32, under a name that does not depend on where it lies."""
    model = transformers.LlamaForCausalLM.from_pretrained(MODEL, dtype=torch.float32, attn_implementation="eager")
    model.name_or_path = MODEL.name
    return model


def save_adapter(model: peft.PeftModel, directory: Path) -> None:
    """Write the adapter as PEFT does, but for its README and for the order of what PEFT writes as a set."""
    model.save_pretrained(directory, save_embedding_layers=False)
    (directory / "README.md").unlink(missing_ok=True)
    config = directory / "adapter_config.json"
    contents = json.loads(config.read_text())
    contents["target_modules"].sort()
    config.write_text(json.dumps(contents, indent=2, sort_keys=True) + "\n")


def make_initial_adapter(directory: Path) -> None:
    """Write an adapter with PEFT's own initial values."""
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=8, lora_alpha=16, lora_dropout=0.0, target_modules=LINEARS)
    torch.manual_seed(0)
    save_adapter(peft.get_peft_model(load_base(), config), directory)


def train(init: Path, tokens: np.ndarray, unlabelled: int) -> tuple[peft.PeftModel, np.ndarray, np.ndarray]:
    """Train the adapter of ``init``, one step for each batch, and return it, the losses and the gradients' norms."""
    model = peft.PeftModel.from_pretrained(load_base(), init, is_trainable=True).train()
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=5e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.01)
    losses, grad_norms = [], []
    for batch in torch.from_numpy(tokens).long():
        labels = batch.clone()
        labels[:, :unlabelled] = IGNORED_LABEL
        loss = model(input_ids=batch, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        grad_norms.append(torch.nn.utils.clip_grad_norm_(parameters, MAX_GRAD_NORM).item())
        optimizer.step()
        losses.append(loss.item())
    return model, np.array(losses, np.float64), np.array(grad_norms, np.float64)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True, help="directory for the fixture")
    output = parser.parse_args().output
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    output.mkdir(parents=True, exist_ok=True)

    tokens = make_tokens(transformers.AutoConfig.from_pretrained(MODEL).vocab_size)
    make_initial_adapter(output / "init")
    model, losses, grad_norms = train(output / "init", tokens, unlabelled=0)
    save_adapter(model, output / "final")
    _, losses_masked, _ = train(output / "init", tokens, unlabelled=UNLABELLED)
    np.savez_compressed(
        output / "oracle.npz", tokens=tokens, losses=losses, grad_norms=grad_norms, losses_masked=losses_masked
    )
    versions = {f"{module.__name__}_version": module.__version__ for module in (torch, transformers, peft)}
    (output / "versions.json").write_text(json.dumps(versions, indent=2) + "\n")

    for path in sorted(path for path in output.rglob("*") if path.is_file()):
        print(f"{path}: {path.stat().st_size:,} bytes")
    print(f"losses {losses[0]:.6f} to {losses[-1]:.6f}, masked {losses_masked[0]:.6f} to {losses_masked[-1]:.6f}")


if __name__ == "__main__":
    main()
