"""``python -m bench.capacity_plot``: replicas over users, from the JSON of ``bench.capacity``. Needs matplotlib."""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from preft_jax.cli import hyphenated
from preft_jax.errors import ConfigError, PreftError
from serve.bench.plots import check_plotting

COLORS = {"base": "#222222", "prefill-only": "#0072b2", "all-token": "#d55e00"}
STYLES = {"affinity": "-", "round-robin": "--"}


def draw(figures: dict[str, Any], path: Path) -> None:
    """Write the picture: a line for each kind of adapter and policy of routing, on logarithmic axes."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.8), layout="constrained")
    axes = figure.subplots()
    for kind, policy in dict.fromkeys((row["kind"], row["policy"]) for row in figures["rows"]):
        rows = [row for row in figures["rows"] if (row["kind"], row["policy"]) == (kind, policy)]
        users, replicas = [row["users"] for row in rows], [row["replicas"] for row in rows]
        label = f"{kind} LoRA, {policy}: {replicas[-1]:,}"
        axes.plot(users, replicas, STYLES[policy], color=COLORS[kind], marker="o", linewidth=2, label=label)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter("{x:,.0f}")
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.set_xlabel("users, each with an adapter of their own")
    axes.set_ylabel("replicas")
    told = (
        "llama3-8b on H200s, {requests_per_hour:g} requests an hour and user, TTFT {ttft_ms:g} ms, TPOT {tpot_ms:g} ms"
    )
    axes.set_title(f"{told.format(**figures['options'])}\nsimulated with measured times", loc="left", fontsize=11)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program; returns its exit status."""
    parser = argparse.ArgumentParser(prog="python -m bench.capacity_plot", description=__doc__)
    parser.add_argument("file", type=Path, help="JSON of bench.capacity")
    parser.add_argument("--output", type=Path, required=True, help="a .png")
    args = parser.parse_args(hyphenated(sys.argv[1:] if argv is None else argv))
    try:
        check_plotting(args.output)
        figures = json.loads(args.file.read_text())
        if figures.get("schema") != "preft-jax/capacity/1":
            raise ConfigError(f"{args.file} is not of bench.capacity")
        draw(figures, args.output)
    except (PreftError, OSError, ValueError) as error:
        print(f"bench.capacity_plot: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
