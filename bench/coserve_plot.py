"""The picture of ``bench.coserve``: over time, and over request rates. Needs matplotlib."""

from pathlib import Path
from typing import Any

COLORS = {"coserve": "#0072b2", "alone": "#222222", "temporal": "#d55e00", "train": "#7f7f7f"}
"""One colour for each kind of contender."""


def over_rates(rows: list[dict[str, Any]]) -> dict[str, list[tuple[float, float, float]]]:
    """Return each contender's request rates, rising, with its tokens trained a second and FlexLLM's attainment."""
    found: dict[str, list[tuple[float, float, float]]] = {}
    for row in rows:
        if row["request_rate"] is not None:
            point = row["request_rate"], row["fine_tuning_tokens_per_s"], row["attainment"]["flexllm"]
            found.setdefault(row["contender"], []).append(point)
    return {name: sorted(points) for name, points in found.items()}


def longest(rows: list[dict[str, Any]]) -> dict[str, Any] | None:
    """Return the row that is drawn over time: co-serving at the highest rate."""
    own = [row for row in rows if row["contender"] == "coserve"]
    return max(own, key=lambda row: row["request_rate"], default=None)


def draw_picture(figures: dict[str, Any], path: Path) -> None:
    """Write the picture: on the left a run over time, on the right all contenders over request rates."""
    from matplotlib.figure import Figure

    rows, options = figures["rows"], figures["options"]
    figure = Figure(figsize=(11, 6.5), layout="constrained")
    left, right = figure.subfigures(1, 2, squeeze=False)[0]
    row = longest(rows)
    if row is not None:
        series, axes = row["by_second"], left.subplots(3, 1, sharex=True)
        names = {"requests": "requests/s", "trained_tokens": "tokens/s trained", "tpot_ms": "TPOT, ms"}
        for own, (key, label) in zip(axes, names.items(), strict=True):
            seconds = [n for n, value in enumerate(series[key]) if value is not None]
            own.plot(seconds, [series[key][n] for n in seconds], color=COLORS["coserve"], linewidth=1.5)
            own.set_ylabel(label)
            own.set_ylim(bottom=0)
        axes[2].axhline(options["tpot_ms"], color=COLORS["temporal"], linestyle="--", linewidth=1)
        axes[2].set_xlabel("seconds")
        axes[0].set_title(f"co-serving at {row['request_rate']:g} requests/s", loc="left", fontsize=11)
    axes = right.subplots(2, 1, sharex=True)
    for name, points in over_rates(rows).items():
        rates, trained, kept = zip(*points, strict=True)
        style = {"color": COLORS[name.partition("-")[0]], "marker": "o", "label": name}
        if name != "alone":
            axes[0].plot(rates, trained, **style)
        axes[1].plot(rates, [100 * one for one in kept], **style)
    for one in rows:
        if one["contender"] == "train-step":
            axes[0].axhline(one["fine_tuning_tokens_per_s"], color=COLORS["train"], linestyle="--", label="train-step")
    axes[0].set_ylabel("tokens/s trained")
    axes[0].set_ylim(bottom=0)
    axes[1].set_ylabel(f"% within {options['tpot_ms']:g} ms TPOT, {options['ttft_ms'] / 1e3:g} s TTFT")
    axes[1].set_xlabel("requests/s")
    for own in axes:
        own.grid(axis="y", alpha=0.25)
        if own.get_legend_handles_labels()[0]:
            own.legend(frameon=False, fontsize=8)
    figure.suptitle(f"{options['model']}, LoRA r{options['rank']}, {figures['device']['kind']}", fontsize=11)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
