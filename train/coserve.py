"""Fine-tuning beside serving: the updates of a trainer's jobs as background work of an engine, unit by unit.

    training = Training(trainer, WindowOptions(tokens=512, layers=4), ended=publish)
    engine = Engine(model, config, store=store, background=training, background_share=0.3)

A unit is some layers on a window of tokens (``train/window.py``), or an update. The engine starts it between two calls
of requests, or at once where there are none; the base's weights are the engine's own. What a unit takes is measured,
and what units of its name are expected to take follows.
"""

import dataclasses
import logging
from collections.abc import Callable, Generator
from typing import Any

from preft_jax.adapters.adapter import Adapter
from preft_jax.models.params import Params
from serve.engine.background import Unit
from train.jobs import Job
from train.trainer import Result, StepResult, Trainer, micro_batches
from train.window import Windowed, WindowOptions

_log = logging.getLogger("preft.train")

_FIRST_SECONDS = 0.01
"""What a unit is expected to take before one of its name was measured."""

_OF_THE_NEW = 0.25
"""How much of what is expected is the latest measurement."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainingUnit(Unit):
    """A unit with the name of its program."""

    name: str


class Training:
    """Work of an engine (``serve.engine.background.Work``): trains a trainer's jobs until none has updates left.

    Args:
        trainer: its jobs join and leave as they do alone; nobody else may step it while the engine runs.
        windows: how a micro-batch is cut into units.
        updated: told what an update gave each job, one update later.
        ended: told of each job that is done or was given up (``job.failed``), with its adapter; the job has left the
            trainer. What it raises is logged.

    Attributes:
        seconds: what a unit is expected to take, by name.
        updates: that were started.
        error: why training stopped for good, or None. Jobs have the adapters of their last whole update.
        paused: while it is set no unit is given; any thread may set it.
    """

    def __init__(
        self,
        trainer: Trainer,
        windows: WindowOptions = WindowOptions(),
        *,
        updated: Callable[[Result], object] = lambda result: None,
        ended: Callable[[Job, Adapter], object] = lambda job, adapter: None,
    ):
        self.trainer = trainer
        self.seconds: dict[str, float] = {}
        self.updates = 0
        self.error: Exception | None = None
        self.paused = False
        self._windows = windows
        self._updated = updated
        self._ended = ended
        self._known: set[str] = set()
        self._windowed: Windowed | None = None
        self._base: Params = {}
        self._arrays: Any = None
        self._plan: Generator[str, None, None] | None = None
        self._name: str | None = None

    # What the engine asks for

    def next(self) -> Unit | None:
        """Return the unit that comes next; None while paused, after an error, and while no job has an update left."""
        if self.paused or self.error is not None:
            return None
        if self._name is None:
            self._begin()
        if self._name is None:
            return None
        seconds = self.seconds.get(self._name, _FIRST_SECONDS)
        return TrainingUnit(start=self._start, seconds=seconds, name=self._name)

    def done(self, unit: Unit, seconds: float) -> None:
        """Expect of units of this name what was expected before, and a part of what this one took.

        The first of a name may have been compiled: what it took says nothing.
        """
        assert isinstance(unit, TrainingUnit)
        if unit.name in self._known:
            before = self.seconds.get(unit.name, seconds)
            self.seconds[unit.name] = before + _OF_THE_NEW * (seconds - before)
        self._known.add(unit.name)

    def failed(self, unit: Unit, error: Exception) -> None:
        """Stop for good."""
        _log.error("training beside serving stopped: %s", error, exc_info=error)
        self.error = error
        self._plan = self._name = None

    # Updates

    def _start(self, base: Params) -> Any:
        """Start the unit that comes next and return its arrays."""
        if self._plan is None:  # A unit before this one failed.
            return None
        self._base = base
        self._name = next(self._plan, None)
        return self._arrays

    def _begin(self) -> None:
        """Plan the next update of the jobs that have one, after letting go of those that have none."""
        self.trainer.admit()
        while any(job.done for job in self.trainer.running):
            self._let_go()
            self.trainer.admit()
        jobs = self.trainer.running
        if jobs:
            self._plan = self._units(jobs)
            self._name = next(self._plan)

    def _units(self, jobs: list[Job]) -> Generator[str, None, None]:
        """Yield the name of each unit of an update, and start it when asked for the next one."""
        for rows in micro_batches(jobs):
            micro = self.trainer.prepare(rows)
            if self._windowed is None or self._windowed.groups != micro.groups:
                self._windowed = Windowed(self.trainer.model.config, micro.groups, self._windows)
            units = self._windowed.units(micro.params, micro.batch, micro.dropout_J, micro.loss, micro.sums)
            while units.name is not None:
                yield units.name
                self._arrays = units.start(self._base)
            assert units.sums is not None
            self.trainer.gather(micro, units.sums)
        yield "update"
        self.updates += 1
        self._tell(self.trainer.optim_step(jobs))
        self._arrays = self.trainer.started

    def _let_go(self) -> None:
        """Wait for the last update, and let jobs that are done leave."""
        self._tell(self.trainer.finish())
        for job in [job for job in self.trainer.running if job.done]:
            adapter = self.trainer.adapter_of(job)
            self.trainer.release(job)
            try:
                self._ended(job, adapter)
            except Exception:
                _log.exception("what is done with the adapter of %s failed", job.name)

    def _tell(self, results: StepResult | None) -> None:
        for result in results.results if results is not None else ():
            self._updated(result)
