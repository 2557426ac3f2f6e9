"""Fine-tuning beside serving: the updates of a trainer's jobs as background work of an engine, unit by unit.

    training = Training(trainer, WindowOptions(tokens=512, layers=4), ended=publish)
    engine = Engine(model, config, store=store, background=training, background_share=0.3)

A unit is some layers on a window of tokens (``train/window.py``), or an update. The engine starts it between two calls
of requests, or at once where there are none; the base's weights are the engine's own. What a unit takes is measured,
and what units of its name are expected to take follows.

What a micro-batch holds on the device is leased from the engine's budget (``training.memory = engine.memory``), and
given back after the update. Without room for it training waits. Who needs that memory gets it at once: the micro-batch
is dropped, and begins anew later.
"""

import collections
import dataclasses
import logging
import statistics
import threading
from collections.abc import Callable, Generator
from typing import Any

import jax

from preft_jax.adapters.adapter import Adapter
from preft_jax.device.memory import Budget, Lease
from preft_jax.errors import ConfigError
from preft_jax.models.params import Params
from serve.engine.background import Unit
from train.jobs import Job
from train.micro import MicroBatch, micro_batches
from train.trainer import Result, StepResult, Trainer
from train.window import Windowed, WindowOptions

_log = logging.getLogger("preft.train")

_FIRST_SECONDS = 0.01
"""What a unit is expected to take before one of its name was measured."""

_WAITS = "waits"
"""In place of a unit's name: there is no room for the next micro-batch."""

_MEASURED = 5
"""Measurements of which the median is expected: one that was held up by something else says nothing."""


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
        memory: the budget of which the memory of a micro-batch is leased; None: nothing is leased, as on a CPU.
        waits: why training waits for memory, or None.
        restarts: micro-batches that were dropped because others needed their memory.
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
        self.memory: Budget | None = None
        self.waits: str | None = None
        self.restarts = 0
        self._lease: Lease | None = None
        self._thread: int | None = None
        self._is_asked_back = False
        # Micro-batches of this update that were gathered, by job.
        self._gathered: dict[Job, int] = {}
        self._windows = windows
        self._updated = updated
        self._ended = ended
        self._took: dict[str, collections.deque[float]] = {}
        self._windowed: Windowed | None = None
        self._base: Params = {}
        self._arrays: Any = None
        self._plan: Generator[str, None, None] | None = None
        self._name: str | None = None

    # What the engine asks for

    def next(self) -> Unit | None:
        """Return the unit that comes next; None while paused, after an error, and while no job has an update left."""
        self._thread = threading.get_ident()
        if self._is_asked_back:
            self._drop()
        if self.paused or self.error is not None:
            return None
        if self._name is None:
            self._begin()
        elif self._name == _WAITS and self._plan is not None:
            self._name = next(self._plan)
        if self._name is None or self._name == _WAITS:
            return None
        seconds = self.seconds.get(self._name, _FIRST_SECONDS)
        return TrainingUnit(start=self._start, seconds=seconds, name=self._name)

    def done(self, unit: Unit, seconds: float) -> None:
        """Expect of units of this name the median of what the latest ones took.

        The first of a name may have been compiled: what it took says nothing.
        """
        assert isinstance(unit, TrainingUnit)
        if unit.name not in self._took:
            self._took[unit.name] = collections.deque(maxlen=_MEASURED)
            return
        took = self._took[unit.name]
        took.append(seconds)
        self.seconds[unit.name] = statistics.median_low(took)

    def failed(self, unit: Unit, error: Exception) -> None:
        """Stop for good."""
        _log.error("training beside serving stopped: %s", error, exc_info=error)
        self.error = error
        self._plan = self._name = None
        self._leave()

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
        for rows in micro_batches(jobs, dict(self._gathered)):
            micro = self.trainer.prepare(rows)
            if self._windowed is None or self._windowed.groups != micro.groups:
                self._windowed = Windowed(self.trainer.model.config, micro.groups, self._windows)
            while not self._has_room(self._windowed, micro):
                yield _WAITS
            units = self._windowed.units(micro.params, micro.batch, micro.dropout_J, micro.loss, micro.sums)
            while units.name is not None:
                yield units.name
                self._arrays = units.start(self._base)
            assert units.sums is not None
            self.trainer.gather(micro, units.sums)
            self._gathered |= {job: self._gathered.get(job, 0) + 1 for job in micro.jobs}
        yield "update"
        self.updates += 1
        self._gathered = {}
        self._tell(self.trainer.optim_step(jobs))
        self._arrays = self.trainer.started
        self._leave()

    # Memory

    def _has_room(self, windowed: Windowed, micro: MicroBatch) -> bool:
        """Lease what a micro-batch takes, if there is room."""
        if self.memory is None:
            return True
        params = sum(leaf.size for leaf in jax.tree.leaves(micro.params))
        rows, length = micro.batch.tokens_BS.shape
        needed = windowed.held_bytes(rows, length, params, self.trainer.model.params["embed"].dtype)
        if self._lease is not None and self._lease.num_bytes >= needed:
            return True
        self._leave()
        try:
            self._lease = self.memory.lease("training", needed, ask_back=self.give_back)
        except ConfigError as error:
            if self.waits is None:
                _log.warning("training waits for memory: %s", error)
            self.waits = str(error)
            return False
        self.waits = None
        return True

    def give_back(self) -> None:
        """Give the memory of a micro-batch back, whose gradients are computed anew later; nothing else is lost.

        It is given back at once if the engine's thread asks, else before the next unit.
        """
        if self._thread in (None, threading.get_ident()):
            self._drop()
        else:
            self._is_asked_back = True

    def _drop(self) -> None:
        self._is_asked_back = False
        if self._lease is not None:
            self.restarts += self._plan is not None
            self._plan = self._name = self._arrays = None
            self._leave()

    def _leave(self) -> None:
        if self._lease is not None:
            self._lease.give_back()
            self._lease = None

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
