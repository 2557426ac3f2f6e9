"""Micro-batches: the rows of several jobs side by side, and what a program takes of them."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from preft_jax.errors import ConfigError
from train.data.batches import Batch
from train.data.documents import Document
from train.data.rows import Example
from train.jobs import Job
from train.losses import Loss
from train.step import Group, Sums

DocumentRow = Sequence[Example | Document]
"""Documents that share a row."""


class MicroBatch(NamedTuple):
    """A prepared micro-batch: the arguments of ``Programs.accumulate``, whose rows they are, and their tokens."""

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


def check_rows(job: Job, rows: Sequence[DocumentRow], loss: Loss, vocab_size: int) -> None:
    """Raise ``ConfigError`` unless a job can be trained on rows by this loss."""
    if job.failed is not None:
        raise ConfigError(f"{job.name!r} was given up: {job.failed}")
    longest = max((sum(map(len, row)) for row in rows), default=0)
    if longest > job.config.batches.max_length:
        raise ConfigError(
            f"a row of {job.name!r} has {longest} tokens and max_length is {job.config.batches.max_length}; raise "
            "max_length, or cut the row"
        )
    for document in (document for row in rows for document in row):
        if not 0 <= document.token_ids.min() <= document.token_ids.max() < vocab_size:
            raise ConfigError(
                f"a document of {job.name!r} has token ids outside 0 to {vocab_size - 1}, the model's vocabulary"
            )
        for name in loss.needs:
            if getattr(document, name) is None:
                raise ConfigError(
                    f"the loss {loss.name!r} needs {name}, and a document of {job.name!r} has none; give them, or "
                    "take another loss"
                )


def by_document(values_BS: np.ndarray, rows: Mapping[Job, Sequence[DocumentRow]]) -> dict[Job, list[list[np.ndarray]]]:
    """Return a batch's values of targets as those of tokens: for each row of a job, ``[S]`` for each document."""
    found: dict[Job, list[list[np.ndarray]]] = {}
    b = 0
    for job, own in rows.items():
        found[job] = []
        for row in own:
            ends = np.cumsum([len(document) for document in row])
            found[job].append(
                [
                    np.concatenate([np.zeros(1, values_BS.dtype), values_BS[b, end - len(document) : end - 1]])
                    for document, end in zip(row, ends, strict=True)
                ]
            )
            b += 1
    return found
