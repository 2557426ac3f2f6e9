"""Pictures of a run: what is in its metrics, by step, to a PNG."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

Rows = Sequence[dict[str, Any]]
"""Rows of ``metrics.jsonl``."""


def draw(rows: Rows, path: Path, job: Callable[[Any, Rows, str, Any], None], *, step: str, value: str) -> bool:
    """Draw each job of a run to a PNG; return whether that was possible: False if matplotlib is not there.

    Args:
        rows: of all jobs.
        path: of the PNG.
        job: draws one: ``(axes, rows, label, color)``; the label is empty where there is one job alone.
        step: label of the horizontal axis.
        value: label of the vertical axis.
    """
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot
    except ImportError:
        return False
    figure, axes = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
    names = list(dict.fromkeys(row["job"] for row in rows))
    colors = pyplot.get_cmap("tab10")
    for i, name in enumerate(names):
        label = "" if len(names) == 1 else f"{name}: "
        job(axes, [row for row in rows if row["job"] == name], label, colors(i % 10))
    axes.set_xlabel(step)
    axes.set_ylabel(value)
    axes.grid(alpha=0.3)
    if axes.get_legend_handles_labels()[0]:
        axes.legend()
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
    return True


def draw_losses(rows: Rows, path: Path) -> bool:
    """Draw training and evaluation losses by update to a PNG; False if matplotlib is not there."""
    return draw(rows, path, _losses, step="update", value="loss of answers' tokens, nats")


def _losses(axes: Any, rows: Rows, label: str, color: Any) -> None:
    train = [(row["step"], row["loss"]) for row in rows if row.get("loss") is not None]
    held_out = [(row["step"], row["eval_loss"]) for row in rows if row.get("eval_loss") is not None]
    if train:
        axes.plot(*zip(*train, strict=True), color=color, alpha=0.45, linewidth=1, label=f"{label}training")
        axes.plot(*zip(*_smooth(train), strict=True), color=color, linewidth=2)
    if held_out:
        axes.plot(
            *zip(*held_out, strict=True),
            color=color,
            linestyle="--",
            marker="o",
            markersize=4,
            label=f"{label}held out",
        )
    axes.set_yscale("log")


def _smooth(points: Sequence[tuple[int, float]]) -> list[tuple[int, float]]:
    """Return an exponential moving average over a twentieth of the points, without the bias of its beginning."""
    weight = 1 - 1 / (1 + len(points) / 20)
    out, mean, total = [], 0.0, 0.0
    for step, value in points:
        mean, total = weight * mean + (1 - weight) * value, weight * total + (1 - weight)
        out.append((step, mean / total))
    return out
