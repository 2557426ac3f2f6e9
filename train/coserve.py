"""Fine-tuning beside serving: the updates of a trainer's jobs as background work of an engine, unit by unit.

    training = Training(trainer, WindowOptions(tokens=512, layers=4), ended=publish)
    engine = Engine(model, config, store=store, background=training, background_share=0.3)
    training.join(job)  # any thread, while the engine runs

A unit is some layers on a window of tokens (``train/window.py``), or an update. The engine starts it between two calls
of requests, or at once where there are none; the base's weights are the engine's own. What a unit takes is measured,
and what units of its name are expected to take follows.

Programs are compiled before a job joins, in a thread of their own (``train/ahead.py``): others go on with theirs.

A unit that fails costs the update that it belongs to. Its jobs are then trained apart, one an update, so that the one
at fault is found and given up; no other job and no request ends with it.

What a micro-batch holds on the device is leased from the engine's budget (``training.memory = engine.memory``), and
given back after the update. Without room for it training waits. Who needs that memory gets it at once: the micro-batch
is dropped, and begins anew later.
"""

import collections
import functools
import logging
import queue
import statistics
import threading
from collections.abc import Callable, Generator, Iterator
from typing import Any

import jax

from preft_jax.adapters.adapter import Adapter
from preft_jax.device.compiles import expected_compiles
from preft_jax.device.memory import Budget
from preft_jax.errors import plain
from preft_jax.models.params import Params
from serve.engine.background import Unit
from train.ahead import Ahead
from train.cutting import WindowOptions
from train.hooks import Hooks
from train.jobs import Job, first_state, host_state
from train.micro import micro_batches
from train.room import Room
from train.step import Slots
from train.trainer import Result, StepResult, Trainer
from train.under_way import WAITS, TrainingUnit, Update

__all__ = ["Hooks", "Training", "TrainingUnit"]

_log = logging.getLogger("preft.train")

_FIRST_SECONDS = 0.01
"""What a unit is expected to take before one of its name was measured."""

_MEASURED = 5
"""Measurements of which the median is expected: one that was held up by something else says nothing."""

_LOOK = "weights"
"""Name of the first unit, which only looks how the engine's weights lie."""

_PAUSE = 0.05
"""Seconds after which an engine that has nothing else to do asks whether programs are compiled."""


