"""Whom training beside serving tells of what."""

import dataclasses
from collections.abc import Callable

from train.jobs import Job
from train.results import Result
from train.step import Slots


@dataclasses.dataclass(frozen=True, kw_only=True)
class Hooks:
    """Whom training tells of what, and whom it asks. The thread that runs the engine calls them, so they do not wait.

    What a hook raises is logged, and changes nothing.

    Attributes:
        joined: told of a job that has a slot now.
        updated: told what an update gave a job, one update later.
        keeps: asked after each update of a job whether its state is wanted; ``kept`` gets it.
        kept: told a job's state after so many updates, as ``jobs.host_state`` takes it, which nothing changes.
        evaluates: asked after each update of a job whether its held-out rows are evaluated on; ``evaluated`` is told.
        evaluated: told the mean loss on held-out rows after so many updates, and how many tokens it is the mean of.
        left: told of a job that left, as it was asked to, and its state, with which it may join again.
        lost: told of jobs that left because a failed update has spoiled their states; None: they are given up.
    """

    joined: Callable[[Job], object] = lambda job: None
    updated: Callable[[Result], object] = lambda result: None
    keeps: Callable[[Job], bool] = lambda job: False
    kept: Callable[[Job, int, Slots], object] = lambda job, step, state: None
    evaluates: Callable[[Job], bool] = lambda job: False
    evaluated: Callable[[Job, int, float, int], object] = lambda job, step, loss, tokens: None
    left: Callable[[Job, Slots], object] = lambda job, state: None
    lost: Callable[[Job], object] | None = None
