"""A benchmark's figures as a picture: throughput over the number of adapters, and how latencies are distributed."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from preft_jax.errors import ConfigError
from serve.bench.contest import Entry
from serve.bench.metrics import summarize

_COLORS = {"base": "#444444", "prefill-only": "#0072b2", "all-token": "#d55e00"}
_ABOVE = {"prefill-only": (0, 12), "all-token": (0, -12)}
_STYLES = ("-", "--", ":", "-.")


def check_plotting(path: Path) -> None:
    """Raise ``ConfigError`` if no PNG can be drawn, before a long run is lost."""
    if path.suffix.lower() != ".png":
        raise ConfigError(f"--plot is {path}; give a file that ends in .png")
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise ConfigError("--plot needs matplotlib, which is not installed: pip install 'preft-jax[bench]'") from error


def save_plot(path: Path, entries: Sequence[Entry], title: str) -> None:
    """Draw measured contenders and write a PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 6.5), layout="constrained")
    figure.suptitle(title)
    grid = figure.add_gridspec(2, 2)
    _throughput(figure.add_subplot(grid[:, 0]), entries)
    _distribution(figure.add_subplot(grid[0, 1]), entries, "ttft", "TTFT, ms")
    _distribution(figure.add_subplot(grid[1, 1]), entries, "tpot", "TPOT, ms")
    handles, labels = figure.axes[1].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower right", ncols=min(len(labels), 4), frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def _throughput(axes: Any, entries: Sequence[Entry]) -> None:
    counts = sorted({entry.contender.num_adapters for entry in entries} - {0})
    for mode, color in _COLORS.items():
        own = sorted((e for e in entries if e.contender.mode == mode), key=lambda e: e.contender.num_adapters)
        if not own:
            continue
        rates = [summarize(entry.results)["output_throughput"] for entry in own]
        if mode == "base":
            axes.axhline(rates[0], color=color, linestyle="--", label=f"{mode}, {rates[0]:.4g}")
        else:
            axes.plot([e.contender.num_adapters for e in own], rates, color=color, marker="o", label=mode)
            for entry, rate in zip(own, rates, strict=True):
                where = (entry.contender.num_adapters, rate)
                axes.annotate(
                    f"{rate:.4g}",
                    where,
                    _ABOVE[mode],
                    textcoords="offset points",
                    ha="center",
                    va="center",
                    color=color,
                )
    if counts:
        axes.set_xscale("log", base=2)
        axes.set_xlim(counts[0] / 1.5, counts[-1] * 1.5)
        axes.set_xticks(counts, [str(count) for count in counts])
        axes.minorticks_off()
    else:
        axes.set_xticks([])
    axes.set_ylim(bottom=0)
    axes.set_xlabel("adapters")
    axes.set_ylabel("output tokens/s")
    axes.grid(alpha=0.3)
    axes.legend(loc="lower left")


def _distribution(axes: Any, entries: Sequence[Entry], metric: str, name: str) -> None:
    counts = sorted({entry.contender.num_adapters for entry in entries} - {0})
    for entry in entries:
        records = [record for result in entry.results for record in result.completed]
        ms = np.sort([1e3 * value for record in records if (value := getattr(record, metric)) is not None])
        if not len(ms):
            continue
        number = entry.contender.num_adapters
        style = _STYLES[counts.index(number) % len(_STYLES)] if number else "-"
        height = np.arange(len(ms) + 1) / len(ms)
        color = _COLORS[entry.contender.mode]
        axes.plot(
            np.append(ms[0], ms),
            height,
            drawstyle="steps-post",
            color=color,
            linestyle=style,
            label=entry.contender.label,
        )
    axes.set_ylim(0, 1.02)
    axes.set_xlim(left=0)
    axes.set_xlabel(name)
    axes.set_ylabel("share of requests")
    axes.grid(alpha=0.3)
