"""A benchmark's figures as tables for people."""

from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.table import Table

from serve.bench.metrics import LEGEND, METRICS, MetricOptions


def label(contender: Mapping[str, Any]) -> str:
    """Return the name of a contender of the JSON form."""
    mode = contender["mode"].replace("_", "-")
    return f"{mode}, {contender['num_adapters']}" if contender["num_adapters"] else mode


def interval(ratio: Mapping[str, float] | None) -> str:
    """Return a ratio with its interval, as far as there are any."""
    if not ratio:
        return ""
    bounds = f" ({ratio['low']:.2f} to {ratio['high']:.2f})" if "low" in ratio else ""
    return f"{ratio['mean']:.2f}{bounds}"


def _ms(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def _table(title: str, columns: list[str]) -> Table:
    table = Table(title=title, title_justify="left")
    for number, column in enumerate(columns):
        table.add_column(column, justify="right" if number else "left")
    return table


def _speed(figures: Mapping[str, Any], options: MetricOptions) -> Table:
    last = max(options.percentiles)
    goodput = ["goodput"] if options.goodput else []
    table = _table(
        f"Output tokens/s; latency in milliseconds: mean (p{last:g})",
        ["contender", "requests/s", "tokens/s", "vs base", *goodput, *(name.upper() for name in METRICS)],
    )
    for contender in figures["contenders"]:
        found = contender["figures"]
        latency = [
            _ms(found[f"mean_{name}_ms"])
            + (f" ({_ms(found[f'p{last:g}_{name}_ms'])})" if name in options.percentile_metrics else "")
            for name in METRICS
        ]
        table.add_row(
            label(contender),
            f"{found['request_throughput']:.2f}",
            f"{found['output_throughput']:.1f}",
            interval(contender["ratio"].get("output_throughput")),
            *([f"{found['request_goodput']:.2f}"] if goodput else []),
            *latency,
        )
    return table


def _detail(figures: Mapping[str, Any]) -> Table:
    table = _table(
        "Ratios to base, adapters, and what did not complete",
        [
            "contender",
            "TPOT vs base",
            "TTFT vs base",
            "first",
            "later",
            "Jain",
            "max/min",
            "done",
            "not done",
            "compiled",
        ],
    )
    for contender in figures["contenders"]:
        found, ttft, fair = contender["figures"], contender["ttft"], contender["fairness"]
        lost = [f"{found[name]} {name}" for name in ("rejected", "aborted", "failed") if found[name]]
        table.add_row(
            label(contender),
            interval(contender["ratio"].get("mean_tpot")),
            interval(contender["ratio"].get("mean_ttft")),
            *(_ms(ttft[name]["mean_ttft_ms"]) if name in ttft else "" for name in ("first", "later")),
            *(f"{fair[name]:.3f}" if fair else "" for name in ("jain_index", "max_over_min")),
            str(found["completed"]),
            ", ".join(lost),
            "" if contender["recompiles"] is None else str(contender["recompiles"]),
        )
    return table


def print_report(figures: Mapping[str, Any], options: MetricOptions, console: Console) -> None:
    """Print the figures of every contender, what went wrong, and what the figures mean."""
    console.print(_speed(figures, options))
    console.print(_detail(figures))
    for contender in figures["contenders"]:
        for error, count in contender["errors"].items():
            console.print(f"{label(contender)}: {count} x {error}", markup=False, highlight=False)
        if contender["estimated_token_counts"]:
            console.print(
                f"{label(contender)}: {contender['estimated_token_counts']} answers came without usage; each of their "
                "outputs counts as one token",
                highlight=False,
            )
    for name, meaning in LEGEND.items():
        if name != "goodput" or options.goodput:
            console.print(f"[bold]{name}[/bold]: {meaning}", highlight=False)
