"""What benchmarks share that end with a verdict: a failure of what they check is their exit status."""

import argparse
import sys
from collections.abc import Callable, Sequence
from typing import Any

import httpx
from rich.console import Console

from preft_jax.cli import hyphenated
from preft_jax.errors import PreftError
from serve.bench.output import emit


def judge(
    parser: argparse.ArgumentParser,
    argv: Sequence[str] | None,
    run: Callable[[argparse.Namespace], dict[str, Any]],
    print_table: Callable[[dict[str, Any], Console], None],
) -> int:
    """Run a benchmark and tell its figures; return its exit status: 0 if ``figures.kept``, else 1.

    Args:
        parser: of the command line, with an option ``--output-json``.
        argv: the command line; None is the process's.
        run: measures, and returns what the JSON line holds.
        print_table: prints it for people.
    """
    args = parser.parse_args(hyphenated(sys.argv[1:] if argv is None else argv))
    try:
        if args.output_json is not None:
            args.output_json.parent.mkdir(parents=True, exist_ok=True)  # Before anything is measured.
        found = run(args)
        print_table(found, Console())
        emit(found, args.output_json)
    except (PreftError, OSError, httpx.HTTPError) as error:
        print(f"{parser.prog.removeprefix('python -m ')}: {error}", file=sys.stderr)
        return 1
    return 0 if found["figures"]["kept"] else 1
