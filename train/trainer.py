"""Trains jobs beside each other on one base model: rows of all of them in each batch, a slot of a group for each.

Training has two halves: ``Trainer.forward_backward`` adds up gradients, ``Trainer.optim_step`` lets jobs step by them.
``Trainer.step`` is both, on the jobs' own data.
"""

import collections
import dataclasses
import functools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from preft_jax.adapters.adapter import Adapter
from preft_jax.device.mesh import Placement
from preft_jax.errors import ConfigError, PreftError
from preft_jax.loading import Model, check_whole
from preft_jax.models.attention import DenseKernel
from preft_jax.models.batch import bucket
from preft_jax.models.layer import Remat
from preft_jax.models.layout import fused_layout
from train.data.batches import Batch, Rows, collate
from train.data.rows import Example
from train.jobs import Job, first_state, host_state
from train.layout import Layout, moved, stacked, take
from train.losses import Loss, find_loss
from train.micro import DocumentRow, MicroBatch, by_document, check_rows, micro_batches
from train.optimizer import Numbers
from train.results import Entries, Pending, Result, StepResult, results_of
from train.step import Bare, Means, Programs, Slots, State, Sums, is_donated, sums_of, updated_of


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainOptions:
    """How the device is used.

    Attributes:
        gradient_checkpointing: what the backward pass computes again (``models.layer.Remat``): ``none``, ``cheap``
            (all but matrix products) or ``full`` (whole layers: a quarter more time on an H100, docs/training.md).
        max_jobs: jobs that are trained at a time; others wait. 0: all.
        attention: ``xla``, ``cudnn``, or None for cuDNN's on a GPU in a 16-bit dtype.
    """

    gradient_checkpointing: Remat = "none"
    max_jobs: int = 0
    attention: DenseKernel | None = None


_programs = functools.lru_cache(maxsize=64)(Programs)
"""Kept while jobs come and go: the same groups come back."""


class _Own(NamedTuple):
    """A job's part of the sums."""

    grads: Any
    loss: jax.Array
    count: jax.Array
    metrics: dict[str, Means]


