"""What is rehearsed before a job joins is all that its micro-batches call."""

import dataclasses

import numpy as np
import pytest
import train_cases as cases
from conftest import ADAPTER_CONFIGS

from preft_jax.config import PRESETS
from preft_jax.device.ahead import Rehearsal, shapes_of
from train.cutting import WindowOptions
from train.micro import micro_batches
from train.shapes import Rows, rehearse, rows_of, shapes_of_jobs
from train.trainer import Trainer
from train.window import Windowed

OPTIONS = WindowOptions(tokens=16)


@pytest.fixture(scope="module")
def lively(lively):
    """Return ``lively`` with one layer: programs are traced and none is compiled."""
    config = dataclasses.replace(lively.config, num_hidden_layers=1)
    return dataclasses.replace(lively, config=config, params={**lively.params, "layers": lively.params["layers"][:1]})


def make_jobs(model, kind):
    """Return jobs whose rows have several windows, of which some have no edits."""
    config, rng = ADAPTER_CONFIGS["lora"], np.random.default_rng(3)
    sizes = [(5, 9), (20, 9), (40, 8), (9, 40), (4, 4), (50, 9), (3, 49)]
    data = [cases.example(config, rng, *size) for size in sizes]
    fields = {"max_steps": 9, "batches": {"batch_size": 2, "max_length": 59}}
    one = cases.job(model, config, data, name="one", held_out=data[:3], **fields)
    if kind == "packed":
        fields["batches"] |= {"packing": True}
    return [one, cases.job(model, ADAPTER_CONFIGS["loreft_f3l2"], data[:2], name="other", **fields)]


@pytest.mark.parametrize("kind", ["padded", "packed"])
def test_all_that_micro_batches_call_is_rehearsed(kind, lively):
    jobs = make_jobs(lively, kind)
    trainer = Trainer(lively, jobs)
    trainer.admit()
    shapes = shapes_of_jobs(trainer.layout.groups, jobs, trainer.num_rows(jobs)[0], OPTIONS)
    windowed = Windowed(lively.config, trainer.layout.groups, OPTIONS)
    base, state = shapes_of(lively.params), shapes_of(trainer.state)
    with Rehearsal() as rehearsal:
        rehearse(shapes, windowed, trainer.programs, base, state)
        names = sorted(rehearsal.missing)
        lengths = set()
        for step in range(9):
            for job in jobs:
                job.step = step
            for rows in [*micro_batches(jobs), *micro_batches(jobs[:1])]:
                micro = trainer.prepare(rows)
                lengths.add(micro.batch.tokens_BS.shape[1])
                windowed.units(shapes_of(micro.params), micro.batch, micro.dropout_J).finish(base)
        for params, batch in trainer.evaluation(jobs[0], jobs[0].held_out):
            windowed.evaluation(shapes_of(params), batch).finish(base)
    assert sorted(rehearsal.missing) == names
    assert lengths <= shapes.rows.lengths
    assert lengths == {32, 64}
    assert {"forward", "backward", "update", "take", "add", "evaluate"} <= set(names)


def test_windows_that_are_always_edited_are_not_taken_for_plain(lively):
    config, rng = ADAPTER_CONFIGS["lora"], np.random.default_rng(0)
    job = cases.job(lively, config, [cases.example(config, rng, prompt, 8) for prompt in (40, 20, 50)], held_out=[])
    rows, held_out = rows_of(job, 32)
    assert rows == Rows(frozenset({64}), edited=frozenset({0, 1}), plain=frozenset({1}))
    assert held_out.lengths == frozenset()


def test_lengths_of_many_epochs_are_all_that_there_can_be(lively):
    config, rng = ADAPTER_CONFIGS["lora"], np.random.default_rng(0)
    data = [cases.example(config, rng, prompt, 4) for prompt in (5, 5, 200)]
    short = cases.job(lively, config, data, max_steps=2, batches={"batch_size": 3, "max_length": 256})
    long = cases.job(lively, config, data, max_steps=99, batches={"batch_size": 3, "max_length": 256})
    assert rows_of(short, 32)[0].lengths == {256}
    assert rows_of(long, 32)[0].lengths == {32, 64, 128, 256}
    assert rows_of(long, 32)[0].within(100).lengths == {32, 64, 128}


@pytest.mark.host
def test_an_accelerator_has_units_that_take_some_milliseconds(monkeypatch):
    """About the same weights a unit for every model, and few layers: the host starts kernels for each."""
    assert WindowOptions.suited(PRESETS["llama3-8b"]) == WindowOptions(), "on a CPU"
    monkeypatch.setattr("jax.default_backend", lambda: "gpu")
    layers = {name: WindowOptions.suited(PRESETS[name]).layers for name in PRESETS}
    assert layers["llama3-8b"] == 4
    assert layers["llama3-70b"] == 1
    assert layers["smollm2-135m"] == 8
    assert layers["tiny"] == PRESETS["tiny"].num_hidden_layers
