"""Programs of updates, compiled before they are called, in a thread of their own.

The engine's thread asks whether what it needs is there, and goes on with something else while it is not.
"""

import collections
import functools
import itertools
import logging
import threading
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax

from preft_jax.device.ahead import Rehearsal, is_spread, shapes_of
from preft_jax.device.compiles import expected_compiles
from train.cutting import WindowOptions
from train.jobs import Job
from train.layout import Layout, Place, moved
from train.shapes import Shapes, rehearse, rows_of, shapes_of_jobs
from train.step import Group, Programs, Slots, State
from train.trainer import Trainer
from train.window import Windowed

_log = logging.getLogger("preft.train")

_MOST = 32
"""Needs that are remembered to be there."""

_windowed = functools.lru_cache(maxsize=16)(Windowed)
"""The programs of units, kept while jobs come and go: the same groups come back."""


class _Need(NamedTuple):
    """Shapes of updates; and groups and places before some jobs enter, and their places then."""

    shapes: Shapes
    groups: tuple[Group, ...] = ()
    places: tuple[tuple[Place, ...], ...] = ()


class _There(NamedTuple):
    windowed: Windowed
    programs: Programs


class Ahead:
    """Compiles what a trainer's next updates call.

    Args:
        trainer: whose jobs' updates are in units.
        options: how they are cut.

    Attributes:
        base: shapes of the base model's weights as the engine has them; None: nobody has shown them yet.
        seconds: that compiling took for each shape, by names of programs.
    """

    def __init__(self, trainer: Trainer, options: WindowOptions):
        self.base: Any = None
        self.seconds: dict[str, list[float]] = {}
        self._trainer = trainer
        self._options = options
        self._is_spread = False
        # What is needed most recently, last. The programs are held, so that they stay.
        self._ready: collections.OrderedDict[_Need, _There] = collections.OrderedDict()
        self._failed: tuple[_Need, Exception] | None = None
        self._thread: threading.Thread | None = None
        self._rehearsal = Rehearsal()

    @property
    def is_busy(self) -> bool:
        """Whether something is being compiled."""
        return self._thread is not None and self._thread.is_alive()

    def look(self, base: Any) -> None:
        """Note the shapes of the base model's weights."""
        self._is_spread = is_spread(jax.tree.leaves(base))
        self.base = shapes_of(base)

    def learn(self, job: Job) -> None:
        """Look at a job's examples, in a thread in which nobody waits."""
        for size in {self._options.in_a_row(2**n) for n in range(self._options.tokens.bit_length())}:
            rows_of(job, size)

    def has(self, entering: Sequence[Job] = ()) -> Windowed | None:
        """Return the programs of units for updates with these of the waiting jobs; None: they are being compiled.

        Raises:
            Exception: that compiling them ended with; it is tried again when it is asked for again.
        """
        if self.base is None:
            return None
        trainer = self._trainer
        layouts = list(itertools.accumulate(entering, Layout.with_job, initial=trainer.layout))
        before, after = layouts[0], layouts[-1]
        jobs = list(after.places)
        there = _There(self._windowed(after), trainer.programs_of(after))
        if self._is_spread:
            return there.windowed
        num_rows, _ = trainer.num_rows(jobs)
        need = _Need(shapes_of_jobs(after.groups, jobs, num_rows, self._options))
        if entering:
            places = tuple(sorted(before.places.values())), tuple(after.places[job] for job in entering)
            need = need._replace(groups=before.groups, places=places)
        if self._ready.get(need) == there:
            self._ready.move_to_end(need)
            return there.windowed
        if self.is_busy:
            return None
        if self._failed is not None and self._failed[0] == need:
            error, self._failed = self._failed[1], None
            raise error
        state, owns = shapes_of(trainer.state), [shapes_of(trainer.state_of(job)) for job in entering]
        moves = list(zip(layouts, layouts[1:], entering, owns, strict=False))
        self._rehearsal = Rehearsal()
        work = functools.partial(self._compile, need, there, self._rehearsal, state, moves)
        self._thread = threading.Thread(target=work, name="finetune-compiler", daemon=True)
        self._thread.start()
        return None

    def close(self) -> None:
        """Begin to compile nothing more; a program that is being compiled is not waited for."""
        self._rehearsal.stop()

    def _windowed(self, layout: Layout) -> Windowed:
        return _windowed(self._trainer.model.config, layout.groups, self._options, self._trainer.attention)

    def _compile(
        self, need: _Need, there: _There, rehearsal: Rehearsal, state: State,
        moves: Sequence[tuple[Layout, Layout, Job, Slots]],
    ) -> None:  # fmt: skip
        try:
            with expected_compiles(), rehearsal:
                for before, after, job, own in moves:
                    state = moved(before, after, job, state, own)
                rehearse(need.shapes, *there, self.base, state)
            names = collections.Counter(rehearsal.missing)
            rehearsal.compile()
            if names:
                _log.info("compiled for training: %s", ", ".join(f"{n} {name}" for name, n in names.items()))
            for name, seconds in rehearsal.seconds.items():
                self.seconds[name] = [*self.seconds.get(name, ()), *seconds]
            self._ready |= {need: there, _Need(need.shapes): there}
            while len(self._ready) > _MOST:
                self._ready.popitem(last=False)
        except InterruptedError:
            return  # Nobody waits for them any more.
        except Exception as error:
            _log.warning("programs of training were not compiled: %s", error, exc_info=error)
            self._failed = need, error
