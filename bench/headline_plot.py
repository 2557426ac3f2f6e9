"""``python -m bench.headline_plot``: throughput over the number of adapters, from ``bench.headline`` and its peer.

Needs matplotlib.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from preft_jax.cli import hyphenated
from preft_jax.errors import ConfigError, PreftError
from serve.bench.plots import check_plotting

STYLES: dict[str, dict[str, Any]] = {
    "prefill-only": {"color": "#0072b2", "marker": "o", "label": "prefill-only LoRA"},
    "all-token": {"color": "#d55e00", "marker": "s", "label": "all-token LoRA"},
    "vllm": {"color": "#7f7f7f", "marker": "^", "label": "vLLM, LoRA"},
}
"""One colour and marker for each line."""


def points(files: Sequence[dict[str, Any]]) -> dict[str, dict[int, float]]:
    """Return output tokens per second by mode and number of adapters; 0 adapters: the base. Later files win."""
    found: dict[str, dict[int, float]] = {}
    for figures in files:
        rows = figures.get("rows", [figures])
        for row in rows:
            if row.get("distribution", "round-robin") != "round-robin":
                continue
            if figures.get("who") == "vllm":
                found.setdefault("vllm", {})[row["adapters"]] = row["output_throughput"]
            else:
                mode = "prefill-only" if row["mode"] == "base" else row["mode"]
                found.setdefault(mode, {})[row["num_adapters"]] = row["output_throughput"]
    return found


def draw(found: dict[str, dict[int, float]], title: str, path: Path) -> None:
    """Write the picture: bases as dashed lines, the rest over the number of adapters on a logarithmic axis."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.8), layout="constrained")
    axes = figure.subplots()
    counts = sorted({count for line in found.values() for count in line if count})
    for name, line in found.items():
        style = STYLES[name]
        own = sorted(count for count in line if count)
        if own:
            axes.plot(own, [line[count] for count in own], linewidth=2, markersize=7, **style)
        if 0 in line:
            who = "vLLM's base" if name == "vllm" else "base, no adapters"
            color = style["color"] if name == "vllm" else "#222222"
            axes.axhline(line[0], color=color, linestyle="--", linewidth=1.2, label=f"{who}: {line[0]:,.0f}")
        if own:
            axes.annotate(
                f"{line[own[-1]]:,.0f}", (own[-1], line[own[-1]]), textcoords="offset points", xytext=(9, 0),
                ha="left", va="center", color=style["color"],
                bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.5},
            )  # fmt: skip
    axes.set_xscale("log", base=2)
    axes.set_xticks(counts, [f"{count:,}" for count in counts])
    axes.minorticks_off()
    axes.margins(x=0.09)
    axes.set_ylim(bottom=0)
    axes.yaxis.set_major_formatter("{x:,.0f}")
    axes.set_xlabel("distinct adapters")
    axes.set_ylabel("output tokens/s")
    axes.set_title(title, loc="left", fontsize=11)
    axes.grid(axis="y", alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=3, frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program; returns its exit status."""
    parser = argparse.ArgumentParser(prog="python -m bench.headline_plot", description=__doc__)
    parser.add_argument("files", type=Path, nargs="+", help="JSON of bench.headline and of bench/peer_vllm.py")
    parser.add_argument("--output", type=Path, required=True, help="a .png")
    args = parser.parse_args(hyphenated(sys.argv[1:] if argv is None else argv))
    try:
        check_plotting(args.output)
        files = [json.loads(path.read_text()) for path in args.files]
        ours = next((figures for figures in files if "rows" in figures), None)
        if ours is None:
            raise ConfigError("none of the files is of bench.headline")
        title = (
            "{model}, {num_prompts} requests, {input_len} in, {output_len} out, {max_num_seqs} at a time, LoRA r{rank}"
        )
        try:
            found, title = points(files), title.format(**ours["options"])
        except (KeyError, TypeError) as error:
            raise ConfigError(f"one of the files is of another program: it has no {error}") from None
        draw(found, f"{title}\n{ours['device']['kind']}", args.output)
    except (PreftError, OSError, ValueError) as error:
        print(f"bench.headline_plot: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
