"""Draws rewards by step to a PNG."""

from pathlib import Path
from typing import Any

from train.run.picture import Rows, draw


def draw_rewards(rows: Rows, path: Path) -> bool:
    """Draw the rewards of samples and of held-out prompts, with 95% intervals; False if matplotlib is not there.

    Args:
        rows: of ``metrics.jsonl``.
        path: of the PNG.
    """
    return draw(rows, path, _rewards, step="step", value="reward (mean, 95% interval over prompts)")


def _rewards(axes: Any, rows: Rows, label: str, color: Any) -> None:
    steps, means, lows, highs = _columns(rows, "reward")
    if steps:
        axes.fill_between(steps, lows, highs, color=color, alpha=0.2, linewidth=0)
        axes.plot(steps, means, color=color, alpha=0.6, linewidth=1, label=f"{label}samples that are learned from")
    steps, means, lows, highs = _columns(rows, "eval_reward")
    if steps:
        errors = [
            [mean - low for mean, low in zip(means, lows, strict=True)],
            [high - mean for mean, high in zip(means, highs, strict=True)],
        ]
        axes.errorbar(steps, means, errors, color=color, linewidth=2, marker="o", capsize=4, label=f"{label}held out")


def _columns(rows: Rows, name: str) -> tuple[list[int], list[float], list[float], list[float]]:
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
