"""``python -m bench.tune``: try how a Triton kernel is cut up, beside what its rule chooses, on this GPU.

Kernels are cut into programs by rules (``kernels/triton/config.py``, ``config_for`` of attention and ``decode_edit``)
that were found on one kind of GPU. This runs benchmark cases with every combination of the values given, all other
fields as the rule has them, in turns, and prints the quickest first. What the rule chooses is ``chosen``; every
result is compared with its own.

    python -m bench.tune --cases attention/prefill/1x8192 queries=16,32 keys=32,64,128 warps=4,8

Nothing is changed: a rule that should choose otherwise is to be changed by hand, and the tests run.
"""

import argparse
import contextlib
import dataclasses
import importlib
import itertools
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import jax
from rich.console import Console
from rich.table import Table

from bench.kernel_cases import Case, select
from bench.kernel_contenders import Contender, ours
from bench.kernel_timing import measure_ceilings
from bench.kernels import run_case
from kernels.dispatch import MODULES
from preft_jax.cli import hyphenated
from preft_jax.errors import ConfigError
from serve.bench.environment import environment
from serve.bench.output import emit

SCHEMA = "preft-jax/tune/1"

RULES: Mapping[str, tuple[str, str]] = {
    "paged_attention": ("attention", "config_for"),
    "decode_edit": ("decode", "config_for"),
    "norm_shrink": ("fused", "for_norm"),
    "rope_kv": ("fused", "for_rope"),
    "silu_mul_shrink": ("fused", "for_silu_mul"),
    "shrink": ("lowrank", "for_shrink"),
    "expand": ("lowrank", "for_expand"),
}
"""The rule of each operation: its module among the Triton kernels, and its name there."""


def parse_grid(words: Sequence[str]) -> dict[str, list[int]]:
    """Return the values to try of each field, from ``name=1,2,3``; raise ``ConfigError`` for anything else."""
    grid: dict[str, list[int]] = {}
    for word in words:
        name, _, values = word.partition("=")
        try:
            grid[name] = [int(value) for value in values.split(",")]
        except ValueError:
            raise ConfigError(f"{word!r} is no field with its values; give one like warps=4,8") from None
    return grid


@contextlib.contextmanager
def cut_up(op: str, fields: Mapping[str, int]) -> Iterator[None]:
    """Let what is traced inside take these fields, and the others from the rule of ``op``."""
    name, rule = RULES[op]
    module = importlib.import_module(f"{MODULES['triton']}.{name}")
    chosen: Callable[..., Any] = getattr(module, rule)

    def changed(*args: Any, **options: Any) -> Any:
        config = chosen(*args, **options)
        allowed = [field.name for field in dataclasses.fields(config)]
        if unknown := sorted(set(fields) - set(allowed)):
            raise ConfigError(f"{op} has no {', '.join(unknown)}; its fields are {', '.join(allowed)}")
        return dataclasses.replace(config, **fields)

    with mock.patch.object(module, rule, changed):
        yield


def contenders(case: Case, grid: Mapping[str, Sequence[int]]) -> dict[str, Contender]:
    """Return the rule's choice and every combination of the grid, by name."""
    found = {"chosen": ours(case, "triton")}

    def contender(fields: Mapping[str, int]) -> Contender:
        def run(inputs: Any) -> Any:
            with cut_up(case.op, fields):
                return case.run(inputs, "triton")

        return Contender(lambda _, inputs: inputs, run)

    for values in itertools.product(*grid.values()):
        fields = dict(zip(grid, values, strict=True))
        found[" ".join(f"{name}={value}" for name, value in fields.items())] = contender(fields)
    return found


def on_gpu() -> bool:
    """Return whether there is a GPU to measure on."""
    return jax.default_backend() == "gpu"


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Time every case with every combination and return the figures that the JSON line holds."""
    grid = parse_grid(args.grid)
    cases = [case for case in select("bench", args.cases) if case.op in RULES]
    if not cases:
        raise ConfigError(f"--cases {args.cases!r} names no case of {', '.join(RULES)}; see bench/kernel_cases.py")
    if not on_gpu():
        raise ConfigError(f"it needs an NVIDIA GPU; the default backend is {jax.default_backend()!r}")
    ceilings = measure_ceilings(sorted({case.dtype for case in cases}), args.repeats)
    rows = [run_case(case, ceilings, contenders(case, grid), args.repeats, "chosen") for case in cases]
    for row in rows:
        if all("reason" in result for name, result in row["results"].items() if name != "chosen"):
            reasons = {result["reason"] for name, result in row["results"].items() if name != "chosen"}
            raise ConfigError(f"{row['case']}: nothing of the grid runs: {'; '.join(sorted(reasons))}")
    options = {"cases": args.cases, "grid": grid, "repeats": args.repeats}
    return {"schema": SCHEMA, "options": options, "cases": rows, **environment()}


def table(figures: Mapping[str, Any], most: int) -> Table:
    """Return the table for people, the quickest of each case first."""
    made = Table(title="kernels, cut up otherwise: median time of one call")
    for column in ("case", "cut", "us", "x floor", "difference"):
        made.add_column(column, justify="left" if column in ("case", "cut") else "right")
    made.add_column("note", overflow="fold")
    for row in figures["cases"]:
        order = sorted(row["results"].items(), key=lambda item: item[1].get("us", float("inf")))
        shown = order[:most] + [item for item in order[most:] if item[0] == "chosen"]
        for i, (name, result) in enumerate(shown):
            cells = [""] * 3
            if "us" in result:
                cells = [f"{result['us']:.1f}", f"{result['ratio_to_floor']:.2f}", f"{result['difference']:.1g}"]
            made.add_row(row["case"] if i == 0 else "", name, *cells, result.get("reason", ""))
        made.add_section()
    return made


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program; returns its exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.tune", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("grid", nargs="+", metavar="FIELD=VALUES", help="values to try, such as warps=4,8")
    parser.add_argument("--cases", required=True, help="shell patterns of names of benchmark cases, or parts")
    parser.add_argument("--repeats", type=int, default=5, help="turns of each (default: %(default)s)")
    parser.add_argument("--most", type=int, default=12, help="rows of a case in the table (default: %(default)s)")
    parser.add_argument("--output-json", type=Path, default=None, help="also write the JSON line here")
    args = parser.parse_args(hyphenated(sys.argv[1:] if argv is None else argv))
    try:
        figures = run(args)
    except ConfigError as error:
        print(f"bench.tune: {error}", file=sys.stderr)
        return 1
    out = Console()
    (out if out.is_terminal else Console(width=160)).print(table(figures, args.most))
    emit(figures, args.output_json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
