"""A job: one adapter to train, with its own data, optimizer and clock. Host state only."""

import dataclasses
import functools
import hashlib
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from preft_jax.adapters.adapter import Adapter
from preft_jax.adapters.config import AdapterConfig
from preft_jax.adapters.init import init_adapter
from preft_jax.errors import ConfigError
from preft_jax.frozen import FrozenDict
from preft_jax.loading import Model
from preft_jax.prefix import text_prefix
from train.data.batches import BatchOptions, Row, Rows, plan_epoch
from train.data.documents import Document
from train.data.rows import DataOptions, Example
from train.optimizer import Numbers, OptimizerConfig, numbers
from train.run.start import load_start
from train.step import Group, Slots, empty_slots, fold_config, tree_slots, unstacked


@dataclasses.dataclass(frozen=True, kw_only=True)
class JobConfig:
    """What one adapter is trained on and how.

    Attributes:
        name: of the adapter.
        dataset: a file, a folder or a name of the Hub, see ``files.open_rows``; None takes the built-in task.
        eval_dataset: the same for what is held out; None evaluates nothing, or the built-in task's own part for that.
        dataset_config: configuration of a dataset that has several.
        dataset_train_split: split that is trained on; None is ``train``.
        dataset_test_split: split that is held out; None is ``test``, and of a file all of it.
        adapter: kind, rank, positions and so on of a new adapter.
        init_from: directory of an adapter to start from, in place of a new one.
        prefix_text: what a new prefix begins as (``text_prefix``); None: a text for any task.
        asked: with ``init_from``, the fields of ``AdapterConfig`` that are asked for; others are those of the adapter
            there, see ``start.start_config``.
        optimizer: see there.
        data: how lines become examples.
        batches: how examples become batches.
        num_train_epochs: passes over the data, fractions allowed; ``max_steps`` overrides it if positive.
        max_steps: updates.
        gradient_accumulation_steps: micro-batches of an update; an epoch's last update takes what is left.
    """

    name: str = "adapter"
    dataset: str | None = None
    eval_dataset: str | None = None
    dataset_config: str | None = None
    dataset_train_split: str | None = None
    dataset_test_split: str | None = None
    adapter: AdapterConfig = AdapterConfig()
    init_from: Path | None = None
    prefix_text: str | None = None
    asked: Mapping[str, Any] = FrozenDict()
    optimizer: OptimizerConfig = OptimizerConfig()
    data: DataOptions = DataOptions()
    batches: BatchOptions = BatchOptions()
    num_train_epochs: float = 3.0
    max_steps: int = -1
    gradient_accumulation_steps: int = 1

    def __post_init__(self) -> None:
        object.__setattr__(self, "asked", FrozenDict(sorted(self.asked.items())))  # Their order does not count.
        if not self.name or "/" in self.name or self.name.startswith("."):
            raise ConfigError(f"the name {self.name!r} is not one of a directory; give letters, digits and hyphens")
        if self.max_steps <= 0 and not 0 < self.num_train_epochs < float("inf"):
            raise ConfigError(f"num_train_epochs is {self.num_train_epochs}; give a number above 0, or max_steps")
        if self.adapter.alpha == 0:
            raise ConfigError("alpha is 0, so the adapter would do nothing; give a number above 0, or leave it out")
        if self.prefix_text is not None and (self.init_from is not None or self.adapter.kind != "prefix"):
            raise ConfigError("prefix_text is what a new adapter of kind 'prefix' begins as; leave it out for others")
        if self.gradient_accumulation_steps < 1:
            raise ConfigError(f"gradient_accumulation_steps is {self.gradient_accumulation_steps}; give at least 1")


