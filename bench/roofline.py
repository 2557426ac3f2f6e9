"""The picture of ``bench.kernels``: every result under the machine's two ceilings. Needs matplotlib."""

from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

MARKERS = {"triton": "o", "pallas_tpu": "D", "xla": "s", "ragged_dot": "^", "cudnn_paged": "v", "cudnn_contiguous": "P"}
"""One shape for each implementation and peer."""

_OTHER = "X"
_INK, _FAINT = "#222222", "#8a8a8a"


def plot(figures: dict[str, Any], path: Path) -> None:
    """Draw the roofline (Williams et al., doi 10.1145/1498765.1498785): FLOP a byte across, TFLOP/s upwards, both
    logarithmic.

    FLOP and bytes are the least that a case needs, so a point's distance below the roof is its time over its floor. A
    thin line joins those who ran the same case.
    """
    points = [
        (row, name, result) for row in figures["cases"] for name, result in row["results"].items() if "us" in result
    ]
    if not points:
        raise SystemExit("--plot: no case has a result to draw")
    colours = _colours([row["op"] for row in figures["cases"]])
    figure = Figure(figsize=(11, 6.5), dpi=160, layout="constrained")
    axes = figure.add_subplot()
    axes.set(xscale="log", yscale="log")
    intensity = {row["case"]: row["flops"] / row["bytes"] for row in figures["cases"]}
    for row in figures["cases"]:
        reached = [result["tflop_per_s"] for result in row["results"].values() if "us" in result]
        if len(reached) > 1:
            axes.plot([intensity[row["case"]]] * 2, [min(reached), max(reached)], color=colours[row["op"]], lw=0.7,
                      alpha=0.5, zorder=1)  # fmt: skip
    for row, name, result in points:
        axes.scatter(intensity[row["case"]], result["tflop_per_s"], marker=MARKERS.get(name, _OTHER), s=42,
                     color=colours[row["op"]], edgecolor="white", linewidth=0.6, alpha=0.9, zorder=3)  # fmt: skip
    _draw_roof(axes, figures["ceilings"], [intensity[row["case"]] for row, _, _ in points],
               [result["tflop_per_s"] for *_, result in points])  # fmt: skip
    device = figures["device"]
    axes.set_title(f"Kernels on {device.get('processor', device['kind'])}", loc="left", color=_INK, fontsize=13)
    axes.set_xlabel("FLOP a byte (the least that the case needs)", color=_INK)
    axes.set_ylabel("TFLOP/s", color=_INK)
    axes.grid(which="major", color="#e6e6e6", lw=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    _legends(figure, sorted({name for _, name, _ in points}, key=[*MARKERS, *(n for _, n, _ in points)].index), colours)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def _colours(ops: list[str]) -> dict[str, Any]:
    palette = matplotlib.colormaps["tab10"].colors  # pyright: ignore[reportAttributeAccessIssue]
    return {op: palette[i % len(palette)] for i, op in enumerate(dict.fromkeys(ops))}


def _draw_roof(axes: Any, ceilings: dict[str, Any], across: list[float], upwards: list[float]) -> None:
    """Draw the bandwidth's slope and each dtype's flat roof, with the numbers measured."""
    bandwidth = ceilings["copy_gb_per_s"] / 1e3
    rates = ceilings["matmul_tflop_per_s"]
    highest = max(rates.values())
    left, right = min(across) / 2, max(*across, highest / bandwidth) * 3
    x = np.geomspace(left, right, 400)
    axes.fill_between(x, np.minimum(bandwidth * x, highest), color="#f4f6f8", zorder=0)
    for dtype, rate in rates.items():
        axes.plot(x, np.minimum(bandwidth * x, rate), color=_INK, lw=1.6, zorder=2)
        axes.annotate(f"{dtype} matrix product {rate:.3g} TFLOP/s", (right, rate), xytext=(-4, 5), ha="right",
                      textcoords="offset points", color=_INK, fontsize=9)  # fmt: skip
    axes.set_xlim(left, right)
    axes.set_ylim(min(*upwards, bandwidth * left) / 1.7, max(*upwards, highest) * 2)
    at = left * (highest / bandwidth / left) ** 0.35
    axes.annotate(f"copy {ceilings['copy_gb_per_s']:,.0f} GB/s", (at, bandwidth * at), xytext=(-8, 8),
                  textcoords="offset points", ha="right", color=_INK, fontsize=9)  # fmt: skip


def _legends(figure: Figure, names: list[str], colours: dict[str, Any]) -> None:
    marks = [
        Line2D([], [], ls="", marker=MARKERS.get(n, _OTHER), color=_FAINT, markersize=7, label=n.replace("_", " "))
        for n in names
    ]
    ops = [Line2D([], [], ls="", marker="o", color=c, markersize=7, label=op) for op, c in colours.items()]
    places: Any = (("by", marks, "outside right upper"), ("operation", ops, "outside right lower"))
    for title, handles, where in places:
        legend = figure.legend(handles=handles, title=title, loc=where, frameon=False, alignment="left")
        legend.get_title().set_color(_INK)
