"""Micro-batches: the rows of several jobs side by side, and what a program takes of them."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from train.data.batches import Batch
from train.data.documents import Document
from train.data.rows import Example
from train.jobs import Job
from train.losses import Loss
from train.step import Group, Sums

DocumentRow = Sequence[Example | Document]
"""Documents that share a row."""


class MicroBatch(NamedTuple):
    """A micro-batch that is prepared: arguments of ``step.accumulate``, whose rows they are, and tokens of these."""

    groups: tuple[Group, ...]
    params: tuple[Any, ...]
    batch: Batch
    dropout_J: np.ndarray | None
    loss: Loss
    sums: Sums | None
    jobs: list[Job]
    tokens: int


def micro_batches(jobs: Sequence[Job], done: Mapping[Job, int] | None = None) -> Iterator[dict[Job, list[DocumentRow]]]:
    """Yield the rows of each micro-batch of the jobs' next updates, several jobs' beside each other.

    Args:
        jobs: with examples of their own.
        done: how many micro-batches of a job are left out, for they were computed before.
    """
    plans, done = {job: job.micro_batches() for job in jobs}, done or {}
    for number in range(max(map(len, plans.values()), default=0)):
        rows: dict[Job, list[DocumentRow]] = {
            job: [*job.rows(plan[number])] for job, plan in plans.items() if done.get(job, 0) <= number < len(plan)
        }
        if rows:
            yield rows
