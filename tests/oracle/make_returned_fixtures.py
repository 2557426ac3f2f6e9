"""Writes our prefill-only LoRAs as they come back from PEFT; see ``.ci/oracle``.

    python tests/oracle/make_returned_fixtures.py --ours tests/fixtures/returned/ours --output tests/fixtures/returned

``--ours`` has ``prompt`` and ``ends``, written by our ``save_adapter``. ``--output`` gets, each as PEFT writes it,

    resaved/{name}      loaded and saved
    continued/{name}    loaded to be trained, changed, and saved in bfloat16
    combined/{name}     the weighted sum of the adapter with itself, as an adapter of its own
"""

import argparse
import json
import warnings
from pathlib import Path

import make_peft_fixtures as common
import peft
import torch


def load(base: Path, directory: Path, *, is_trainable: bool = False) -> peft.PeftModel:
    """Load one of ours with PEFT, which says that it does not know ``preft``."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return peft.PeftModel.from_pretrained(common.load_base(base), directory, is_trainable=is_trainable)


def save(model: peft.PeftModel, directory: Path, adapter: str = "default") -> None:
    """Save an adapter; the order of its target modules is made the same each time."""
    model.save_pretrained(directory, selected_adapters=[adapter], save_embedding_layers=False)
    where = directory if adapter == "default" else directory / adapter
    for path in where.iterdir():
        path.replace(directory / path.name)
    if where != directory:
        where.rmdir()
    (directory / "README.md").unlink(missing_ok=True)
    config = directory / "adapter_config.json"
    contents = json.loads(config.read_text())
    contents["target_modules"] = sorted(contents["target_modules"])
    config.write_text(json.dumps(contents, indent=2, sort_keys=True) + "\n")


@torch.no_grad()
def main() -> None:
    """Write the fixtures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ours", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args()
    base = common.FIXTURES / "base"
    for directory in sorted(options.ours.iterdir()):
        save(load(base, directory), options.output / "resaved" / directory.name)
        model = load(base, directory, is_trainable=True)
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.mul_(0.5)
        save(model.to(torch.bfloat16), options.output / "continued" / directory.name)
        model = load(base, directory)
        model.add_weighted_adapter(["default"], [0.25], "sum", combination_type="linear")
        save(model, options.output / "combined" / directory.name, "sum")


if __name__ == "__main__":
    main()
