"""Learned prefixes are trained as other adapters are; that their gradients are right is in test_gradients.py."""

import dataclasses

import numpy as np
import pytest
import train_cases as cases
from conftest import PREFIX

from preft_jax import ConfigError
from preft_jax.errors import PreftError
from preft_jax.prefix import text_prefix
from preft_jax.text.chat import EncodedPrompt
from train.data.batches import BatchOptions
from train.data.rows import Example
from train.jobs import JobConfig, first_adapter
from train.run.generation import answerable
from train.run.loading import load_jobs
from train.trainer import Trainer


def test_a_job_begins_as_a_text(lively):
    digest = first_adapter(JobConfig(adapter=PREFIX), lively).digest
    assert digest == text_prefix(PREFIX, lively).digest
    other = first_adapter(JobConfig(adapter=PREFIX, prefix_text="An owl hoots."), lively)
    assert other.digest == text_prefix(PREFIX, lively, "An owl hoots.").digest != digest
    mute = dataclasses.replace(lively, tokenizer=None)
    with pytest.raises(PreftError, match="tokenizer"):
        first_adapter(JobConfig(adapter=PREFIX, prefix_text="An owl hoots."), mute)
    with pytest.raises(ConfigError, match="prefix_text is what a new adapter of kind 'prefix' begins as"):
        JobConfig(prefix_text="An owl hoots.")


def test_its_positions_count(lively):
    """A row may have, and an answer leaves room in, the positions behind it."""
    adapter, room = (
        first_adapter(JobConfig(adapter=PREFIX), lively),
        lively.config.max_position_embeddings - PREFIX.rank,
    )
    none = np.zeros(0)
    rows = [Example(none, none, none, EncodedPrompt([1] * length, ()), [], 1) for length in (room - 1, room)]
    assert answerable(lively, adapter, rows) == rows[:1]
    assert answerable(lively, None, rows) == rows
    batches = BatchOptions(max_length=room + 1)
    with pytest.raises(ConfigError, match=f"the model has {room} positions behind a learned prefix of {PREFIX.rank}"):
        load_jobs([JobConfig(adapter=PREFIX, batches=batches)], lively, 1)


def test_training_lowers_the_loss_and_goes_on_bitwise_from_a_state(lively, rng):
    data = cases.examples(PREFIX, rng, 8)

    def make():
        return cases.job(lively, PREFIX, data, max_steps=12, optimizer={"learning_rate": 0.05})

    adapters, losses = cases.train(lively, [whole := make()])
    assert losses["adapter"][-1] < losses["adapter"][0] - 0.2
    trainer = Trainer(lively, [half := make()])
    for _ in range(5):
        trainer.step()
    trainer.finish()
    state = trainer.state_of(half)
    rest = Trainer(lively)
    again = make()
    again.step = half.step
    rest.add(again, state)
    while not again.done:
        rest.step()
    assert whole.step == again.step
    assert rest.adapter_of(again).digest == adapters["adapter"].digest
