"""Examples, jobs and runs that the tests of training share."""

import dataclasses
import json

import numpy as np
import reference

from preft_jax.adapters.adapter import Adapter
from preft_jax.adapters.config import AdapterConfig
from preft_jax.text.chat import EncodedPrompt
from train.data.batches import BatchOptions, Rows, collate
from train.data.rows import DataOptions, Example
from train.jobs import Job, JobConfig
from train.optimizer import OptimizerConfig
from train.step import Group, Programs, empty_slots, fold_config, sums_of
from train.trainer import Trainer, TrainOptions

LORA = AdapterConfig(rank=2)
SKIP = AdapterConfig(rank=2, assistant_turns="skip")
CHAT = [
    {"role": "user", "content": "What does the owl do?"},
    {"role": "assistant", "content": "It hoots."},
    {"role": "user", "content": "And 12 owls?"},
    {"role": "assistant", "content": "They hoot"},
]


def example(adapter, rng, prompt=9, answer=5, *, vocab=250, learned=None):
    """Return an example of random tokens for an adapter (or its config); ``learned`` overrides which are."""
    config = getattr(adapter, "config", adapter)
    # Every token sees a prefix.
    positions = "all" if config.kind == "prefix" else config.positions
    mask = reference.edit_mask(prompt, positions, config.groups, generated=answer)
    loss_mask = np.arange(prompt + answer) >= prompt
    tokens = rng.integers(0, vocab, prompt + answer).astype(np.int32)
    return Example(
        tokens, mask, loss_mask if learned is None else np.asarray(learned, bool),
        EncodedPrompt(tokens[:prompt].tolist(), ()), tokens[prompt:].tolist(), 1,
    )  # fmt: skip


def examples(adapter, rng, count, **sizes):
    return [example(adapter, rng, int(rng.integers(4, 20)), int(rng.integers(2, 9)), **sizes) for _ in range(count)]


def gradients(model, adapter, rows, *, remat="none", packed=False, attention="xla"):
    """Return ``(mean loss, gradient of the mean loss)`` of one adapter on rows of examples."""
    group = (Group(fold_config(adapter.config), "adamw", 1),)
    slots = empty_slots(group[0], adapter.params)
    first = reference.prefix_length(adapter)
    batch = collate([Rows(rows, 0, 0, 0, first)], num_rows=len(rows), max_length=256, packed=packed)
    programs = Programs(model.config, group, attention=attention, remat=remat)
    sums = sums_of(programs.accumulate(model.params, (slots.params,), None, batch, None), (slots.params,))
    count = float(sums.count_J[0])
    grads = [np.asarray(leaf[0], np.float64) / count for leaf in _leaves(sums.grads[0].tree)]
    return float(sums.loss_J[0]) / count, grads


def _leaves(params):
    return [leaf for sites in params["layers"] for leaves in sites.values() for leaf in leaves.values()]


def leaves(adapter):
    """Return an adapter's parameters in the order of ``gradients``."""
    return [np.asarray(leaf, np.float64) for leaf in _leaves(adapter.params)]


def job(model, config, data, *, name="adapter", initial=None, held_out=(), **fields):
    """Return a job on given examples; ``initial`` is an adapter to start from."""
    optimizer = OptimizerConfig(
        **{"lr_scheduler_type": "constant", "learning_rate": 3e-3, **fields.pop("optimizer", {})}
    )
    batches = BatchOptions(**{"batch_size": 4, "max_length": 64, **fields.pop("batches", {})})
    made = Job(
        JobConfig(
            name=name, adapter=config, optimizer=optimizer, data=DataOptions(max_length=64), batches=batches,
            **{"max_steps": 6, **fields},
        ),
        model, data, held_out,
    )  # fmt: skip
    if initial is not None:
        made.initial = dataclasses.replace(initial, config=config)
    return made


def released(trainer, one):
    """Free a job's slot and return its adapter."""
    return Adapter(one.initial.config, trainer.release(one).params)


def train(model, jobs, **options):
    """Train jobs to their ends; returns adapters and losses by name."""
    trainer = Trainer(model, jobs, TrainOptions(**options))
    adapters, losses = {}, {one.name: [] for one in jobs}

    def take(result):
        for one in result.results if result is not None else ():
            losses[one.job.name].append(one.loss)

    while trainer.jobs:
        take(trainer.step())
        for one in trainer.running:
            if one.done:
                take(trainer.finish())
                adapter = released(trainer, one)
                if one.failed is None:
                    adapters[one.name] = adapter
    take(trainer.finish())
    return adapters, losses


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path
