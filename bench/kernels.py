"""``python -m bench.kernels``: time every kernel beside its floor and beside what a JAX user could take instead.

Cases come from ``bench/kernel_cases.py``. Each row times one operation on inputs in device memory: one compiled program
runs it on several sets of inputs that together are larger than the cache, and contenders take turns, repeat after
repeat; the figure is the median. The floor is ``max(FLOPs / rate, bytes / bandwidth)`` with both ceilings measured in
the same run and the least FLOPs and bytes that any implementation must spend (each needed input read once, each output
written once). Where the reference (``xla``) runs too, results are compared with its own before they count.
"""

import argparse
import dataclasses
import importlib.metadata
import importlib.util
import json
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.console import Console
from rich.table import Table

from bench.kernel_cases import Case, EditCase, select
from bench.kernel_contenders import PEERS, Contender, ours
from bench.kernel_timing import Ceilings, TimedProgram, difference, make_sets, measure_ceilings, plan
from kernels.dispatch import MODULES
from preft_jax.cli import hyphenated
from serve.bench.environment import environment
from serve.bench.output import emit

SCHEMA = "preft-jax/kernels/1"
TAGS = {"small": "small", "full": "bench"}
DEFAULTS = {"gpu": ("triton", "xla"), "tpu": ("pallas_tpu", "xla")}
LARGEST_DIFFERENCE = 3e-2
"""Of a result from the reference's, by norm: two bfloat16 computations of one thing differ by less than 1e-2."""


def contenders(case: Case, names: Sequence[str] | None) -> dict[str, Contender]:
    """Return what runs a case, by name: the backend's implementations and the peers, or those asked for."""
    peers = [name for name, (ops, _) in PEERS.items() if case.op in ops]
    wanted = names or [*DEFAULTS.get(jax.default_backend(), ("xla",)), *peers]
    return {
        name: PEERS[name][1](case) if name in PEERS else ours(case, name)
        for name in wanted
        if name in peers or name not in PEERS
    }


def run_case(
    case: Case, ceilings: Ceilings, contending: Mapping[str, Contender], repeats: int, reference: str = "xla"
) -> dict[str, Any]:
    """Time contenders on a case in turn and return its row; results are compared with those of ``reference``."""
    flops, moved = case.flops(), case.bytes()
    floor, bound = ceilings.floor(flops, moved, case.dtype)
    runs, batch = plan(moved, floor)
    sets = make_sets(case, runs)
    programs: dict[str, TimedProgram] = {}
    results: dict[str, dict[str, Any]] = {}
    for name, contender in contending.items():
        results[name] = {}
        try:
            prepared = [contender.prepare(case, inputs) for inputs in sets]
            programs[name] = TimedProgram(contender.run, prepared, batch)
        except (NotImplementedError, ImportError, ValueError) as error:
            results[name]["reason"] = _one_line(error)
    _compile(programs, results)
    seconds: dict[str, list[float]] = {name: [] for name in programs}
    for _ in range(repeats + 1):
        for name in list(programs):
            try:
                seconds[name].append(programs[name].seconds())
            except jax.errors.JaxRuntimeError as error:
                results[name]["reason"] = _one_line(error)
                del programs[name]
    for name, program in programs.items():
        if reference in programs:
            found = float(difference(program.result(), programs[reference].result()))
            results[name]["difference"] = float(f"{found:.2g}")
            if not found < LARGEST_DIFFERENCE:
                results[name]["reason"] = f"wrong: its result is {found:.2g} from that of {reference}"
                continue
        median = float(np.median(seconds[name][1:]))
        results[name] |= {
            "us": round(median * 1e6, 2),
            "us_min": round(min(seconds[name][1:]) * 1e6, 2),
            "us_max": round(max(seconds[name][1:]) * 1e6, 2),
            "gb_per_s": round(moved / median / 1e9, 1),
            "tflop_per_s": float(f"{flops / median / 1e12:.4g}"),
            "ratio_to_floor": round(median / floor, 3),
        }
    return {
        "case": case.name,
        "op": case.op,
        "shape": shape(case),
        "flops": flops,
        "bytes": moved,
        "floor_us": round(floor * 1e6, 2),
        "bound": bound,
        "runs": {"in_program": runs, "calls_queued": batch},
        "repeats": repeats,
        "results": results,
    }


def _compile(programs: dict[str, TimedProgram], results: dict[str, dict[str, Any]]) -> None:
    """Compile all at once, one thread each; drop those that the compiler refuses, with its reason."""
    with ThreadPoolExecutor(max(1, len(programs))) as pool:
        compiling = {name: pool.submit(program.compile) for name, program in programs.items()}
    for name, future in compiling.items():
        error = future.exception()
        if error is not None:
            if not isinstance(error, Exception):
                raise error
            results[name]["reason"] = _one_line(error)
            del programs[name]


def _one_line(error: Exception) -> str:
    text = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
    return text if len(text) <= 160 else text[:157] + "..."


def shape(case: Case) -> dict[str, Any]:
    """Return a case's fields for the figures; equal lengths become ``{"count": n, "each": length}``."""

    def short(value: Any) -> Any:
        if isinstance(value, tuple) and len(value) > 8:
            same = len(set(value)) == 1
            return {"count": len(value), "each": value[0]} if same else {"count": len(value), "sum": sum(value)}
        return value

    fields = {field.name: short(getattr(case, field.name)) for field in dataclasses.fields(case)}
    for name in ("name", "tags", "op"):
        del fields[name]
    if isinstance(case, EditCase):
        fields["widths"] = {site: case.widths(site) for site in dict.fromkeys((*case.sites, *case.edits))}
    return fields


