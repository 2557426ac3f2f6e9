"""``python -m train.rl``: reinforcement learning of adapters on a frozen base model, one or many at once.

Samples are drawn through the serving engine in the same process: a prompt is prefilled with its adapter once, and all
of its samples go on from there at the speed of the base model. Without ``--task`` a small built-in task is learned.
Names are TRL's where it has one. Output: ``DIR/adapter`` (serves at once), ``metrics.jsonl``, ``reward.png``,
``transcripts.txt``, ``results.json`` and checkpoints.
"""

import sys
from collections.abc import Sequence

from rich.console import Console

from preft_jax.loading import load_model, serving_model
from train.rollouts.loop import RolloutRun
from train.rollouts.options import RolloutSettings, make_parser, settings
from train.run.program import ended_by_sigterm, run_program


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program; returns its exit status: 0, 1 if something failed, 130 if it was interrupted."""
    return run_program("train.rl", make_parser(__doc__ or ""), settings, _train, argv)


def _train(found: RolloutSettings, console: Console) -> dict[str, str]:
    model = serving_model(load_model(found.model, found.dtype, quantization=found.quantization), 2)
    with RolloutRun(found, model, console) as run, ended_by_sigterm(run):
        return run.train()


if __name__ == "__main__":
    sys.exit(main())
