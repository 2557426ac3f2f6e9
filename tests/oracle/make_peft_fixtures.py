"""Write what PEFT and pyreft store and compute, for the tests of our adapter files; see ``.ci/oracle``.

    python tests/oracle/make_peft_fixtures.py --output tests/fixtures/peft
    python tests/oracle/make_peft_fixtures.py --check-ours DIR

``--output`` gets, for one small random Llama (the shape of our preset ``tiny``):

    base/          the model as ``save_pretrained`` writes it, stored in bfloat16
    {name}/        ``adapter_config.json`` and ``adapter_model.safetensors`` as PEFT writes them, for each name below
    logits.npz     tokens int32 [2, 12]; base and each {name}: float32 [2, 12, 256]
    pyreft/{name}/ config.json, intkey_*.bin   the folder as pyreft's ``save`` writes it
                   state.npz                   "{file name without .bin}/{tensor name}": the tensors of those files
                   io.npz                      x float32 [5, 64], and "{key}": output of that key's module for x
    pyreft/logits.npz  tokens int32 [2, 12]; each {name}: float32 [2, 12, 256], edited at the positions ``POSITIONS``

All logits are computed in float32 from the tensors as they are stored. PEFT's adapters are

    ===========  ==================================================================  ========
    name         what it exercises                                                   stored
    ===========  ==================================================================  ========
    lora         all seven linears, alpha not the rank, dropout                      float32
    rslora       use_rslora                                                          bfloat16
    patterns     rank_pattern, alpha_pattern, layers_to_transform, layers_pattern    float32
    regex        target_modules as a regular expression that leaves out a layer      float16
    all_linear   target_modules "all-linear", exclude_modules                        float32
    ===========  ==================================================================  ========

and pyreft's are ``loreft`` (shared weights), ``loreft_unshared`` (weights of their own for first and last positions,
layers 0 and 2), ``direft`` and ``nodireft``. pyreft and pyvene are installed without dependencies into a temporary
directory; what they import for plots and data sets is replaced by empty modules.

``--check-ours`` takes a directory of adapters that our code wrote with format "peft", such as

    for name in lora rslora patterns regex all_linear; do
        python -m preft_jax.adapters convert tests/fixtures/peft/$name DIR/$name --to peft
    done

and fails unless PEFT loads each one without a warning, holds the same tensors, and computes the logits of
``logits.npz``.
"""

import argparse
import contextlib
import importlib
import json
import subprocess
import sys
import tempfile
import types
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import peft
import safetensors.torch
import torch
import transformers

FIXTURES = Path(__file__).parent.parent / "fixtures" / "peft"
TOKENS_SHAPE = (2, 12)
POSITIONS = "f3+l2"
REQUIREMENTS = ("pyreft==0.1.0", "pyvene==0.1.8")

MODEL: dict[str, Any] = {
    "vocab_size": 256,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "rope_theta": 10000.0,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
    "max_position_embeddings": 1024,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "initializer_range": 0.2,
    "attn_implementation": "eager",
}

ADAPTERS: dict[str, tuple[torch.dtype, dict[str, Any]]] = {
    "lora": (
        torch.float32,
        {
            "r": 4,
            "lora_alpha": 8,
            "lora_dropout": 0.1,
            "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
        },
    ),
    "rslora": (
        torch.bfloat16,
        {"r": 8, "lora_alpha": 4, "use_rslora": True, "target_modules": ["q_proj", "v_proj"]},
    ),
    "patterns": (
        torch.float32,
        {
            "r": 4,
            "lora_alpha": 6,
            "target_modules": ["q_proj", "v_proj", "down_proj"],
            "layers_to_transform": [0, 2],
            "layers_pattern": "layers",
            "rank_pattern": {"q_proj": 2, r"layers\.2\.self_attn\.v_proj": 6},
            "alpha_pattern": {"model.layers.0.mlp.down_proj": 3, "v_proj": 12},
        },
    ),
    "regex": (
        torch.float16,
        {"r": 3, "lora_alpha": 3, "target_modules": r"model\.layers\.[12]\.(self_attn\.[qk]_proj|mlp\.gate_proj)"},
    ),
    "all_linear": (
        torch.float32,
        {"r": 2, "lora_alpha": 2, "target_modules": "all-linear", "exclude_modules": r".*\.(o|down)_proj"},
    ),
}

