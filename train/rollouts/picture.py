"""Draws rewards by step to a PNG."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any


def draw_rewards(rows: Sequence[dict[str, Any]], path: Path) -> bool:
    """Draw the rewards of samples and of held-out prompts, with 95% intervals; False if matplotlib is not there.

    Args:
        rows: of ``metrics.jsonl``.
        path: of the PNG.
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
        label, color = "" if len(names) == 1 else f"{name}: ", colors(i % 10)
        mine = [row for row in rows if row["job"] == name]
        steps, means, lows, highs = _columns(mine, "reward")
        if steps:
            axes.fill_between(steps, lows, highs, color=color, alpha=0.2, linewidth=0)
            axes.plot(steps, means, color=color, alpha=0.6, linewidth=1, label=f"{label}samples that are learned from")
        steps, means, lows, highs = _columns(mine, "eval_reward")
        if steps:
            errors = [
                [mean - low for mean, low in zip(means, lows, strict=True)],
                [high - mean for mean, high in zip(means, highs, strict=True)],
            ]
            axes.errorbar(
                steps, means, errors, color=color, linewidth=2, marker="o", capsize=4, label=f"{label}held out"
            )
    axes.set_xlabel("step")
    axes.set_ylabel("reward (mean, 95% interval over prompts)")
    axes.grid(alpha=0.3)
    if axes.get_legend_handles_labels()[0]:
        axes.legend()
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
    return True


def _columns(rows: Sequence[dict[str, Any]], name: str) -> tuple[list[int], list[float], list[float], list[float]]:
    """Return steps, means and the ends of intervals, which are the means where there are none."""
    kept = [row for row in rows if row.get(name) is not None]
    means = [row[name] for row in kept]
    ends = (
        [
            mean if row.get(f"{name}_{end}") is None else row[f"{name}_{end}"]
            for row, mean in zip(kept, means, strict=True)
        ]
        for end in ("low", "high")
    )
    lows, highs = ends
    return [row["step"] for row in kept], means, lows, highs
