"""Trains jobs beside each other on one base model: rows of all of them in each batch, a slot of a group for each."""

import collections
import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from preft_jax.adapters.adapter import Adapter
from preft_jax.device.mesh import Placement
from preft_jax.errors import ConfigError
from preft_jax.loading import Model
from preft_jax.models.attention import DenseKernel
from preft_jax.models.batch import bucket
from preft_jax.models.layer import Remat
from preft_jax.models.layout import fused_layout
from train.data.batches import Rows, collate
from train.data.rows import Example
from train.jobs import Job
from train.optimizer import Numbers
from train.step import Group, Programs, Report, Slots, empty_slots, fold_config


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


class Result(NamedTuple):
    """What one update of one job gave."""

    job: Job
    step: int
    loss: float
    grad_norm: float
    learning_rate: float
    finite: bool


class StepResult(NamedTuple):
    """What a step of all jobs gave: results by job, tokens of their examples, and tokens with padding."""

    results: list[Result]
    tokens: int
    padded_tokens: int


class _Place(NamedTuple):
    group: int
    slot: int


@dataclasses.dataclass
class _Pending:
    report: Report
    jobs: list[tuple[Job, int, int, float]]
    tokens: int
    padded_tokens: int


class Trainer:
    """Jobs, their states on the device, and the programs over them.

    ``step`` starts an update of every running job and returns the results of the update before, so that the device
    does not wait for the host; ``finish`` returns the last one's.
    """

    def __init__(
        self,
        model: Model,
        jobs: Sequence[Job] = (),
        options: TrainOptions = TrainOptions(),
        placement: Placement | None = None,
    ):
        self.model = model
        self.options = options
        self._placement = placement or Placement.single()
        self._base = self._placement.put_params(fused_layout(model.params, transpose=False))
        self._waiting: collections.deque[Job] = collections.deque()
        self._places: dict[Job, _Place] = {}
        self._groups: list[Group] = []
        self._state: list[Slots] = []
        self._restored: dict[Job, Slots] = {}
        self._pending: _Pending | None = None
        self._most_rows = 0
        for job in jobs:
            self.add(job)

    # Jobs

    @property
    def jobs(self) -> list[Job]:
        """Jobs that are trained or wait."""
        return [*self._places, *self._waiting]

    @property
    def running(self) -> list[Job]:
        """Jobs that have a slot: those that are trained, and those that are done and not released."""
        return list(self._places)

    def add(self, job: Job, state: Slots | None = None) -> None:
        """Let a job join, now or once there is room; ``state`` is what ``state_of`` gave for it earlier."""
        if job.name in {other.name for other in self.jobs}:
            raise ConfigError(f"two jobs have the name {job.name!r}; give each its own")
        if state is not None:
            self._restored[job] = state
        self._waiting.append(job)

    def admit(self) -> None:
        """Give waiting jobs a slot, as many as may be trained at a time: a free one of their group, or a new one."""
        grown = False
        while self._waiting and (not self.options.max_jobs or len(self._places) < self.options.max_jobs):
            job = self._waiting.popleft()
            key = fold_config(job.initial.config), job.config.optimizer.optim
            group = next((i for i, g in enumerate(self._groups) if (g.config, g.optim) == key), None)
            state = self._restored.pop(job, None) or _unstacked(empty_slots(Group(*key, 1), job.initial.params), 0)
            if group is None:
                self._drop_empty_groups()  # The programs are made anew in any case.
                group = len(self._groups)
                self._groups.append(Group(*key, 0))
                self._state.append(jax.tree.map(lambda leaf: jnp.asarray(leaf)[None][:0], state))
            taken = {place.slot for place in self._places.values() if place.group == group}
            slot = next(i for i in range(len(taken) + 1) if i not in taken)
            if slot == self._groups[group].size:
                grown = True
                self._groups[group] = dataclasses.replace(self._groups[group], size=slot + 1)
                self._state[group] = jax.tree.map(
                    lambda stack, own: jnp.concatenate([stack, jnp.asarray(own)[None]]), self._state[group], state
                )
            else:
                self._state[group] = jax.tree.map(
                    lambda stack, own, slot=slot: stack.at[slot].set(own), self._state[group], state
                )
            self._places[job] = _Place(group, slot)
        if grown:
            self._state = [self._placement.put_replicated(slots) for slots in self._state]
            self._programs = Programs(
                self.model.config,
                tuple(self._groups),
                attention=self._attention(),
                remat=self.options.gradient_checkpointing,
            )

    def _drop_empty_groups(self) -> None:
        kept = sorted({place.group for place in self._places.values()})
        self._groups, self._state = [self._groups[i] for i in kept], [self._state[i] for i in kept]
        self._places = {job: place._replace(group=kept.index(place.group)) for job, place in self._places.items()}

    def _attention(self) -> DenseKernel:
        if self.options.attention is not None:
            return self.options.attention
        return "cudnn" if jax.default_backend() == "gpu" and self._base["embed"].dtype != jnp.float32 else "xla"

    def _slot(self, job: Job) -> int:
        """Return a job's slot among those of all groups."""
        place = self._places[job]
        return sum(group.size for group in self._groups[: place.group]) + place.slot

    def state_of(self, job: Job) -> Slots:
        """Return a running or waiting job's parameters and optimizer state, in NumPy arrays."""
        if job in self._places:
            place = self._places[job]
            return jax.device_get(_unstacked(self._state[place.group], place.slot))
        key = fold_config(job.initial.config), job.config.optimizer.optim
        return self._restored.get(job) or jax.device_get(_unstacked(empty_slots(Group(*key, 1), job.initial.params), 0))

    def adapter_of(self, job: Job) -> Adapter:
        """Return a job's adapter as it is now."""
        return Adapter(job.initial.config, self.state_of(job).params)

    # Steps

    def step(self) -> StepResult | None:
        """Start the next update of all running jobs; return the results of the one before, if there was one."""
        self.admit()
        jobs = [job for job in self._places if not job.done]
        if not jobs:
            return self.finish()
        plans = {job: job.micro_batches() for job in jobs}
        sums, tokens, padded = None, 0, 0
        for number in range(max(map(len, plans.values()))):
            parts = []
            for job in jobs:
                if number < len(plans[job]):
                    rows = job.rows(plans[job][number])
                    tokens += sum(len(example) for row in rows for example in row)
                    parts.append(Rows(rows, self._slot(job), job.config.batches.seed, job.count + number))
            batch = self._collate(parts)
            padded += batch.tokens_BS.size
            params = tuple(slots.params for slots in self._state)
            sums = self._programs.accumulate(self._base, params, sums, batch, self._dropout())
        assert sums is not None
        updated, report = self._programs.update(tuple(self._state), sums, self._numbers())
        self._state = list(updated)
        entries = []
        for job in jobs:
            entries.append((job, self._slot(job), job.step, float(job.numbers().learning_rate)))
            job.step += 1
        before = self.finish()
        self._pending = _Pending(report, entries, tokens, padded)
        return before

    def release(self, job: Job) -> Slots:
        """Free a running job's slot and return its state."""
        state = self.state_of(job)
        del self._places[job]
        return state

    def finish(self) -> StepResult | None:
        """Return the results of the last update started."""
        pending, self._pending = self._pending, None
        if pending is None:
            return None
        report = jax.device_get(pending.report)
        results = [
            Result(
                job, step + 1, float(report.loss_J[slot]), float(report.grad_norm_J[slot]), rate,
                bool(report.finite_J[slot]),
            )
            for job, slot, step, rate in pending.jobs
        ]  # fmt: skip
        for result in results:
            if not result.finite and result.job.failed is None:
                self._fail(result)
        return StepResult(results, pending.tokens, pending.padded_tokens)

    def _fail(self, result: Result) -> None:
        """Give a job up whose loss, gradient or update is no number; that update was not made."""
        finite = {"loss": np.isfinite(result.loss), "gradient": np.isfinite(result.grad_norm), "updated adapter": False}
        what = next(name for name, good in finite.items() if not good)
        result.job.failed = (
            f"the {what} is not finite at step {result.step} ({result.loss:g}, gradient norm {result.grad_norm:g}); "
            "lower learning_rate, raise warmup_steps, or look at the data of this step"
        )
        result.job.step = result.step - 1

    def _collate(self, parts: Sequence[Rows]) -> Any:
        need = sum(job.config.batches.batch_size for job in self._places)
        need = -(-need // self._placement.num_shards) * self._placement.num_shards
        self._most_rows = max(self._most_rows, need)
        # Few sizes, so that a job that ends does not make a new program each time.
        num_rows = self._most_rows if 2 * need > self._most_rows else bucket(need, self._placement.num_shards)
        batch = collate(
            parts,
            num_rows=num_rows,
            max_length=max(job.config.batches.max_length for job in self._places),
            packed=any(job.config.batches.packing for job in self._places),
        )
        return self._placement.put_rows(batch)

    def _dropout(self) -> np.ndarray | None:
        rates = {job: job.initial.config.dropout for job in self._places}
        if not any(rates.values()):
            return None
        dropout = np.zeros(sum(group.size for group in self._groups), np.float32)
        for job, rate in rates.items():
            dropout[self._slot(job)] = rate
        return dropout

    def _numbers(self) -> tuple[Numbers, ...]:
        """Return each group's numbers, ``[n]``; a free slot's do not matter."""
        stacked = [[Numbers(*[np.float32(1)] * len(Numbers._fields))] * group.size for group in self._groups]
        for job, place in self._places.items():
            stacked[place.group][place.slot] = job.numbers()
        return tuple(Numbers(*map(np.stack, zip(*some, strict=True))) for some in stacked)

    # Evaluation

    def evaluate(self, job: Job, examples: Sequence[Example]) -> tuple[float, int]:
        """Return the mean loss of a running job's adapter on examples, and the number of learned tokens."""
        size, slot = job.config.batches.batch_size, self._slot(job)
        size = -(-size // self._placement.num_shards) * self._placement.num_shards
        params = tuple(slots.params for slots in self._state)
        total = count = 0.0
        order = sorted(examples, key=len)
        for at in range(0, len(order), size):
            rows = Rows([[example] for example in order[at : at + size]], slot, 0, 0)
            batch = collate([rows], num_rows=size, max_length=job.config.batches.max_length, packed=False)
            loss_J, count_J = jax.device_get(
                self._programs.evaluate(self._base, params, self._placement.put_rows(batch))
            )
            total, count = total + float(loss_J[slot]), count + float(count_J[slot])
        return total / max(count, 1), int(count)


def _unstacked(slots: Slots, slot: int) -> Slots:
    return jax.tree.map(lambda leaf: leaf[slot], slots)
