"""What the training programs share: their exit status, what they print of errors, and how they are interrupted."""

import argparse
import contextlib
import logging
import signal
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Protocol

from rich.console import Console

from preft_jax.cli import hyphenated
from preft_jax.errors import ConfigError, PreftError
from train.run.interruptible import InterruptError
from train.run.log import say
from train.run.options import Settings


class Interruptible(Protocol):
    """A run that can be asked to end."""

    def interrupt(self) -> None:
        """End soon, with a checkpoint; a second call ends at once."""
        ...


def run_program[SettingsT: Settings](
    name: str,
    parser: argparse.ArgumentParser,
    settings: Callable[[argparse.ArgumentParser, Sequence[str]], SettingsT],
    train: Callable[[SettingsT, Console], Mapping[str, str]],
    argv: Sequence[str] | None,
) -> int:
    """Run a training program; returns its exit status: 0, 1 if something failed, 2 for usage, 130 if interrupted.

    Args:
        name: of the program.
        parser: of its command line.
        settings: reads the command line.
        train: trains, and returns why those jobs failed that did.
        argv: the command line; None is the process's.
    """
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    logging.getLogger("absl").setLevel(logging.ERROR)
    logging.getLogger("preft.train").setLevel(logging.INFO)
    console = Console(stderr=True)
    try:
        found = settings(parser, hyphenated(sys.argv[1:] if argv is None else argv))
    except ConfigError as error:
        parser.print_usage(sys.stderr)
        print(f"{name}: {error}", file=sys.stderr)
        return 2
    for note in found.notes:
        say(console, note)
    try:
        failed = train(found, console)
    except InterruptError as error:
        print(f"{name}: {error}", file=sys.stderr)
        return 130
    except KeyboardInterrupt:
        print(f"{name}: ended at once; what is in the checkpoints is whole", file=sys.stderr)
        return 130
    except (PreftError, OSError) as error:
        print(f"{name}: {error}", file=sys.stderr)
        return 1
    for job, reason in failed.items():
        print(f"{name}: {job}: {reason}", file=sys.stderr)
    return 1 if failed else 0


@contextlib.contextmanager
def ended_by_sigterm(run: Interruptible) -> Iterator[None]:
    """Let SIGTERM interrupt a run."""
    before = signal.signal(signal.SIGTERM, lambda *_: run.interrupt())
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
