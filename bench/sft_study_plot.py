"""The picture of ``bench.sft_study``: loss and accuracy over rank, a column for each task. Needs matplotlib."""

from pathlib import Path
from typing import Any

from bench.tables_study import cells_of, mean_of

COLORS = {
    "lora": "#222222", "lora-p": "#0072b2", "direft-p": "#009e73", "loreft-p": "#56b4e9", "l16": "#e69f00",
    "marker": "#cc79a7", "prefix": "#d55e00", "base": "#7f7f7f",
}  # fmt: skip
"""One colour for each kind."""


def draw_picture(figures: dict[str, Any], path: Path) -> None:
    """Write the picture; whiskers are 95% intervals over seeds."""
    from matplotlib.figure import Figure

    tasks, found = figures["options"]["tasks"].split(","), cells_of(figures)
    figure = Figure(figsize=(3.2 * len(tasks), 6), layout="constrained")
    axes = figure.subplots(2, len(tasks), squeeze=False)
    ranks = sorted({rank for _, rank in found if rank})
    for column, task in enumerate(tasks):
        for row, (name, label) in enumerate((("loss", "eval loss"), ("accuracy", "accuracy"))):
            _draw(axes[row, column], found, task, name)
            axes[row, column].grid(axis="y", alpha=0.25)
            axes[row, column].set_xscale("log", base=2)
            axes[row, column].set_xticks(ranks, list(map(str, ranks)))
            axes[0, column].set_title(task, loc="left", fontsize=10)
            axes[row, 0].set_ylabel(label)
        axes[1, column].set_xlabel("rank, or positions")
    axes[0, 0].legend(fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def _draw(axes: Any, found: dict[tuple[str, int], dict[str, list[dict[str, Any]]]], task: str, name: str) -> None:
    for kind in dict.fromkeys(kind for kind, _ in found):
        points = [(rank, *mean_of(by_task[task], name)) for (own, rank), by_task in found.items()
                  if own == kind and task in by_task]  # fmt: skip
        if kind == "base":
            for _, mean, _ in points:
                axes.axhline(mean, color=COLORS[kind], linestyle="--", linewidth=1, label=kind)
        elif points:
            ranks, means, halves = zip(*sorted(points), strict=True)
            whiskers = [0.0 if half != half else half for half in halves]
            axes.errorbar(ranks, means, yerr=whiskers, color=COLORS[kind], marker="o", capsize=2, label=kind)
