"""What updates give: losses and norms by job, fetched once the device has them."""

import types
from collections.abc import Mapping
from typing import NamedTuple

import jax
import numpy as np

from train.jobs import Job
from train.step import Report


class Result(NamedTuple):
    """What one update of one job gave; ``metrics`` are those of its losses, means as ``loss`` is one.

    ``tokens`` are those of the job's rows, where who steps the trainer counts them (``train/coserve.py``), else 0.
    """

    job: Job
    step: int
    loss: float
    grad_norm: float
    learning_rate: float
    finite: bool
    metrics: Mapping[str, float] = types.MappingProxyType({})
    tokens: int = 0


class StepResult(NamedTuple):
    """What an update gave: results by job, tokens of the batches before it, and tokens with padding."""

    results: list[Result]
    tokens: int
    padded_tokens: int


class Entries(NamedTuple):
    """What is known of an update before it is started: each job with its slot, clock and learning rate."""

    jobs: list[tuple[Job, int, int, float]]
    tokens: int
    padded_tokens: int


class Pending(NamedTuple):
    """An update whose results are still on the device."""

    report: Report
    entries: Entries


def results_of(pending: Pending) -> list[Result]:
    """Wait for an update; return its results."""
    report = jax.device_get(pending.report)
    return [
        Result(
            job, step + 1, float(report.loss_J[slot]), float(report.grad_norm_J[slot]), rate,
            bool(report.finite_J[slot]),
            {name: float(mean_J[slot]) for name, mean_J in report.metrics.items() if not np.isnan(mean_J[slot])},
        )
        for job, slot, step, rate in pending.entries.jobs
    ]  # fmt: skip
