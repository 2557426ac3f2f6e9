"""What reports of runs share: lines for people, metrics, and who else is sent them."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console

from train.jobs import Job
from train.run.directory import RunDirectory
from train.run.log import Metrics, Status
from train.run.options import Settings
from train.run.reporters import Reporter


class RunReport:
    """What is told of a run from the step on at which its jobs are.

    Args:
        settings: of the run.
        directory: of the run.
        reporters: are sent the metrics that are numbers.
        console: for people.
        kept: by job, the step up to which the metrics of the run that is resumed stay; None: it is not resumed.
        total: steps of all jobs.
        done: steps that were done before.

    Attributes:
        failed: why those jobs were given up that were.
    """

    def __init__(
        self, settings: Settings, directory: RunDirectory, reporters: Sequence[Reporter], console: Console, *,
        kept: Mapping[str, int] | None, total: int, done: int,
    ):  # fmt: skip
        self.failed: dict[str, str] = {}
        self._settings = settings
        self._directory = directory
        self._reporters = reporters
        self._metrics = Metrics(directory.metrics, keep_until=kept)
        self._status = Status(console, total=total, done=done)

    def line(self, text: str, job: Job | None = None) -> None:
        """Print a line, of a job with its name if there are several."""
        label = "" if job is None or len(self._settings.jobs) == 1 else f"{job.name}: "
        self._status.line(label + text)

    def close(self, *, failed: bool) -> None:
        """Take the bar away, close the metrics, and send on what is left; ``failed`` is whether training broke off."""
        self._status.close()
        self._metrics.close()
        for reporter in self._reporters:
            reporter.close(failed=failed)

    def _write(self, row: dict[str, Any], more: Mapping[str, Any] | None = None) -> None:
        """Write a row of the metrics, with ``more`` that is not sent on."""
        self._metrics.write({**row, **(more or {})})
        scalars = {
            name: float(value)
            for name, value in row.items()
            if name not in ("step", "job") and isinstance(value, int | float) and math.isfinite(value)
        }
        for reporter in self._reporters if scalars else ():
            reporter.report(row["job"], row["step"], scalars)
