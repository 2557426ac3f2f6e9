"""``python -m train.sft``: supervised fine-tuning of adapters on a frozen base model, one or many at once.

The adapter acts on prompts only (``--positions prompt``), so the loss of an answer reaches it through the keys and
values that the answer attends to. Without ``--dataset`` a small built-in task is learned. Names are TRL's where it has
one. Output: ``DIR/adapter`` (serves at once), ``metrics.jsonl``, ``loss.png`` and checkpoints.
"""

import sys
from collections.abc import Sequence

from rich.console import Console

from preft_jax.device.mesh import Placement
from preft_jax.loading import load_model, serving_model
from train.run.loop import Run
from train.run.options import Settings, make_parser, settings
from train.run.program import ended_by_sigterm, run_program


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program; returns its exit status: 0, 1 if something failed, 130 if it was interrupted."""
    return run_program("train.sft", make_parser(__doc__ or ""), settings, _train, argv)


def _train(found: Settings, console: Console) -> dict[str, str]:
    placement = Placement.single() if found.mesh is None else Placement.parse(found.mesh)
    model = serving_model(load_model(found.model, found.dtype, quantization=found.quantization), 2)
    with Run(found, model, placement, console) as run, ended_by_sigterm(run):
        return run.train()


if __name__ == "__main__":
    sys.exit(main())
