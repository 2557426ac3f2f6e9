"""What a run tells: a status line a step, and ``metrics.jsonl``."""

import json
import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

PEAK_FLOPS = {
    "H100": 989e12, "H200": 989e12, "A100": 312e12, "v4": 275e12, "v5 lite": 197e12, "v5e": 197e12, "v5": 459e12,
    "v6 lite": 918e12, "v6e": 918e12,
}  # fmt: skip
"""Dense bf16 FLOP/s of a device by what its kind contains, from its data sheet."""


def peak_flops(device_kind: str) -> float | None:
    """Return a device's dense bf16 FLOP/s, or None if they are not known."""
    return next((flops for name, flops in PEAK_FLOPS.items() if name in device_kind), None)


class Meter:
    """Tokens per second since it was last read."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter):
        self._clock = clock
        self._since = clock()
        self._tokens = 0

    def add(self, tokens: int) -> None:
        """Count tokens."""
        self._tokens += tokens

    def leave_out(self, seconds: float) -> None:
        """Take off time in which nothing was trained."""
        self._since += seconds

    def read(self) -> float:
        """Return tokens per second, and begin anew."""
        now = self._clock()
        rate = self._tokens / max(now - self._since, 1e-9)
        self._since, self._tokens = now, 0
        return rate


class Metrics:
    """``metrics.jsonl``: one object a line; a resumed run drops what came after its checkpoint."""

    def __init__(self, path: Path, *, keep_until: Mapping[str, int] | None = None):
        """``keep_until`` has each job's updates in the checkpoint; None begins anew."""
        rows = [] if keep_until is None else read_metrics(path)
        last = {str(job): step for job, step in (keep_until or {}).items()}
        kept = [row for row in rows if isinstance(row.get("step"), int)]
        kept = [row for row in kept if row["step"] <= last.get(str(row.get("job")), row["step"])]
        path.parent.mkdir(parents=True, exist_ok=True)
        beside = path.with_name(f".{path.name}.next")
        beside.write_text("".join(json.dumps(row) + "\n" for row in kept), encoding="utf-8")
        beside.replace(path)
        self._file = path.open("a", encoding="utf-8")

    def write(self, row: dict[str, Any]) -> None:
        """Append a row; numbers that are not finite become null."""
        plain = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}
        self._file.write(json.dumps(plain, allow_nan=False) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Return the rows of a metrics file; none if it is not there. Lines that are cut or damaged are left out."""
    if not path.exists():
        return []
    rows = []
    for line in path.read_text(encoding="utf-8", errors="replace").split("\n"):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(row, dict):
            rows.append(row)
    return rows


def say(console: Console, text: str) -> None:
    """Print a line as it is."""
    console.print(text, highlight=False, soft_wrap=True, markup=False)


class Status:
    """Status lines and a progress bar on a terminal; the lines alone elsewhere."""

    def __init__(self, console: Console, total: int, done: int = 0):
        self._console = console
        self._progress = Progress(
            TextColumn("training"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), console=console,
            disable=not console.is_terminal, transient=True,
        )  # fmt: skip
        self._task = self._progress.add_task("training", total=total, completed=done)
        self._progress.start()

    def line(self, text: str) -> None:
        """Print a line above the bar."""
        say(self._console, text)

    def advance(self, count: int) -> None:
        """Move the bar."""
        self._progress.advance(self._task, count)

    def close(self) -> None:
        """Take the bar away."""
        self._progress.stop()