class Trainer:
    """Jobs, their states on the device, and the programs over them.

        trainer.forward_backward({ann: rows, bob: others}, "ppo")
        trainer.optim_step()
        results = trainer.finish().results

    ``optim_step`` and ``step`` start an update and return the results of the update before, so that the device does not
    wait for the host; ``finish`` returns the last one's.
    """

    def __init__(
        self,
        model: Model,
        jobs: Sequence[Job] = (),
        options: TrainOptions = TrainOptions(),
        placement: Placement | None = None,
    ):
        check_whole(model)
        self.model = model
        self.options = options
        self._placement = placement or Placement.single()
        self._base = self._placement.put_params(fused_layout(model.params, transpose=False))
        self._waiting: collections.deque[Job] = collections.deque()
        self.layout = Layout()
        self.programs = self.programs_of(self.layout)
        self._state: tuple[Slots, ...] = ()
        self._restored: dict[Job, Slots] = {}
        # Updates whose results are still to be fetched, oldest first.
        self._pending: tuple[Pending, ...] = ()
        # The update that is done, of which jobs' clocks do not know yet, and sums as a program gave them.
        self._updated: Bare | None = None
        self._added: Bare | None = None
        self._entries: Entries | None = None
        # What jobs had gathered when ``step`` began with their micro-batches, and their clocks then.
        self._began: tuple[dict[Job, int], dict[Job, int]] = {}, {}
        self._sums: Sums | None = None
        self._gathered: dict[Job, int] = {}
        self._tokens = self._padded_tokens = 0
        self._most_rows = 0
        for job in jobs:
            self.add(job)

    # Jobs

    @property
    def jobs(self) -> list[Job]:
        """Jobs that are trained or wait."""
        return [*self.layout.places, *self._waiting]

    @property
    def running(self) -> list[Job]:
        """Jobs that have a slot: those that are trained, and those that are done and not released."""
        return list(self.layout.places)

    def add(self, job: Job, state: Slots | None = None) -> None:
        """Let a job join, now or once there is room; ``state`` is what ``state_of`` gave for it earlier."""
        if job.name in {other.name for other in self.jobs}:
            raise ConfigError(f"two jobs have the name {job.name!r}; give each its own")
        self._restored[job] = first_state(job) if state is None else host_state(state)
        self._waiting.append(job)

    def entering(self) -> list[Job]:
        """Return the waiting jobs for which there is room, in their order."""
        room = self.options.max_jobs - len(self.running) if self.options.max_jobs else len(self._waiting)
        return list(self._waiting)[: max(0, room)]

    def admit(self, most: int | None = None) -> None:
        """Give waiting jobs a slot, ``most`` of them and as many as may be trained at a time."""
        self._settle()
        jobs = self.entering()[:most]
        if not jobs:
            return
        gathered = {job: self._own_sums(job) for job in self._gathered}
        layout, state = self.layout, self._state
        for job in jobs:
            before, layout = layout, layout.with_job(job)
            state = moved(before, layout, job, state, self._restored[job])
        after: dict[str, Any] = {"layout": layout, "_state": state}
        if layout.groups != self.layout.groups:
            after["_state"] = tuple(self._placement.put_replicated(slots) for slots in state)
            after["programs"] = self.programs_of(layout)
            after["_sums"] = self._placement.put_replicated(self._joined(gathered, layout, state)) if gathered else None
        waiting = collections.deque(job for job in self._waiting if job not in jobs)
        restored = {job: own for job, own in self._restored.items() if job not in jobs}
        vars(self).update(after, _waiting=waiting, _restored=restored)  # Nobody was admitted before, and now all are.

    def programs_of(self, layout: Layout) -> Programs:
        """Return the programs over the slots of a layout; those of the same groups are the same ones."""
        return _programs(
            self.model.config, layout.groups, self.attention, self.options.gradient_checkpointing,
            self._placement.replicated,
        )  # fmt: skip

    @property
    def attention(self) -> DenseKernel:
        """The implementation over keys and values of training."""
        if self.options.attention is not None:
            return self.options.attention
        return "cudnn" if jax.default_backend() == "gpu" and self._base["embed"].dtype != jnp.float32 else "xla"

    def slot_of(self, job: Job) -> int:
        """Return a running job's slot among those of all groups."""
        return self.layout.slot_of(job)

    def snapshot(self, job: Job) -> Slots:
        """Return a running job's state as it is after the last update started, flat, without waiting for it."""
        self._settle()
        place = self.layout.places[job]
        return take(self._state[place.group], place.slot)

    def state_of(self, job: Job) -> Slots:
        """Return a running or waiting job's parameters and optimizer state, in NumPy arrays."""
        return host_state(self.snapshot(job)) if job in self.layout.places else self._restored[job]

    def adapter_of(self, job: Job) -> Adapter:
        """Return a job's adapter as it is now."""
        return Adapter(job.initial.config, self.state_of(job).params)

    # Steps

    def forward_backward(self, rows: Mapping[Job, Sequence[DocumentRow]], loss: str = "cross_entropy") -> None:
        """Add the gradients, losses and weights of rows to what jobs have gathered for their next update.

        Losses are summed here, and divided by the sum of the weights once, in ``optim_step``: calls before it are
        micro-batches of one update, of one loss or several.

        Args:
            rows: of each job, each a list of documents; one micro-batch.
            loss: a name of ``train.losses``.

        Raises:
            ConfigError: if there is no such loss, a job is not running, or a row does not fit.
        """
        self.admit()
        micro = self.prepare(rows, loss)
        args = self._base, micro.params, micro.sums, micro.batch, micro.dropout_J
        accumulate, after = functools.partial(self.programs.accumulate, loss=micro.loss), self._after(micro)
        # As in ``optim_step``: the sums are donated.
        self._added, self._gathered, self._tokens, self._padded_tokens = accumulate(*args), *after
        self._settle()

    def score(self, rows: Mapping[Job, Sequence[DocumentRow]]) -> dict[Job, list[list[np.ndarray]]]:
        """Return the log-probabilities of documents' tokens under jobs' adapters as they are now, without dropout.

        Rows are as ``forward_backward`` takes them. The answer has a float32 array ``[S]`` for each document of each
        row; 0 where the document's weight is.
        """
        self.admit()
        micro = self.prepare(rows)
        return by_document(jax.device_get(self.programs.score(self._base, micro.params, micro.batch)), rows)

    def prepare(self, rows: Mapping[Job, Sequence[DocumentRow]], loss: str = "cross_entropy") -> MicroBatch:
        """Return what ``forward_backward`` would compute, for who computes it otherwise (``train/coserve.py``).

        One at a time: ``gather`` takes its sums, before anything else is prepared or an update is started.
        """
        found = find_loss(loss)
        self._settle()
        for job, own in rows.items():
            self._check_rows(job, own, found)
        parts = [job.rows_in(self.slot_of(job), own, self._gathered.get(job, 0)) for job, own in rows.items()]
        if not any(part.rows for part in parts):
            raise ConfigError("there are no rows; give each job a list of rows, and each row a list of documents")
        params = tuple(slots.params for slots in self._state)
        tokens = sum(len(document) for part in parts for row in part.rows for document in row)
        return MicroBatch(
            self.layout.groups, params, self._collate(parts, found), self._dropout(), found, self._sums, list(rows),
            tokens,
        )  # fmt: skip

    def gather(self, micro: MicroBatch, sums: Sums) -> None:
        """Take the sums of a micro-batch: those that it was prepared with, and its own."""
        self._sums, self._gathered, self._tokens, self._padded_tokens = sums, *self._after(micro)

    def _after(self, micro: MicroBatch) -> tuple[dict[Job, int], int, int]:
        """Return what jobs have gathered with a micro-batch, and the tokens of all of it."""
        gathered = self._gathered | {job: self._gathered.get(job, 0) + 1 for job in micro.jobs}
        return gathered, self._tokens + micro.tokens, self._padded_tokens + micro.batch.tokens_BS.size

    def optim_step(
        self, jobs: Sequence[Job] | None = None, numbers: Mapping[Job, Numbers] | None = None
    ) -> StepResult | None:
        """Start an update by what jobs have gathered; return the results of the update before, if there was one.

        Args:
            jobs: that step; None: all that have gathered something. What others have gathered stays.
            numbers: of the optimizer, by job, in place of those of its own configuration and schedule.

        Raises:
            ConfigError: if a job has gathered nothing.
        """
        self._settle()
        jobs = list(dict.fromkeys(self._gathered if jobs is None else jobs))
        idle = [job.name for job in jobs if job not in self._gathered]
        if idle:
            raise ConfigError(f"{idle[0]!r} has gathered no gradients; call forward_backward with rows of it first")
        if not jobs:
            return self.finish()
        numbers = {job: job.numbers() for job in jobs} | dict(numbers or {})
        sums, *rest = self._split_sums(jobs)
        args = self._state, sums, stacked(self.layout, numbers)
        entries = [(job, self.slot_of(job), job.step, float(numbers[job].learning_rate)) for job in jobs]
        after = {
            "_sums": rest[0], "_gathered": rest[1], "_tokens": 0, "_padded_tokens": 0,
            "_entries": Entries(entries, self._tokens, self._padded_tokens),
        }  # fmt: skip
        # The state is donated: the call and what follows from it are one line, so that nothing comes between them.
        vars(self).update(after, _updated=self.programs.update(*args))
        self._settle()
        return self._fetched(self._pending[:-1])

    def _settle(self) -> None:
        """Let clocks and results know of the update that was made, also if the call that made it was cut off.

        Raises:
            PreftError: if the state was lost then.
        """
        if self._added is not None:
            self._sums = sums_of(self._added, tuple(slots.params for slots in self._state))
            self._added = None
        if self._updated is not None and self._entries is not None:
            self._state, report = updated_of(self._updated, self._state)
            for job, _, step, _ in self._entries.jobs:
                job.step = step + 1
            if all(pending.report.loss_J is not report.loss_J for pending in self._pending):
                self._pending = (*self._pending, Pending(report, self._entries))
            self._updated = None
        if is_donated(jax.tree.leaves(slots.params)[0] for slots in self._state):
            raise PreftError(
                "the trainer was interrupted in the middle of an update, and its state is lost; make another one, from "
                "the last checkpoint or adapter"
            )
        if is_donated(jax.tree.leaves(self._sums)):
            self._sums, self._gathered = None, {}
            raise PreftError(
                "the trainer was interrupted in the middle of forward_backward, and what was gathered is lost; give "
                "the rows of this update again"
            )

    def step(self) -> StepResult | None:
        """Start the next update of all running jobs; return the results of the one before, if there was one.

        Raises:
            ConfigError: if a job has no examples of its own.
        """
        self.admit()
        jobs = [job for job in self.layout.places if not job.done]
        if not jobs:
            return self.finish()
        clocks = {job: job.step for job in jobs}
        if self._began[1] != clocks:  # Else the last call was cut off, and this one goes on where it was.
            self._began = dict(self._gathered), clocks
        done = {job: max(0, self._gathered.get(job, 0) - self._began[0].get(job, 0)) for job in jobs}
        for rows in micro_batches(jobs, done):
            self.forward_backward(rows)
        return self.optim_step(jobs)

    @property
    def started(self) -> Any:
        """Arrays that are there when the last update started is over; None if its results were taken."""
        return self._pending[-1].report if self._pending else None

    def release(self, job: Job) -> Slots:
        """Let a job leave, running or waiting, and return its state; what it has gathered is dropped."""
        state = self.state_of(job)
        self._drop_sums(job)
        if job in self.layout.places:
            self.layout = self.layout.without(job)
        else:
            self._waiting.remove(job)
            del self._restored[job]
        return state

    def forget_gathered(self) -> None:
        """Drop what jobs have gathered for their next updates."""
        self._sums, self._added, self._gathered, self._tokens, self._padded_tokens = None, None, {}, 0, 0

    def wait(self) -> None:
        """Wait for the last update; raises what it failed with, and ``PreftError`` if the state was lost."""
        self._settle()
        jax.block_until_ready(self._state)

    def forget_states(self) -> list[Job]:
        """Let the running jobs leave without their states, which a failed update has spoiled; return the jobs."""
        jobs = self.running
        self.layout, self._state, self._pending, self._updated = Layout(), (), (), None
        self.forget_gathered()
        return jobs

    def requeue(self) -> None:
        """Let the running jobs wait again, with their states and before those that wait; no group is left."""
        self._settle()
        restored = {job: self.state_of(job) for job in self.running} | self._restored
        after = {"layout": Layout(), "_state": (), "_restored": restored, "_waiting": collections.deque(restored)}
        self.forget_gathered()
        vars(self).update(after)

    def finish(self) -> StepResult | None:
        """Return the results of the last update started."""
        self._settle()
        return self._fetched(self._pending)

    def _fetched(self, pending: Sequence[Pending]) -> StepResult | None:
        """Return the results of the oldest updates: of one, unless a call before was cut off."""
        if not pending:
            return None
        results = [result for one in pending for result in results_of(one)]
        for result in results:
            if not result.finite and result.job.failed is None:
                self._fail(result)
        self._pending = self._pending[len(pending) :]
        tokens, padded = sum(one.entries.tokens for one in pending), sum(one.entries.padded_tokens for one in pending)
        return StepResult(results, tokens, padded)

    def _fail(self, result: Result) -> None:
        """Give a job up whose loss, gradient or update is no number; that update was not made."""
        finite = {"loss": np.isfinite(result.loss), "gradient": np.isfinite(result.grad_norm), "updated adapter": False}
        what = next(name for name, good in finite.items() if not good)
        result.job.failed = (
            f"the {what} is not finite at step {result.step} ({result.loss:g}, gradient norm {result.grad_norm:g}); "
            "lower learning_rate, raise warmup_steps, or look at the data of this step"
        )
        result.job.step = result.step - 1
        self._drop_sums(result.job)

    def _check_rows(self, job: Job, rows: Sequence[DocumentRow], loss: Loss) -> None:
        if job not in self.layout.places:
            raise ConfigError(
                f"{job.name!r} has no slot: it was not added, was released, or waits because max_jobs is "
                f"{self.options.max_jobs}; running: {', '.join(one.name for one in self.layout.places) or 'none'}"
            )
        check_rows(job, rows, loss, self.model.config.vocab_size)

    # What is gathered

    def _own_sums(self, job: Job) -> _Own:
        assert self._sums is not None
        place, slot, sums = self.layout.places[job], self.slot_of(job), self._sums
        grads = jax.tree.map(lambda leaf: leaf[place.slot], sums.grads[place.group])
        return _Own(grads, *jax.tree.map(lambda leaf_J: leaf_J[slot], tuple(sums[1:])))

    def _joined(self, own: Mapping[Job, _Own], layout: Layout, state: State) -> Sums:
        """Return the sums of the slots of a layout, from those of each job; zeros elsewhere."""
        num_slots = sum(group.size for group in layout.groups)
        grads = [jax.tree.map(jnp.zeros_like, slots.params) for slots in state]
        rest = jax.tree.map(lambda leaf: jnp.zeros(num_slots, leaf.dtype), next(iter(own.values()))[1:])
        for job, some in own.items():
            place, slot = layout.places[job], layout.slot_of(job)
            grads[place.group] = jax.tree.map(
                lambda stack, leaf, at=place.slot: stack.at[at].set(leaf), grads[place.group], some.grads
            )
            rest = jax.tree.map(lambda leaf_J, leaf, at=slot: leaf_J.at[at].set(leaf), rest, some[1:])
        return Sums(tuple(grads), *rest)

    def _split_sums(self, jobs: Sequence[Job]) -> tuple[Sums, Sums | None, dict[Job, int]]:
        """Return the sums for an update of these jobs, and those of the others with what these have gathered."""
        assert self._sums is not None
        sums = self._sums
        others = {job: self._own_sums(job) for job in self._gathered if job not in jobs}
        if others:
            # A slot whose count is zero keeps what it has.
            stays_J = np.isin(np.arange(len(sums.count_J)), [self.slot_of(job) for job in others])
            sums = sums._replace(count_J=jnp.where(stays_J, 0.0, sums.count_J))
        rest = self._placement.put_replicated(self._joined(others, self.layout, self._state)) if others else None
        return sums, rest, {job: count for job, count in self._gathered.items() if job in others}

    def _drop_sums(self, job: Job) -> None:
        if job in self._gathered:
            self._sums, self._gathered = self._split_sums([job])[1:]

    # Arrays

    def num_rows(self, jobs: Iterable[Job], given: int = 0) -> tuple[int, int]:
        """Return the rows of a micro-batch while these jobs run, and the most that one has had.

        ``given``: rows that it must have room for. There are few sizes: a job that ends makes no program each time.
        """
        need, shards = sum(job.config.batches.batch_size for job in jobs), self._placement.num_shards
        need = need if given <= need else bucket(given)
        need = -(-need // shards) * shards
        most = max(self._most_rows, need)
        return most if 2 * need > most else bucket(need, shards), most

    @property
    def state(self) -> State:
        """The groups' states, on the device; an update that is started donates them."""
        return self._state

    def _collate(self, parts: Sequence[Rows], loss: Loss) -> Batch:
        num_rows, self._most_rows = self.num_rows(self.running, sum(len(part.rows) for part in parts))
        batch = collate(
            parts,
            num_rows=num_rows,
            max_length=max(job.config.batches.max_length for job in self.layout.places),
            packed=any(job.config.batches.packing for job in self.layout.places)
            or any(len(row) > 1 for part in parts for row in part.rows),
            fields=loss.needs,
        )
        return self._placement.put_rows(batch)

    def _dropout(self) -> np.ndarray | None:
        rates = {job: job.initial.config.dropout for job in self.running}
        if not any(rates.values()):
            return None
        dropout = np.zeros(sum(group.size for group in self.layout.groups), np.float32)
        for job, rate in rates.items():
            dropout[self.slot_of(job)] = rate
        return dropout

    # Evaluation

    def evaluate(self, job: Job, examples: Sequence[Example]) -> tuple[float, int]:
        """Return the mean loss of a running job's adapter on examples, and the number of learned tokens."""
        total = count = 0.0
        slot = self.slot_of(job)
        for params, batch in self.evaluation(job, examples):
            loss_J, count_J = jax.device_get(self.programs.evaluate(self._base, params, batch))
            total, count = total + float(loss_J[slot]), count + float(count_J[slot])
        return total / max(count, 1), int(count)

    def evaluation(self, job: Job, examples: Sequence[Example]) -> Iterator[tuple[tuple[Any, ...], Batch]]:
        """Yield parameters and batches of what ``evaluate`` computes, for who computes it otherwise."""
        size, slot = job.config.batches.batch_size, self.slot_of(job)
        size = -(-size // self._placement.num_shards) * self._placement.num_shards
        params = tuple(slots.params for slots in self._state)
        order = sorted(examples, key=len)
        for at in range(0, len(order), size):
            rows = job.rows_in(slot, [[example] for example in order[at : at + size]])
            batch = collate([rows], num_rows=size, max_length=job.config.batches.max_length, packed=False)
            yield params, self._placement.put_rows(batch)