def run(args: argparse.Namespace, cases: Sequence[Case]) -> dict[str, Any]:
    """Time the cases and return the figures that the JSON line holds."""
    console = Console(stderr=True)
    ceilings = measure_ceilings(sorted({case.dtype for case in cases}), args.repeats)
    rates = {dtype: round(rate / 1e12, 3) for dtype, rate in ceilings.flops_per_s.items()}
    bandwidth = round(ceilings.bytes_per_s / 1e9, 1)
    console.print(f"ceilings: copy {bandwidth} GB/s, matrix product {rates} TFLOP/s")
    rows = []
    for case in cases:
        rows.append(run_case(case, ceilings, contenders(case, args.implementations), args.repeats))
        found = {name: result.get("ratio_to_floor", "-") for name, result in rows[-1]["results"].items()}
        console.print(f"{case.name}: x floor {found}", soft_wrap=True)
    figures = environment()
    for row in rows:
        row |= {"commit": figures["commit"], "date": figures["date"]}
    figures["versions"] |= {name: _version(name) for name in ("jax-triton", "triton", "jax-cuda13-plugin")}
    return {
        "schema": SCHEMA,
        "options": {"selection": args.selection, "cases": args.cases, "repeats": args.repeats},
        "ceilings": {"copy_gb_per_s": bandwidth, "matmul_tflop_per_s": rates},
        "cases": rows,
        **figures,
    }


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def keep_rows(figures: dict[str, Any], path: Path) -> dict[str, Any]:
    """Return figures with the rows of an earlier file that this run did not repeat."""
    earlier = json.loads(path.read_text())
    for key in ("schema", "device", "versions"):
        if earlier[key] != figures[key]:
            raise SystemExit(f"--keep: {path} has other {key}: {earlier[key]}; this run has {figures[key]}")
    new = {row["case"]: row for row in figures["cases"]}
    old = {row["case"] for row in earlier["cases"]}
    merged = [new.get(row["case"], row) for row in earlier["cases"]]
    return {**figures, "cases": merged + [row for name, row in new.items() if name not in old]}


def table(figures: dict[str, Any]) -> Table:
    """Return the table for people."""
    made = Table(title="kernels: median time of one call, and times its floor")
    made.add_column("case")
    made.add_column("by")
    for column in ("us", "GB/s", "TFLOP/s", "floor, us", "x floor"):
        made.add_column(column, justify="right")
    made.add_column("note", overflow="fold")
    for row in figures["cases"]:
        for i, (name, result) in enumerate(row["results"].items()):
            cells = [""] * 5
            if "us" in result:
                cells = [f"{result['us']:.1f}", f"{result['gb_per_s']:.0f}", f"{result['tflop_per_s']:.3g}",
                         f"{row['floor_us']:.1f}", f"{result['ratio_to_floor']:.2f}"]  # fmt: skip
            note = result.get("reason", f"{row['bound']}-bound" if i == 0 else "")
            made.add_row(row["case"] if i == 0 else "", name, *cells, note, end_section=i == len(row["results"]) - 1)
    return made


def _names(text: str) -> list[str]:
    names = text.split(",")
    for name in names:
        if name not in MODULES and name not in PEERS:
            raise argparse.ArgumentTypeError(f"unknown {name!r}; allowed: {', '.join([*MODULES, *PEERS])}")
    return names


def _repeats(text: str) -> int:
    if not text.isdigit() or not int(text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of at least 1")
    return int(text)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program; returns its exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.kernels", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cases", default="*", metavar="PATTERNS", help="names to take: shell patterns or parts")
    parser.add_argument(
        "--implementations", type=_names, metavar="A,B", help="default: those of this backend, and peers"
    )
    parser.add_argument("--selection", choices=TAGS, help="default: full on a GPU, small elsewhere")
    parser.add_argument("--repeats", type=_repeats, default=20, help="timed calls of each (default: %(default)s)")
    parser.add_argument("--output-json", type=Path, help="also write the JSON line to this file")
    parser.add_argument(
        "--keep", action="store_true", help="keep the rows of --output-json that this run does not repeat"
    )
    parser.add_argument("--plot", type=Path, metavar="PATH.png", help="draw the roofline (needs matplotlib)")
    args = parser.parse_args(hyphenated(sys.argv[1:] if argv is None else argv))
    if args.selection is None:
        args.selection = "full" if jax.default_backend() == "gpu" else "small"
    if args.plot is not None and importlib.util.find_spec("matplotlib") is None:
        parser.error("--plot needs matplotlib: pip install preft-jax[bench]")
    cases = select(TAGS[args.selection], args.cases)
    if not cases:
        parser.error(f"--cases {args.cases!r} matches none of the {args.selection} selection")
    if args.keep and not args.output_json:
        parser.error("--keep needs --output-json")
    figures = run(args, cases)
    if args.keep and args.output_json.exists():
        figures = keep_rows(figures, args.output_json)
    console = Console()
    Console(width=None if console.is_terminal else 160).print(table(figures))
    emit(figures, args.output_json)
    if args.plot is not None:
        from bench.roofline import plot

        plot(figures, args.plot)
    wrong = [r for row in figures["cases"] for r in row["results"].values() if r.get("reason", "").startswith("wrong")]
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
