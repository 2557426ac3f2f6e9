"""Contenders of ``bench.coserve``: what trains beside an engine, and when."""

import dataclasses
import functools
import time
from collections.abc import Callable, Iterable
from collections.abc import Sequence as Many
from typing import Any

import jax
import numpy as np

from preft_jax.adapters.config import AdapterConfig
from preft_jax.loading import Model
from preft_jax.models.layer import Remat
from preft_jax.shapes import NUM_GROUPS
from preft_jax.text.chat import EncodedPrompt
from serve.engine.background import Unit, Work
from serve.engine.engine import Engine
from serve.engine.pacing import Pacing, Requests, Share
from serve.engine.plan import Step
from serve.engine.sequence import Sequence
from train.data.batches import BatchOptions
from train.data.rows import DataOptions, Example
from train.jobs import Job, JobConfig
from train.trainer import Trainer, TrainOptions

ENDLESS = 10**6
"""Updates of a job: more than any run makes."""


def make_trainer(model: Model, *, jobs: int, rows: int, seq: int, rank: int, remat: Remat = "none") -> Trainer:
    """Return a trainer of LoRA jobs on all seven linears: full rows of random tokens, loss on each token."""
    rng = np.random.default_rng(0)
    config = JobConfig(
        adapter=AdapterConfig(rank=rank, positions="all"),
        data=DataOptions(max_length=seq, completion_only_loss=False),
        batches=BatchOptions(batch_size=rows, max_length=seq),
        max_steps=ENDLESS,
    )
    mask = np.zeros((seq, NUM_GROUPS), bool)
    mask[:, 0] = True
    learned = np.ones(seq, bool)
    learned[0] = False

    def example() -> Example:
        tokens = rng.integers(0, model.config.vocab_size, seq).astype(np.int32)
        return Example(tokens, mask, learned, EncodedPrompt([0], ()), [], 1)

    made = [
        Job(dataclasses.replace(config, name=f"job-{n}"), model, [example() for _ in range(2 * rows)])
        for n in range(jobs)
    ]
    return Trainer(model, made, TrainOptions(gradient_checkpointing=remat))


class WholeSteps:
    """Work whose units are whole updates of a trainer, each one call that nothing comes between."""

    def __init__(self, trainer: Trainer):
        self.trainer = trainer
        self._seconds = 0.01
        self._count = 0

    def next(self) -> Unit:
        """Return the next update."""
        return Unit(start=self._start, seconds=self._seconds)

    def _start(self, params: Any) -> Any:
        self.trainer.step()
        return self.trainer.started

    def done(self, unit: Unit, seconds: float) -> None:
        """Expect what it took; the first one was compiled."""
        self._count += 1
        self._seconds = seconds if self._count > 1 else self._seconds

    def failed(self, unit: Unit, error: Exception) -> None:
        """Raise."""
        raise error


class Every:
    """A pacing: one unit between two calls as soon as so many seconds have passed since the one before."""

    def __init__(self, seconds: float):
        self.seconds = seconds
        self._last = -float("inf")
        self._now = 0.0

    def arrived(self, sequences: Iterable[Sequence], now: float) -> None:
        """See ``Pacing``: it makes no difference."""

    def opened(self, queue: Many[Step | float], since: float, requests: Requests, now: float) -> None:
        """See ``Pacing``."""
        self._now = now

    def takes(self, seconds: float) -> bool:
        """See ``Pacing``."""
        due = self._now - self._last >= self.seconds
        if due:
            self._last = self._now
        return due

    def collected(self, step: Step, seconds: float, now: float) -> None:
        """See ``Pacing``: it makes no difference."""

    def unit_over(self, expected: float, seconds: float, now: float) -> None:
        """See ``Pacing``: the time counts from the end of a unit."""
        self._last = now


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Owned(Unit):
    """A unit and whose it is."""

    work: Work
    inner: Unit


class Turns:
    """Work and pacing of one engine for contenders that take turns; what a unit took and when it was over is noted.

    Attributes:
        work, pacing: of the contender whose turn it is; no work: nothing is trained.
        ends: when each unit was over, and the unit.
        error: of a unit that failed.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter):
        self.work: Work | None = None
        self.pacing: Pacing = Share(0.0)
        self.ends: list[tuple[float, Unit]] = []
        self.error: Exception | None = None
        self._clock = clock
        self._ran: set[int] = set()

    def takes_turn(self, work: Work | None, pacing: Pacing | None = None) -> None:
        """Give a contender its turn."""
        self.work, self.pacing, self.ends = work, pacing or Share(0.0), []

    @property
    def pause(self) -> float | None:
        """See ``Work``."""
        return getattr(self.work, "pause", None)

    def next(self) -> Unit | None:
        """See ``Work``."""
        inner = self.work.next() if self.work is not None else None
        if self.work is None or inner is None:
            return None
        owned = functools.partial(self._start, self.work, inner)
        return _Owned(start=owned, seconds=inner.seconds, name=inner.name, work=self.work, inner=inner)

    def _start(self, work: Work, inner: Unit, params: Any) -> Any:
        if work is not self.work:  # It was asked for in another turn, in which it will be asked for again.
            return jax.numpy.zeros(())
        self._ran.add(id(inner))
        return inner.start(params)

    def done(self, unit: Unit, seconds: float) -> None:
        """See ``Work``."""
        assert isinstance(unit, _Owned)
        if id(unit.inner) in self._ran:
            self._ran.discard(id(unit.inner))
            self.ends.append((self._clock(), unit.inner))
            unit.work.done(unit.inner, seconds)

    def failed(self, unit: Unit, error: Exception) -> None:
        """See ``Work``."""
        assert isinstance(unit, _Owned)
        self.error = error
        unit.work.failed(unit.inner, error)

    # The pacing of the turn

    def arrived(self, sequences: Iterable[Sequence], now: float) -> None:
        """See ``Pacing``."""
        self.pacing.arrived(sequences, now)

    def opened(self, queue: Many[Step | float], since: float, requests: Requests, now: float) -> None:
        """See ``Pacing``."""
        self.pacing.opened(queue, since, requests, now)

    def takes(self, seconds: float) -> bool:
        """See ``Pacing``."""
        return self.pacing.takes(seconds)

    def collected(self, step: Step, seconds: float, now: float) -> None:
        """See ``Pacing``."""
        self.pacing.collected(step, seconds, now)

    def unit_over(self, expected: float, seconds: float, now: float) -> None:
        """See ``Pacing``."""
        self.pacing.unit_over(expected, seconds, now)


def run_for(engine: Engine, seconds: float, until: Callable[[], bool] = lambda: False) -> None:
    """Let an engine without requests work for so many seconds, or until something is so."""
    end = time.perf_counter() + seconds
    while (left := end - time.perf_counter()) > 0 and not until():
        engine.step()
        pause = engine.pause
        time.sleep(max(0.0, min(left, 0.05 if pause is None else pause)))
