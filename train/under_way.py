"""An update beside serving that is under way, and its units."""

import collections
import dataclasses
from collections.abc import Iterator
from typing import Any

from preft_jax.models.params import Params
from serve.engine.background import Unit
from train.jobs import Job
from train.window import Windowed

WAITS = "waits"
"""In place of a unit's name: there is no room for the next micro-batch."""


class Update:
    """An update under way: whose, its programs, the units that are left, the next one's name, and its arrays.

    No name: no unit is left. ``gathered`` counts the micro-batches of each job whose gradients are there, and
    ``tokens`` their tokens.
    """

    def __init__(self, jobs: list[Job], windowed: Windowed):
        self.jobs = jobs
        self.windowed = windowed
        self.gathered: collections.Counter[Job] = collections.Counter()
        self.tokens: collections.Counter[Job] = collections.Counter()
        self.units: Iterator[str] = iter(())
        self.name: str | None = None
        self.base: Params = {}
        self.arrays: Any = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainingUnit(Unit):
    """A unit named after its program, and the update that it is of (None: of none)."""

    update: Update | None = None
