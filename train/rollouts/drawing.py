"""Samples and rewards of steps, drawn when they are needed or while the steps before are learned."""

import collections
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

from preft_jax.adapters.adapter import Adapter
from train.rollouts.rewarding import Rewarder
from train.rollouts.samples import Asked, Group, RolloutJob, Sampler, step_prompts

Adapters = Mapping[RolloutJob, Adapter]


class Drawn(NamedTuple):
    """Samples with their rewards, by job; and the seconds that they took."""

    groups: dict[RolloutJob, list[Group]]
    sampling_seconds: float
    reward_seconds: float


class Batch(NamedTuple):
    """The samples of a job's step.

    Attributes:
        groups: with their rewards.
        staleness: steps that were learned since the adapter that drew them.
        sampling_seconds, reward_seconds: that they took, together with those of other jobs.
    """

    groups: list[Group]
    staleness: int
    sampling_seconds: float
    reward_seconds: float


class Drawing:
    """Draws the batches of steps; with ``max_staleness`` S, each by the adapter of S steps before, beside training.

    Batches are then drawn by a thread, one after the other: the engine's calls and the trainer's take turns on the
    device. Which adapter draws a batch depends on its number alone, and not on how long anything takes; but a run that
    is resumed draws its first batches by the adapter that it goes on from.

    Args:
        sampler: nobody else uses it.
        rewarder: neither.
        max_staleness: steps that may be learned between the adapter that draws a batch and the one that learns it.
    """

    def __init__(self, sampler: Sampler, rewarder: Rewarder, max_staleness: int = 0):
        self._sampler = sampler
        self._rewarder = rewarder
        self._max_staleness = max_staleness
        self._thread = ThreadPoolExecutor(1, "sampling") if max_staleness else None
        # Of each job the batches that are drawn or being drawn, each with the steps that its adapter had learned.
        self._ahead: dict[RolloutJob, collections.deque[tuple[int, Future[Drawn]]]] = {}

    def close(self) -> None:
        """Wait for the batch that is being drawn, and draw no other."""
        if self._thread is not None:
            self._thread.shutdown(cancel_futures=True)

    def next(self, jobs: Sequence[RolloutJob], adapter_of: Callable[[RolloutJob], Adapter]) -> dict[RolloutJob, Batch]:
        """Return the batch that each job learns next, and begin with those that it may draw ahead.

        ``adapter_of``: the adapter of a job as it is now.
        """
        for ahead in range(self._max_staleness + 1):
            lacking = [job for job in jobs if len(self._ahead.get(job, ())) == ahead and job.batch + ahead < job.steps]
            if lacking:
                asked = {job: step_prompts(job, ahead) for job in lacking}
                call = self._begin(asked, {job: adapter_of(job) for job in lacking})
                for job in lacking:
                    self._ahead.setdefault(job, collections.deque()).append((job.batch, call))
        return {job: self._take(job) for job in jobs}

    def draw(
        self, asked: Mapping[RolloutJob, Sequence[Asked]], adapters: Adapters, *, punish: bool = True
    ) -> dict[RolloutJob, list[Group]]:
        """Return samples with their rewards, behind the batches that are being drawn; ``punish``: see ``Rewarder``."""
        return self._begin(asked, adapters, punish).result().groups

    def forget(self, job: RolloutJob) -> None:
        """Let go of what was drawn for a job that learns no more."""
        self._ahead.pop(job, None)

    def _take(self, job: RolloutJob) -> Batch:
        learned, call = self._ahead[job].popleft()
        drawn = call.result()
        return Batch(drawn.groups[job], job.batch - learned, drawn.sampling_seconds, drawn.reward_seconds)

    def _begin(
        self, asked: Mapping[RolloutJob, Sequence[Asked]], adapters: Adapters, punish: bool = True
    ) -> "Future[Drawn]":
        if self._thread is not None:
            return self._thread.submit(self._draw, asked, adapters, punish)
        done: Future[Drawn] = Future()
        done.set_result(self._draw(asked, adapters, punish))
        return done

    def _draw(self, asked: Mapping[RolloutJob, Sequence[Asked]], adapters: Adapters, punish: bool) -> Drawn:
        began = time.perf_counter()
        groups = self._sampler.sample(asked, adapters)
        sampled = time.perf_counter()
        for job, own in groups.items():
            self._rewarder.reward(job, own, punish=punish)
        return Drawn(groups, sampled - began, time.perf_counter() - sampled)
