"""Learned prefixes are trained as other adapters are; that their gradients are right is in test_gradients.py."""

import pytest
import train_cases as cases
from conftest import PREFIX

from preft_jax import ConfigError
from preft_jax.prefix import text_prefix
from train.jobs import JobConfig, first_adapter
from train.trainer import Trainer


def test_a_job_begins_as_a_text(lively):
    digest = first_adapter(JobConfig(adapter=PREFIX), lively).digest
    assert digest == text_prefix(PREFIX, lively).digest
    other = first_adapter(JobConfig(adapter=PREFIX, prefix_text="An owl hoots."), lively)
    assert other.digest == text_prefix(PREFIX, lively, "An owl hoots.").digest != digest
    with pytest.raises(ConfigError, match="prefix_text is what a new adapter of kind 'prefix' begins as"):
        JobConfig(prefix_text="An owl hoots.")


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
