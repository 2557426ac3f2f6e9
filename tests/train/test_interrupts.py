"""A KeyboardInterrupt at any line that training reaches: what goes on ends as what was never interrupted."""

import functools

import jax
import numpy as np
import pytest
from interrupts import Interrupt, moments
from train_cases import LORA, examples

from preft_jax import AdapterConfig, PreftError
from train import BatchOptions, Job, JobConfig, Trainer, trainer

STEPS = 3


def jobs(model):
    """Return new jobs of two groups, one with two micro-batches an update."""
    rng = np.random.default_rng(1)
    made = []
    for name, config, size in (("ann", LORA, 2), ("bob", AdapterConfig(kind="loreft", rank=2), 1)):
        config = JobConfig(
            name=name, adapter=config, max_steps=STEPS, gradient_accumulation_steps=size,
            batches=BatchOptions(batch_size=2),
        )  # fmt: skip
        made.append(Job(config, model, examples(config.adapter, rng, 4)))
    return made


def train(model, at=None):
    """Train to the end, with an interrupt at a line: adapters, the results by job and step, and where it came."""
    both = jobs(model)
    runs = Trainer(model, both)
    losses = {}
    with Interrupt(at) as interrupt:
        for _ in range(2):
            try:
                while not all(job.done for job in both):
                    note(runs.step(), losses)
                note(runs.finish(), losses)
            except KeyboardInterrupt:
                pass
    adapters = [runs.adapter_of(job).params for job in both]
    assert [job.step for job in both] == [STEPS, STEPS], interrupt.raised
    return adapters, losses, interrupt


def note(step, losses):
    for result in () if step is None else step.results:
        losses[result.job.name, result.step] = result.loss


@pytest.fixture(scope="module", autouse=True)
def _programs():
    """Let trainers share their programs: tracing them takes longer than the rest."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "Programs", functools.cache(trainer.Programs))
        yield


@pytest.fixture(scope="module")
def whole(lively):
    train(lively)  # Compiles.
    adapters, losses, _ = train(lively)
    assert len(losses) == 2 * STEPS
    _, _, counted = train(lively)
    return adapters, losses, counted.places


def check(model, whole, at):
    adapters, losses, interrupt = train(model, at)
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b, err_msg=interrupt.raised), adapters, whole[0])
    # The results that an interrupted call was about to return may be lost, and no others are.
    assert len(losses) >= 2 * STEPS - 2, interrupt.raised
    assert losses == {key: whole[1][key] for key in losses}, interrupt.raised
    return interrupt.raised


def test_an_interrupt_anywhere(lively, whole, rng):
    """Some of the lines, others with each seed; the slow test takes all."""
    some = rng.choice(moments(whole[2], rng), 40, replace=False)
    assert len({check(lively, whole, at) for at in some}) > 30


@pytest.mark.slow
def test_an_interrupt_at_every_line(lively, whole, rng):
    seen = {check(lively, whole, at) for at in moments(whole[2], rng)}
    assert seen == set(whole[2])


def test_what_is_lost_is_said(lively, monkeypatch):
    """An interrupt inside the device's call, which has taken the state and not given it back."""
    both = jobs(lively)
    runs = Trainer(lively, both)
    runs.step()
    update = runs.programs.update

    def cut(*args):
        update(*args)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(runs.programs, "update", cut)
        with pytest.raises(KeyboardInterrupt):
            runs.step()
    for over in (runs.step, runs.finish, lambda: runs.adapter_of(both[0])):
        with pytest.raises(PreftError, match="interrupted in the middle of an update, and its state is lost; make an"):
            over()


def test_gradients_that_are_lost_are_said_once(lively, monkeypatch):
    (ann, _), rows = jobs(lively), None
    runs = Trainer(lively, [ann])
    rows = ann.rows(ann.micro_batches()[0])
    runs.forward_backward({ann: rows})
    accumulate = runs.programs.accumulate

    def cut(*args, **options):
        accumulate(*args, **options)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(runs.programs, "accumulate", cut)
        with pytest.raises(KeyboardInterrupt):
            runs.forward_backward({ann: rows})
    with pytest.raises(PreftError, match="what was gathered is lost; give the rows of this update again"):
        runs.forward_backward({ann: rows})
    runs.forward_backward({ann: rows})
    runs.optim_step()
    assert np.isfinite(runs.finish().results[0].loss)