class Job:
    """A job's examples, plan and clock; ``initial`` is ``first_adapter``'s if it is None.

    A job without examples is trained on rows given to ``Trainer.forward_backward``; ``max_steps`` says how long.

    Attributes:
        step: updates done.
        total_steps: updates in all.
        initial: the adapter that it starts from.
        failed: why it was given up, or None.
    """

    def __init__(
        self,
        config: JobConfig,
        model: Model,
        examples: Sequence[Example],
        held_out: Sequence[Example] = (),
        initial: Adapter | None = None,
    ):
        self.config = config
        self.examples = examples
        self.held_out = held_out
        self.step = 0
        self.failed: str | None = None
        self.initial = first_adapter(config, model) if initial is None else initial
        self._lengths = [len(example) for example in examples]
        self._first: list[int] = [0]
        self._batches: list[int] = []
        self._planned: tuple[int, list[list[Row]]] | None = None
        self.total_steps = config.max_steps if config.max_steps > 0 else self._steps_of_epochs()
        self._rates = config.optimizer.learning_rates(self.total_steps)

    @property
    def name(self) -> str:
        """The adapter's name."""
        return self.config.name

    @property
    def done(self) -> bool:
        """Whether no update is left."""
        return self.failed is not None or self.step >= self.total_steps

    @functools.cached_property
    def data_digest(self) -> str:
        """SHA-256 (hex) of the examples."""
        sha = hashlib.sha256()
        for example in self.examples:
            for array in (example.token_ids, example.edit_mask, example.loss_mask):
                sha.update(array.shape[0].to_bytes(8, "little") + array.tobytes())
        return sha.hexdigest()

    def epoch_after(self, step: int) -> float:
        """Return the passes over the data that so many updates make."""
        epoch = self._epoch_of(max(0, step - 1))
        return epoch + (step - self._first[epoch]) / max(1, self._first[epoch + 1] - self._first[epoch])

    @property
    def count(self) -> int:
        """Micro-batches before the next update."""
        if not self.examples:
            return self.step * self.config.gradient_accumulation_steps
        epoch = self._epoch_of(self.step)
        into = (self.step - self._first[epoch]) * self.config.gradient_accumulation_steps
        return sum(self._batches[:epoch]) + into

    def micro_batches(self) -> list[list[Row]]:
        """Return the micro-batches of the next update: lists of rows, which are lists of indices of examples.

        Raises:
            ConfigError: if the job has no examples.
        """
        if not self.examples:
            raise ConfigError(f"{self.name!r} has no examples; give it some, or train it with forward_backward")
        epoch, size = self._epoch_of(self.step), self.config.gradient_accumulation_steps
        at = (self.step - self._first[epoch]) * size
        return self._plan(epoch)[at : at + size]

    def rows(self, micro_batch: Sequence[Row]) -> list[list[Example]]:
        """Return a micro-batch's examples, row by row."""
        return [[self.examples[i] for i in row] for row in micro_batch]

    def rows_in(self, slot: int, rows: Sequence[Sequence[Example | Document]], gathered: int = 0) -> Rows:
        """Return rows of documents for a micro-batch of the job, whose adapter is in a slot.

        ``gathered``: micro-batches of the next update that came before it.
        """
        first = self.initial.config.prefix_length
        return Rows(rows, slot, self.config.batches.seed, self.count + gathered, first)

    def numbers(self) -> Numbers:
        """Return the optimizer's numbers for the next update."""
        return numbers(self.config.optimizer, float(self._rates[min(self.step, self.total_steps - 1)]))

    def _plan(self, epoch: int) -> list[list[Row]]:
        if self._planned is None or self._planned[0] != epoch:
            self._planned = epoch, plan_epoch(self._lengths, self.config.batches, epoch)
        return self._planned[1]

    def _epoch_of(self, step: int) -> int:
        """Return the epoch of an update, planning epochs as far as needed."""
        while self._first[-1] <= step:
            self._batches.append(len(self._plan(len(self._first) - 1)))
            self._first.append(self._first[-1] + -(-self._batches[-1] // self.config.gradient_accumulation_steps))
        return int(np.searchsorted(self._first, step, side="right")) - 1

    def _steps_of_epochs(self) -> int:
        whole = int(self.config.num_train_epochs)
        while len(self._first) <= whole + 1:
            self._epoch_of(self._first[-1])
        part = self.config.num_train_epochs - whole
        return max(1, self._first[whole] + math.ceil(part * (self._first[whole + 1] - self._first[whole])))


def first_adapter(config: JobConfig, model: Model) -> Adapter:
    """Return the adapter that a job starts from, on this base model: a new one, or that of ``init_from``.

    Raises:
        AdapterError: if ``init_from`` holds no adapter of this base model.
        ConfigError: if something else is asked for than what that adapter is.
    """
    if config.init_from is None:
        adapter = _new_adapter(config, model)
    else:
        adapter = load_start(config.init_from, config.asked, model)
    return dataclasses.replace(
        adapter,
        config=dataclasses.replace(adapter.config, base_model=model.name or None, base_model_digest=model.digest),
    )


def _new_adapter(config: JobConfig, model: Model) -> Adapter:
    if config.adapter.kind == "prefix" and (model.tokenizer is not None or config.prefix_text is not None):
        return text_prefix(config.adapter, model, config.prefix_text)
    return init_adapter(config.adapter, model.config, jax.random.key(config.batches.seed))


def first_state(job: Job) -> Slots:
    """Return the parameters and the optimizer state of a job that was never updated, in NumPy arrays."""
    group = Group(fold_config(job.initial.config), job.config.optimizer.optim, 1)
    return host_state(unstacked(empty_slots(group, job.initial.params), 0))


def host_state(slots: Slots) -> Slots:
    """Return a job's parameters and optimizer state, flat on the device, as trees of NumPy arrays."""
    return tree_slots(jax.device_get(slots))
