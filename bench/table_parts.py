"""What tables are made of: results, Markdown, and words that several tables share."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "docs" / "results"


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table, with numbers to the right."""
    lines = [header, ["---"] + ["---:"] * (len(header) - 1), *rows]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def machine(figures: dict[str, Any]) -> str:
    """Return when, where and of which commit figures were measured."""
    device = figures["device"]
    name = device.get("processor", device["kind"])
    return f"{figures['date']}, {name}, jax {figures['versions']['jax']}, commit {figures['commit']}"


def interval(ratio: dict[str, float]) -> str:
    """Return a ratio and, if there is one, its interval."""
    spread = f" ({ratio['low']:.2f} to {ratio['high']:.2f})" if "low" in ratio else ""
    return f"{ratio['mean']:.2f}{spread}"


def contender(row: dict[str, Any]) -> str:
    """Return what a row is called."""
    if row["mode"] == "base":
        return "base"
    drawn = row.get("distribution", "round-robin")
    count = row["num_adapters"]
    return f"{row['mode']}, {count:,} adapter{'s' * (count != 1)}{'' if drawn == 'round-robin' else f', {drawn}'}"