class Training:
    """Work of an engine (``serve.engine.background.Work``): trains jobs until none has updates left.

    Args:
        trainer: its jobs are trained; nobody else may use it while the engine runs.
        windows: how a micro-batch is cut into units.
        updated: ``Hooks.updated``.
        ended: told of each job that is done or was given up (``job.failed``), with the adapter of its last whole update
            (its first one, if that is lost); the job has left the trainer. What it raises is logged.
        hooks: others who are told.

    Attributes:
        seconds: what a unit is expected to take, by name.
        updates: that were started.
        error: what the last unit that failed was stopped by, or None.
        paused: while it is set no unit is given; any thread may set it. An engine that waits for requests has to be
            woken once it is no longer set (``AsyncEngine.wake``); so it has when a job is to join or to leave.
        restarts: micro-batches that were dropped because others needed their memory.
    """

    def __init__(
        self,
        trainer: Trainer,
        windows: WindowOptions = WindowOptions(),
        *,
        updated: Callable[[Result], object] = lambda result: None,
        ended: Callable[[Job, Adapter], object] = lambda job, adapter: None,
        hooks: Hooks | None = None,
    ):
        self.trainer = trainer
        self.hooks = hooks or Hooks()
        self.seconds: dict[str, float] = {}
        self.updates = 0
        self.error: Exception | None = None
        self.paused = False
        self.restarts = 0
        self._ahead = Ahead(trainer, windows)
        self._room = Room(self.give_back)
        self._thread: int | None = None
        self._is_asked_back = False
        self._ask_updated = updated
        self._ask_ended = ended
        self._took: dict[str, collections.deque[float]] = {}
        self._inbox: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._update: Update | None = None
        # Trained one an update, for an update of several of them failed.
        self._apart: set[Job] = set()
        # Waiting jobs whose programs are compiled, with which they join.
        self._entering: list[Job] = []
        self._one_by_one = False
        self._compiles = False
        self._tokens: dict[tuple[Job, int], int] = {}
        self._snapshots: dict[tuple[Job, int], Slots] = {}
        self._evaluations: list[tuple[Job, int, int, list[Any]]] = []
        # The engine's thread holds it while it is in here, and ``close`` while it ends all.
        self._lock = threading.RLock()
        self._closed = False
        for job in trainer.jobs:
            self._ahead.learn(job)

    @property
    def memory(self) -> Budget | None:
        """The budget of which the memory of a micro-batch is leased; None: nothing is leased, as on a CPU."""
        return self._room.budget

    @memory.setter
    def memory(self, budget: Budget | None) -> None:
        self._room.budget = budget

    @property
    def waits(self) -> str | None:
        """Why training waits for memory, or None."""
        return self._room.waits

    @property
    def pause(self) -> float | None:
        """Seconds after which to ask for a unit again, for programs are being compiled; None: they are not."""
        return _PAUSE if self._compiles and not (self.paused or self._closed) else None

    @property
    def is_compiling(self) -> bool:
        """Whether programs are being compiled, which nothing can end."""
        return self._ahead.is_busy

    @property
    def compile_seconds(self) -> dict[str, list[float]]:
        """Seconds that compiling took, by names of programs: one number for each shape."""
        return self._ahead.seconds

    # From any thread

    def join(self, job: Job, state: Slots | None = None) -> None:
        """Let a job join before an update; ``state`` is what it left with, ``job.step`` its updates so far.

        All its examples are looked at, in the caller's thread. It joins once the programs that are new with it are
        compiled. A job that cannot join, for want of memory for one, is given up.
        """
        try:
            with expected_compiles():
                state = first_state(job) if state is None else host_state(state)
            self._ahead.learn(job)
        except Exception as error:
            self._inbox.put(functools.partial(self._refuse, job, error))
            return
        self._inbox.put(functools.partial(self._join, job, state))

    def leave(self, job: Job) -> None:
        """Let a job leave after this update; one that is not there any more is ignored."""
        self._inbox.put(functools.partial(self._leave, job))

    def close(self) -> None:
        """Let all jobs leave with what they learned in whole updates, and give no unit any more."""
        with self._lock:
            if self._closed:
                return
            self._closed, self._update = True, None
            self._ahead.close()
            try:
                self._read_inbox()
                self.trainer.forget_gathered()
                for job in self.trainer.jobs:
                    self._leave(job)
                self._let_go()
            except Exception as error:
                self._forget_states(error)
        self._room.give_back()  # Not under the lock: who asks for memory back holds the budget, and then waits for it.

    # What the engine asks for

    def next(self) -> Unit | None:
        """Return the unit that comes next; None while paused, and while no job has an update left."""
        with self._lock:
            self._thread = threading.get_ident()
            if self._is_asked_back:
                self._drop()
            if self._closed:
                return None
            while self._update is None or self._update.name is None:
                try:
                    if not self._begin():
                        return self._look()
                except Exception as error:  # Nobody's in particular: the device has lost the jobs' states.
                    self._forget_states(error)
            if self.paused:
                return None
            update = self._update
            if update.name == WAITS:
                self._go_on(update)
                update = self._update
            if update is None or update.name is None or update.name == WAITS:
                return None
            seconds = self.seconds.get(update.name, _FIRST_SECONDS)
            start = functools.partial(self._start, update, update.units)
            return TrainingUnit(start=start, seconds=seconds, name=update.name, update=update)

    def done(self, unit: Unit, seconds: float) -> None:
        """Expect of units of this name the median of what the latest ones took."""
        assert isinstance(unit, TrainingUnit)
        if unit.update is None:
            return
        took = self._took.setdefault(unit.name, collections.deque(maxlen=_MEASURED))
        took.append(seconds)
        self.seconds[unit.name] = statistics.median_low(took)

    def failed(self, unit: Unit, error: Exception) -> None:
        """Give up the update of a unit, and its job if it is the only one; others begin theirs again."""
        assert isinstance(unit, TrainingUnit)
        with self._lock:
            if unit.update is not None and unit.update is self._update:
                self._recover(unit.update, error)

    # Updates

    def _look(self) -> Unit | None:
        """Return a unit that notes how the engine's weights lie, if jobs wait and nobody has."""
        if self._ahead.base is not None or self.paused or not self.trainer.jobs:
            return None

        def look(base: Params) -> tuple[()]:
            self._ahead.look(base)
            return ()

        return TrainingUnit(start=look, seconds=0.0, name=_LOOK)

    def _start(self, update: Update, units: Iterator[str], base: Params) -> Any:
        """Start the unit of an update that comes next and return its arrays."""
        with self._lock:
            if update is not self._update or units is not update.units:  # One before it failed, or all were dropped.
                return None
            update.base = base
            update.name = next(update.units, None)
            return update.arrays

    def _begin(self) -> bool:
        """Plan the next update of jobs that have one, after letting go of those that have none; return if there is."""
        self._update, self._compiles = None, False
        self._read_inbox()
        if self.paused:
            return False
        self._admit()
        while any(job.done for job in self.trainer.running):
            self._let_go()
            self._admit()
        jobs = self._turn()
        if not jobs:
            return False
        try:
            windowed = self._ahead.has()  # Others may have left, and what is left has other shapes.
        except Exception:  # All enter again, one by one, so that the one at fault is found and nobody's state is lost.
            self._settle()
            self.trainer.requeue()
            self._entering, self._one_by_one, windowed = [], True, None
        if windowed is None:
            self._compiles = True
            return False
        update = self._update = Update(jobs, windowed)
        update.units = self._units(update)
        self._go_on(update)
        return True

    def _go_on(self, update: Update) -> None:
        """Plan an update's next unit, or the one after it waited."""
        try:
            update.name = next(update.units)
        except Exception as error:
            self._recover(update, error)

    def _turn(self) -> list[Job]:
        """Return the jobs of the next update: all those that are not trained apart, or one of the others."""
        running = self.trainer.running
        self._apart &= set(running)
        together = [job for job in running if job not in self._apart]
        turns = [*([together] if together else []), *([job] for job in running if job in self._apart)]
        return turns[self.updates % len(turns)] if turns else []

    def _units(self, update: Update) -> Generator[str, None, None]:
        """Yield the name of each unit of an update, and start it when asked for the next one."""
        jobs, tokens = update.jobs, update.tokens
        dtype = self.trainer.model.params["embed"].dtype
        for rows in micro_batches(jobs, dict(update.gathered)):
            micro = self.trainer.prepare(rows)
            while not self._room.has(update.windowed, micro, dtype):
                yield WAITS
            units = update.windowed.units(micro.params, micro.batch, micro.dropout_J, micro.loss, micro.sums)
            while units.name is not None:
                yield units.name
                update.arrays = units.start(update.base)
            assert units.sums is not None
            self.trainer.gather(micro, units.sums)
            update.gathered.update(micro.jobs)
            for job, own in rows.items():
                tokens[job] += sum(len(document) for row in own for document in row)
        yield "update"
        self.updates += 1
        self._tokens |= {(job, job.step + 1): tokens[job] for job in jobs}
        self._tell(self.trainer.optim_step(jobs))
        update.arrays = self.trainer.started
        self._room.give_back()
        for job in jobs:
            if job.failed is None and self._asked("keeps", job):
                self._snapshots[job, job.step] = self.trainer.snapshot(job)
        for job in jobs:
            if job.failed is None and job.held_out and self._asked("evaluates", job):
                yield from self._evaluation(update, job)

    def _evaluation(self, update: Update, job: Job) -> Generator[str, None, None]:
        """Yield the name of each unit of an evaluation pass, and start it when asked for the next one."""
        found: list[Any] = []
        for params, batch in self.trainer.evaluation(job, job.held_out):
            units = update.windowed.evaluation(params, batch)
            while units.name is not None:
                yield units.name
                update.arrays = units.start(update.base)
            assert units.sums is not None
            found.append((units.sums.loss_J, units.sums.count_J))
        self._evaluations.append((job, job.step, self.trainer.slot_of(job), found))

    # Memory

    def give_back(self) -> None:
        """Give the memory of a micro-batch back, whose gradients are computed anew later; nothing else is lost.

        It is given back at once if the engine's thread asks, else before the next unit.
        """
        if self._thread in (None, threading.get_ident()):
            self._drop()
        else:
            self._is_asked_back = True

    def _drop(self) -> None:
        with self._lock:
            self._is_asked_back = False
            if not self._room.is_held:
                return
            self._room.give_back()
            update = self._update
            if update is not None:
                self.restarts += 1
                update.arrays = None
                # Without a unit in between: the generator is at the beginning of the micro-batch again.
                update.units, update.name = self._units(update), WAITS

    # Jobs come and go, between updates

    def _read_inbox(self) -> None:
        while True:
            try:
                action = self._inbox.get_nowait()
            except queue.Empty:
                return
            action()

    def _join(self, job: Job, state: Slots | None) -> None:
        try:
            self.trainer.add(job, state)
        except Exception as error:
            self._refuse(job, error)

    def _refuse(self, job: Job, error: Exception) -> None:
        """Give up a job that cannot join."""
        adapter = job.initial
        if job in self.trainer.jobs:
            adapter = Adapter(adapter.config, self.trainer.release(job).params)
        self._give_up(job, error)
        self._tell_ended(job, adapter)

    def _admit(self) -> None:
        """Give slots to jobs that wait, once their programs are compiled; one with which that fails is given up."""
        while waiting := self.trainer.entering():
            # More may have come while programs were compiled for these.
            if not self._entering or self._entering != waiting[: len(self._entering)]:
                self._entering = waiting[:1] if self._one_by_one else waiting
            jobs = self._entering
            try:
                if self._ahead.has(jobs) is None:
                    self._compiles = True
                    return
                self.trainer.admit(len(jobs))
            except Exception as error:
                self._entering = []
                if len(jobs) > 1:  # To find the one at fault.
                    self._one_by_one = True
                else:
                    self._refuse(jobs[0], error)
                continue
            self._entering = []
            for job in jobs:
                self._call(self.hooks.joined, job)
        self._one_by_one = False

    def _leave(self, job: Job) -> None:
        if job in self.trainer.jobs:
            self._settle()
        if job in self.trainer.jobs and job.failed is None:
            self._call(self.hooks.left, job, self.trainer.release(job))

    def _settle(self) -> None:
        """Wait for the last update, and tell of it."""
        self._tell(self.trainer.finish())

    def _let_go(self) -> None:
        """Wait for the last update, and let jobs that are done leave."""
        self._settle()
        for job in [job for job in self.trainer.running if job.done]:
            adapter = self.trainer.adapter_of(job)
            self.trainer.release(job)
            self._tell_ended(job, adapter)

    # Failures

    def _recover(self, update: Update, error: Exception) -> None:
        """Begin anew after an update that failed: nothing is left of it, unless it spoiled the jobs' states."""
        interrupted = isinstance(error, InterruptedError)
        _log.warning("an update of %s failed: %s", ", ".join(job.name for job in update.jobs), error, exc_info=error)
        self.error, self._update = error, None
        self._room.give_back()
        self.trainer.forget_gathered()
        if len(update.jobs) == 1 and not interrupted:
            self._give_up(update.jobs[0], error)
        elif not interrupted:
            self._apart |= set(update.jobs)
        try:
            self.trainer.wait()
            self._settle()
        except Exception as lost:
            self._forget_states(lost)

    def _forget_states(self, error: Exception) -> None:
        jobs = self.trainer.forget_states()
        self._tokens, self._snapshots, self._evaluations = {}, {}, []
        for job in jobs:
            if job.failed is None and self.hooks.lost is not None:
                self._call(self.hooks.lost, job)
            else:
                self._give_up(job, error)
                self._tell_ended(job, job.initial)

    def _give_up(self, job: Job, error: Exception) -> None:
        if job.failed is None:
            job.failed = f"training failed after step {job.step}: {type(error).__name__}: {plain(str(error))}"

    # Who is told

    def _asked(self, name: str, job: Job) -> bool:
        return bool(self._call(getattr(self.hooks, name), job))

    def _call(self, hook: Callable[..., Any], *args: Any) -> Any:
        try:
            return hook(*args)
        except Exception:
            _log.exception("what is told of training failed")
            return None

    def _tell_ended(self, job: Job, adapter: Adapter) -> None:
        self._call(self._ask_ended, job, adapter)

    def _tell(self, results: StepResult | None) -> None:
        """Tell what updates gave, then what was evaluated and kept after them."""
        told = [] if results is None else results.results
        for result in told:
            result = result._replace(tokens=self._tokens.pop((result.job, result.step), 0))
            for hook in (self._ask_updated, self.hooks.updated):
                self._call(hook, result)
        evaluations, self._evaluations = self._evaluations, []
        for job, step, slot, found in evaluations:
            if job.failed is None:
                loss, count = (
                    sum(own_J[slot] for own_J in all_J) for all_J in zip(*jax.device_get(found), strict=True)
                )
                if count:
                    self._call(self.hooks.evaluated, job, step, float(loss) / float(count), int(count))
        for result in told:
            key = result.job, result.step
            snapshot = self._snapshots.pop(key, None)
            if snapshot is not None and result.finite:
                self._call(self.hooks.kept, *key, snapshot)
