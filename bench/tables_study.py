"""The table of ``bench.sft_study``."""

from collections.abc import Sequence
from typing import Any

from bench.table_parts import machine, markdown
from train.rollouts.statistics import interval


def cells_of(figures: dict[str, Any]) -> dict[tuple[str, int], dict[str, list[dict[str, Any]]]]:
    """Return the rows of each kind and rank, by task; those that learning rates were chosen by are left out."""
    found: dict[tuple[str, int], dict[str, list[dict[str, Any]]]] = {}
    for row in figures["rows"]:
        cell = row["cell"]
        if not cell["is_swept"]:
            found.setdefault((cell["kind"], cell["rank"]), {}).setdefault(cell["task"], []).append(row)
    return found


def mean_of(rows: Sequence[dict[str, Any]], name: str) -> tuple[float, float]:
    """Return the mean of a number over runs, and half of its 95% interval; NaN without one."""
    found = interval([float("nan") if row[name] is None else row[name] for row in rows])
    return found.mean, found.high - found.mean


def sft_study(figures: dict[str, Any]) -> str:
    """Loss and accuracy of each kind and rank on each task, with 95% intervals over seeds."""
    options = figures["options"]
    tasks = options["tasks"].split(",")
    rows = []
    for (kind, rank), by_task in cells_of(figures).items():
        own = [by_task.get(task, []) for task in tasks]
        parameters = next((row["parameters"] for some in own for row in some), 0)
        rows.append([f"{kind} r{rank}" if rank else kind, f"{parameters:,}", *map(_shown, own)])
    header = ["eval loss; accuracy", "parameters", *tasks]
    steps = f"{options['max_steps']} updates of {options['batch_size']} examples, {options['seeds']} seeds"
    held_out = f"{options['num_eval']} held-out questions for losses and {options['num_answers']} for accuracy"
    return f"{markdown(header, rows)}\n{options['model']}; {steps}; {held_out}; {machine(figures)}.\n"


def _shown(rows: Sequence[dict[str, Any]]) -> str:
    if not any(row["loss"] is not None for row in rows):
        return "failed" if rows else ""
    loss, accuracy = mean_of(rows, "loss"), mean_of(rows, "accuracy")
    return f"{_pm(loss, '.3f', '')}; {_pm((100 * accuracy[0], 100 * accuracy[1]), '.0f', '%')}"


def _pm(found: tuple[float, float], form: str, unit: str) -> str:
    mean, half = found
    spread = "" if half != half else f" ± {half:{form}}"
    return f"{mean:{form}}{spread}{unit}"
