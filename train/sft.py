"""``python -m train.sft``: supervised fine-tuning of adapters on a frozen base model, one or many at once.

The adapter acts on prompts only (``--positions prompt``), so the loss of an answer reaches it through the keys and
values that the answer attends to. Without ``--dataset`` a small built-in task is learned. Names are TRL's where it has
one. Output: ``DIR/adapter`` (serves at once), ``metrics.jsonl``, ``loss.png`` and checkpoints.
"""

import logging
import signal
import sys
from collections.abc import Sequence

from rich.console import Console

from preft_jax.cli import hyphenated
from preft_jax.device.mesh import Placement
from preft_jax.errors import ConfigError, PreftError
from preft_jax.loading import load_model, serving_model
from train.run.log import say
from train.run.loop import InterruptError, Run
from train.run.options import Settings, make_parser, settings


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program; returns its exit status: 0, 1 if something failed, 130 if it was interrupted."""
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    logging.getLogger("absl").setLevel(logging.ERROR)
    logging.getLogger("preft.train").setLevel(logging.INFO)
    parser = make_parser(__doc__ or "")
    console = Console(stderr=True)
    try:
        found = settings(parser, hyphenated(sys.argv[1:] if argv is None else argv))
    except ConfigError as error:
        parser.print_usage(sys.stderr)
        print(f"train.sft: {error}", file=sys.stderr)
        return 2
    for note in found.notes:
        say(console, note)
    try:
        return _train(found, console)
    except InterruptError as error:
        print(f"train.sft: {error}", file=sys.stderr)
        return 130
    except KeyboardInterrupt:
        print("train.sft: ended at once; what is in the checkpoints is whole", file=sys.stderr)
        return 130
    except (PreftError, OSError) as error:
        print(f"train.sft: {error}", file=sys.stderr)
        return 1


def _train(found: Settings, console: Console) -> int:
    placement = Placement.single() if found.mesh is None else Placement.parse(found.mesh)
    model = serving_model(load_model(found.model, dtype=found.dtype), 2)
    with Run(found, model, placement, console) as run:
        before = signal.signal(signal.SIGTERM, lambda *_: run.interrupt())
        try:
            failed = run.train()
        finally:
            signal.signal(signal.SIGTERM, before)
    for name, reason in failed.items():
        print(f"train.sft: {name}: {reason}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