PYREFT: dict[str, tuple[str, list[int], bool]] = {
    "loreft": ("LoreftIntervention", [0, 1, 2], True),
    "loreft_unshared": ("LoreftIntervention", [0, 2], False),
    "direft": ("DireftIntervention", [1, 2], True),
    "nodireft": ("NodireftIntervention", [0, 1, 2], True),
}
"""Name -> (class, layers, shared weights)."""


def tokens() -> torch.Tensor:
    """Return the token ids of every example, int64 ``TOKENS_SHAPE``."""
    generator = torch.Generator().manual_seed(1)
    return torch.randint(2, MODEL["vocab_size"], TOKENS_SHAPE, generator=generator)


def make_base(directory: Path) -> None:
    """Write the base model, in bfloat16."""
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**MODEL)).to(torch.bfloat16)
    model.save_pretrained(directory)


def load_base(directory: Path) -> transformers.LlamaForCausalLM:
    """Load the base model in float32, under a name that does not depend on where it lies."""
    model = transformers.LlamaForCausalLM.from_pretrained(
        directory, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    model.name_or_path = "tiny-llama"
    return model


@torch.no_grad()
def logits_of(model: torch.nn.Module) -> np.ndarray:
    """Return the model's float32 logits for ``tokens()``."""
    return model(input_ids=tokens()).logits.float().numpy()


def make_peft_adapter(base: Path, directory: Path, dtype: torch.dtype, options: dict[str, Any]) -> None:
    """Write an adapter with random weights as PEFT does, tensors stored in ``dtype``."""
    model = peft.get_peft_model(load_base(base), peft.LoraConfig(task_type="CAUSAL_LM", **options))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.1 if "lora_A" in name else 0.3)
    model.to(dtype).save_pretrained(directory, save_embedding_layers=False)
    (directory / "README.md").unlink(missing_ok=True)
    config = directory / "adapter_config.json"
    contents = json.loads(config.read_text())
    # PEFT writes a set, whose order changes from run to run.
    if isinstance(contents["target_modules"], list):
        contents["target_modules"].sort()
    config.write_text(json.dumps(contents, indent=2, sort_keys=True) + "\n")


def load_peft_adapter(base: Path, directory: Path) -> peft.PeftModel:
    """Load an adapter with PEFT, in float32; any warning is an error."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return peft.PeftModel.from_pretrained(load_base(base), directory).float().eval()


def make_peft_fixtures(output: Path) -> None:
    """Write the base model, PEFT's adapters and their logits."""
    base = output / "base"
    make_base(base)
    logits = {"tokens": tokens().numpy().astype(np.int32), "base": logits_of(load_base(base))}
    for seed, (name, (dtype, options)) in enumerate(ADAPTERS.items()):
        torch.manual_seed(100 + seed)
        make_peft_adapter(base, output / name, dtype, options)
        logits[name] = logits_of(load_peft_adapter(base, output / name))
    np.savez_compressed(output / "logits.npz", **logits)


