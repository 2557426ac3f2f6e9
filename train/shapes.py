"""What the programs of updates depend on, found from the jobs before any is run; and a rehearsal of all their calls."""

import dataclasses
import weakref
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from preft_jax.models.batch import bucket
from train.cutting import WindowOptions
from train.data.batches import SHORTEST, BatchOptions, empty_batch, plan_epoch
from train.data.rows import Example
from train.jobs import Job
from train.layout import take
from train.losses import CROSS_ENTROPY
from train.optimizer import Numbers
from train.step import Group, Programs, State, Sums
from train.window import Windowed

_EPOCHS = 8
"""Epochs that are planned to see how long rows become; of a job with more, all lengths that there can be are taken."""


@dataclasses.dataclass(frozen=True)
class Rows:
    """Rows of micro-batches.

    Attributes:
        lengths: padded ones.
        edited: windows, by number, in which some micro-batch has an edited token.
        plain: windows in which some micro-batch may have none.
    """

    lengths: frozenset[int] = frozenset()
    edited: frozenset[int] = frozenset()
    plain: frozenset[int] = frozenset()

    def __or__(self, other: "Rows") -> "Rows":
        return Rows(self.lengths | other.lengths, self.edited | other.edited, self.plain | other.plain)

    def within(self, max_length: int) -> "Rows":
        """Return what is left of them where no row is longer than that."""
        most = -(-max_length // SHORTEST) * SHORTEST
        return dataclasses.replace(self, lengths=frozenset(min(length, most) for length in self.lengths))


@dataclasses.dataclass(frozen=True)
class Shapes:
    """What programs of updates depend on besides the base model.

    Attributes:
        groups: of adapters.
        num_rows: of a micro-batch.
        rows: of training.
        packed: whether rows hold several documents.
        dropout: whether there is any.
        evaluations: rows of a batch and what they hold, of the jobs with held-out examples.
    """

    groups: tuple[Group, ...]
    num_rows: int
    rows: Rows
    packed: bool
    dropout: bool
    evaluations: frozenset[tuple[int, Rows]]


_rows_of: "weakref.WeakKeyDictionary[Job, dict[int, tuple[Rows, Rows]]]" = weakref.WeakKeyDictionary()


def rows_of(job: Job, tokens: int) -> tuple[Rows, Rows]:
    """Return what a job's rows and its held-out rows are, cut into windows of so many tokens.

    The first call for a job looks at all its examples: make it where nobody waits.
    """
    known = _rows_of.setdefault(job, {})
    if tokens not in known:
        options = job.config.batches
        rows = _rows(job.examples, _lengths(job), tokens, options.packing, options.max_length)
        lengths = [len(example) for example in job.held_out]
        known[tokens] = rows, _rows(job.held_out, lengths, tokens, False, options.max_length)
    return known[tokens]


def shapes_of_jobs(groups: tuple[Group, ...], jobs: Sequence[Job], num_rows: int, options: WindowOptions) -> Shapes:
    """Return what the programs depend on while these jobs run."""
    rows, longest = Rows(), max((job.config.batches.max_length for job in jobs), default=1)
    for job in jobs:
        rows |= rows_of(job, options.in_a_row(num_rows))[0]
    evaluations = set[tuple[int, Rows]]()
    for job in (job for job in jobs if job.held_out):
        batches = job.config.batches
        held_out = rows_of(job, options.in_a_row(batches.batch_size))[1]
        evaluations.add((batches.batch_size, held_out.within(batches.max_length)))
    return Shapes(
        groups, num_rows, rows.within(longest), any(job.config.batches.packing for job in jobs),
        any(job.initial.config.dropout for job in jobs), frozenset(evaluations),
    )  # fmt: skip


def rehearse(shapes: Shapes, windowed: Windowed, programs: Programs, base: Any, state: State) -> None:
    """Call all that updates call, within a ``Rehearsal``; ``base`` and ``state`` are shapes."""
    num_slots = sum(group.size for group in shapes.groups)
    params = tuple(slots.params for slots in state)
    dropout_J = np.zeros(num_slots, np.float32) if shapes.dropout else None
    sums: Sums | None = None
    for batch in _batches(shapes.rows, shapes.num_rows, shapes.packed, windowed):
        sums = windowed.units(params, batch, dropout_J).finish(base)
        windowed.units(params, batch, dropout_J, CROSS_ENTROPY, sums).finish(base)
    if sums is not None:
        numbers = tuple(Numbers(*[np.ones(group.size, np.float32)] * len(Numbers._fields)) for group in shapes.groups)
        programs.update(state, sums, numbers)
    for slots in state:
        take(slots, 0)
    for num_rows, rows in shapes.evaluations:
        for batch in _batches(rows, num_rows, False, windowed):
            windowed.evaluation(params, batch).finish(base)


def _batches(rows: Rows, num_rows: int, packed: bool, windowed: Windowed) -> Iterator[Any]:
    """Yield micro-batches that have units of all kinds that those of these rows have."""
    size = windowed.options.in_a_row(num_rows)
    for length in sorted(rows.lengths):
        starts = {n: slice(n * size, (n + 1) * size) for n in range(-(-length // size))}
        edited, plain = rows.edited & starts.keys(), rows.plain & starts.keys()
        always = edited - plain
        # Edits wherever there may be some, next to none, and none where there may be none.
        for here, learned in ((edited, starts), (always | {min(edited, default=0)}, [max(starts)]), (always, starts)):
            batch = empty_batch(num_rows, length, packed)
            for n in here:
                batch.edit_mask_BSG[:, starts[n]] = True
            for n in learned:
                batch.weights_BS[:, starts[n]] = 1
            yield batch


def _rows(examples: Sequence[Example], lengths: Iterable[int], tokens: int, packed: bool, max_length: int) -> Rows:
    padded = frozenset(bucket(length, SHORTEST) for length in lengths)
    numbers = frozenset(range(-(-max(max_length, *padded, SHORTEST) // tokens)))
    if packed or not examples:
        return Rows(padded, numbers, numbers)
    some: set[int] = set()
    always = set(numbers)
    for example in examples:
        own = {int(n) for n in np.unique(np.flatnonzero(example.edit_mask.any(axis=-1)) // tokens)}
        some |= own
        always &= own
    return Rows(padded, frozenset(some), numbers - always)


def _lengths(job: Job) -> set[int]:
    """Return how many tokens the longest row of a micro-batch may have."""
    lengths = [len(example) for example in job.examples]
    if not lengths:
        return set()
    options, found, updates = job.config.batches, set[int](), 0
    for epoch in range(_EPOCHS):
        plan = plan_epoch(lengths, options, epoch)
        found |= {max(sum(lengths[i] for i in row) for row in rows) for rows in plan}
        updates += -(-len(plan) // job.config.gradient_accumulation_steps)
        if updates >= job.total_steps:
            return found
    return set(_all_lengths(lengths, options))


def _all_lengths(lengths: Sequence[int], options: BatchOptions) -> Iterator[int]:
    """Yield a length of each padded one that there can be."""
    length, longest = bucket(min(lengths), SHORTEST), options.max_length if options.packing else max(lengths)
    while length < longest:
        yield length
        length *= 2
    yield longest