class _Empty(types.ModuleType):
    """A module in which every name is an empty class."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {})


@contextlib.contextmanager
def pyreft_modules() -> Iterator[tuple[Any, Any, Any]]:
    """Yield ``pyvene``, ``pyreft.interventions`` and ``pyreft.dataset``, installed for the time being."""
    importlib.import_module("torch._dynamo")
    with tempfile.TemporaryDirectory() as site:
        install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", site, *REQUIREMENTS]
        subprocess.run(install, check=True)
        sys.path.insert(0, site)
        for name in ("matplotlib", "matplotlib.pyplot", "networkx", "pandas", "datasets", "nnsight"):
            try:
                importlib.import_module(name)
            except ImportError:
                sys.modules[name] = _Empty(name)
        package = types.ModuleType("pyreft")
        package.__path__ = [str(Path(site) / "pyreft")]
        sys.modules["pyreft"] = package
        try:
            yield tuple(importlib.import_module(name) for name in ("pyvene", "pyreft.interventions", "pyreft.dataset"))
        finally:
            sys.path.remove(site)


def make_intervention(interventions: Any, class_name: str) -> torch.nn.Module:
    """Return an intervention of rank 4 with weights as far from their initial values as training takes them."""
    module = getattr(interventions, class_name)(
        embed_dim=MODEL["hidden_size"], low_rank_dimension=4, dtype=torch.float32, add_bias=False, act_fn=None
    )
    with torch.no_grad():
        module.learned_source.weight.normal_(std=0.2)
        module.learned_source.bias.normal_(std=0.5)
        if class_name == "NodireftIntervention":
            module.proj_layer.weight.normal_(std=0.3)
        else:
            free = module.rotate_layer.parametrizations.weight.original
            free += 0.3 * torch.randn_like(free).tril(-1)
    return module.eval()


@torch.no_grad()
def make_pyreft_folder(
    modules: tuple[Any, Any, Any], base: Path, directory: Path, spec: tuple[str, list[int], bool]
) -> Any:
    """Write one pyreft folder with its ``state.npz`` and ``io.npz``, and return the logits of the edited model."""
    pyvene, interventions, dataset = modules
    class_name, layers, shared = spec
    layers = layers if shared else layers * 2
    representations = [
        {
            "layer": layer,
            "component": "block_output",
            "low_rank_dimension": 4,
            "intervention": make_intervention(interventions, class_name),
        }
        for layer in layers
    ]
    model = pyvene.IntervenableModel(pyvene.IntervenableConfig(representations=representations), load_base(base))
    model.disable_model_gradients()
    model.save(str(directory))

    x = torch.randn(5, MODEL["hidden_size"])
    outputs = {key: module(x).numpy() for key, module in model.interventions.items()}
    np.savez_compressed(directory / "io.npz", x=x.numpy(), **outputs)
    states = {
        f"{path.stem}/{name}": tensor.float().numpy()
        for path in sorted(directory.glob("*.bin"))
        for name, tensor in torch.load(path, weights_only=True).items()
    }
    np.savez_compressed(directory / "state.npz", **states)

    batch, length = TOKENS_SHAPE
    places = dataset.get_intervention_locations(
        last_position=length, positions=POSITIONS, num_interventions=len(layers), share_weights=shared
    )
    # pyreft pads the shorter of the two lists with -1, and masks that place out in its data collator.
    locations = [[[position for position in place if position >= 0]] * batch for place in places]
    _, edited = model({"input_ids": tokens()}, unit_locations={"sources->base": (None, locations)})
    return edited.logits.float().numpy()


def make_pyreft_fixtures(output: Path) -> None:
    """Write pyreft's folders and their logits; needs the base model."""
    logits = {"tokens": tokens().numpy().astype(np.int32)}
    with pyreft_modules() as modules:
        for seed, (name, spec) in enumerate(PYREFT.items()):
            torch.manual_seed(200 + seed)
            logits[name] = make_pyreft_folder(modules, output / "base", output / "pyreft" / name, spec)
    np.savez_compressed(output / "pyreft" / "logits.npz", **logits)


def check_ours(directory: Path) -> None:
    """Fail unless PEFT reads every adapter of ``directory`` as the fixture of the same name."""
    expected = np.load(FIXTURES / "logits.npz")
    names = sorted(path.parent.name for path in directory.glob("*/adapter_config.json"))
    if not names:
        raise SystemExit(f"{directory} holds no adapters")
    for name in names:
        model = load_peft_adapter(FIXTURES / "base", directory / name)
        held = peft.get_peft_model_state_dict(model, save_embedding_layers=False)
        for source in (directory, FIXTURES):
            stored = safetensors.torch.load_file(source / name / "adapter_model.safetensors")
            if set(stored) != set(held) or not all(torch.equal(held[key], x.float()) for key, x in stored.items()):
                raise SystemExit(f"{name}: PEFT does not hold the tensors of {source / name}")
        if not np.array_equal(logits_of(model), expected[name]):
            raise SystemExit(f"{name}: PEFT computes other logits than for its own adapter")
        print(f"ok: {name}")


def main() -> None:
    parser = argparse.ArgumentParser(description="Write the fixtures of PEFT and pyreft, or check adapters we wrote.")
    mode = parser.add_mutually_exclusive_group(required=True)
    mode.add_argument("--output", type=Path, help="directory for the fixtures")
    mode.add_argument("--check-ours", type=Path, help="directory of adapters that our code wrote in PEFT's format")
    options = parser.parse_args()
    if options.check_ours:
        check_ours(options.check_ours)
        return
    options.output.mkdir(parents=True, exist_ok=True)
    make_peft_fixtures(options.output)
    make_pyreft_fixtures(options.output)


if __name__ == "__main__":
    main()
