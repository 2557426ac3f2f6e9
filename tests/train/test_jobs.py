"""A job's clock: how many updates, which micro-batches each takes, and at which learning rate."""

import dataclasses
import math

import jax
import numpy as np
import pytest
import train_cases as cases

import preft_jax
from preft_jax import AdapterConfig, ConfigError
from preft_jax.io.adapter_files import save_adapter
from train.jobs import JobConfig
from train.optimizer import SCHEDULES, OptimizerConfig

CONFIG = AdapterConfig(rank=1, targets=("q",), layers=(0,))


def job(tiny, rng, count, **fields):
    batch_size = fields.pop("batch_size", 1)
    data = [cases.example(CONFIG, rng, 3, 2) for _ in range(count)]
    made = {"max_steps": -1, "batches": {"batch_size": batch_size, **fields.pop("batches", {})}, **fields}
    return cases.job(tiny, CONFIG, data, **made)


def updates(made):
    """Return the micro-batches of every update, and the epoch before each."""
    taken = []
    while not made.done:
        taken.append((made.epoch_after(made.step), made.micro_batches()))
        made.step += 1
    return taken


@pytest.mark.parametrize(
    ("count", "batch_size", "accumulation", "epochs", "steps"),
    [
        (10, 1, 1, 1.0, 10),
        (10, 1, 1, 3.0, 30),
        (10, 4, 1, 1.0, 3),
        (10, 4, 1, 2.0, 6),
        (10, 1, 4, 1.0, 3),
        (10, 1, 4, 2.0, 6),
        (10, 2, 3, 2.0, 4),
        (10, 1, 1, 0.5, 5),
        (10, 1, 1, 2.3, 23),
        (8, 1, 2, 1.75, 7),
        (10, 64, 64, 1.0, 1),
        (10, 64, 64, 4.0, 4),
        (10, 1, 1, 0.001, 1),
    ],
)
def test_updates_follow_from_epochs(count, batch_size, accumulation, epochs, steps, tiny, rng):
    made = job(
        tiny, rng, count, batch_size=batch_size, gradient_accumulation_steps=accumulation, num_train_epochs=epochs
    )
    assert made.total_steps == steps
    assert len(updates(made)) == steps


def test_the_number_of_updates_overrides_epochs(tiny, rng):
    made = job(tiny, rng, 3, num_train_epochs=100.0, max_steps=5)
    assert made.total_steps == 5
    assert [epoch for epoch, _ in updates(made)] == pytest.approx([0, 1 / 3, 2 / 3, 1, 4 / 3])


def test_an_epochs_last_update_takes_what_is_left(tiny, rng):
    made = job(tiny, rng, 11, batch_size=2, gradient_accumulation_steps=4, num_train_epochs=2.0)
    taken = [micro_batches for _, micro_batches in updates(made)]
    assert [len(micro_batches) for micro_batches in taken] == [4, 2, 4, 2]
    for epoch in (taken[:2], taken[2:]):
        seen = [i for micro_batches in epoch for batch in micro_batches for row in batch for i in row]
        assert sorted(seen) == list(range(11))
    assert taken[:2] != taken[2:]


def test_accumulation_takes_the_same_rows_in_the_same_order(tiny, rng):
    plain = job(tiny, rng, 12, batch_size=2, num_train_epochs=2.0)
    together = job(tiny, rng, 12, batch_size=2, gradient_accumulation_steps=3, num_train_epochs=2.0)
    one, other = ([batch for _, taken in updates(made) for batch in taken] for made in (plain, together))
    assert one == other
    assert len(one) == 12


def test_a_job_that_is_set_to_an_update_goes_on_as_the_one_that_came_to_it(tiny, rng):
    fields = {"batch_size": 2, "gradient_accumulation_steps": 2, "num_train_epochs": 3.0, "batches": {"seed": 7}}
    taken = updates(job(tiny, rng, 9, **fields))
    for step in (1, 3, 4, 7, 8):
        resumed = job(tiny, rng, 9, **fields)
        resumed.step = step
        assert updates(resumed) == taken[step:]


def test_packed_rows_are_counted_as_they_are_packed(tiny, rng):
    made = job(tiny, rng, 12, batch_size=1, batches={"packing": True, "max_length": 20}, num_train_epochs=2.0)
    assert made.total_steps == 6
    for _, micro_batches in updates(made):
        assert [len(row) for batch in micro_batches for row in batch] == [4]


def test_rows_are_the_examples_of_their_indices(tiny, rng):
    made = job(tiny, rng, 5, batches={"packing": True, "max_length": 20})
    ((one, other),) = made.rows([[4, 2]])
    assert one is made.examples[4]
    assert other is made.examples[2]


def test_a_job_that_was_given_up_is_done(tiny, rng):
    made = job(tiny, rng, 5)
    assert not made.done
    made.failed = "its loss is no number"
    assert made.done


def rate(schedule, step, total, warmup, top):
    """Return transformers' learning rate of an update."""
    if schedule == "constant":
        return top
    if step < warmup:
        return top * step / max(1, warmup)
    part = (step - warmup) / max(1, total - warmup)
    return (
        top
        * {"constant_with_warmup": 1.0, "linear": 1 - part, "cosine": 0.5 * (1 + math.cos(math.pi * part))}[schedule]
    )


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize(
    ("total", "fields", "warmup"),
    [
        (20, {}, 0),
        (20, {"warmup_steps": 5}, 5),
        (20, {"warmup_ratio": 0.12}, 3),
        (20, {"warmup_ratio": 0.5, "warmup_steps": 2}, 2),
        (20, {"warmup_ratio": 1.0}, 20),
        (4, {"warmup_steps": 9}, 9),
        (1, {}, 0),
    ],
)
def test_learning_rates_are_those_of_transformers(schedule, total, fields, warmup, rng):
    top = float(rng.uniform(1e-5, 1e-2))
    config = OptimizerConfig(learning_rate=top, lr_scheduler_type=schedule, **({"warmup_ratio": 0.0} | fields))
    rates = config.learning_rates(total)
    assert rates.dtype == np.float32
    expected = [rate(schedule, step, total, warmup, top) for step in range(total)]
    np.testing.assert_allclose(rates, expected, rtol=1e-5, atol=1e-6 * top)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("fields", [{}, {"warmup_ratio": 1.0}, {"warmup_steps": 5}])
def test_a_run_of_one_update_has_no_warm_up(schedule, fields):
    config = OptimizerConfig(learning_rate=0.5, lr_scheduler_type=schedule, **fields)
    assert config.learning_rates(1).tolist() == [0.5]


def test_each_update_has_its_own_rate_of_all_updates_of_the_job(tiny, rng):
    optimizer = {"lr_scheduler_type": "linear", "learning_rate": 0.5, "warmup_steps": 2}
    made = job(tiny, rng, 4, num_train_epochs=2.0, optimizer=optimizer)
    found = []
    while not made.done:
        found.append(float(made.numbers().learning_rate))
        made.step += 1
    np.testing.assert_allclose(found, [rate("linear", step, 8, 2, 0.5) for step in range(8)], rtol=1e-6)
    assert float(made.numbers().learning_rate) == found[-1], "of a job that is done"


def test_the_first_adapter_follows_from_the_seed_and_knows_its_base(tiny, rng):
    one, same, other = (job(tiny, rng, 2, batches={"seed": seed}).initial for seed in (3, 3, 4))
    a, b, c = (np.asarray(adapter.params["layers"][0]["q"]["lora_a"]) for adapter in (one, same, other))
    np.testing.assert_array_equal(a, b)
    assert not np.array_equal(a, c)
    assert one.config == dataclasses.replace(CONFIG, base_model="tiny", base_model_digest=tiny.digest)


def test_a_job_starts_from_an_adapter_at_the_positions_that_are_asked_for(tiny, rng, tmp_path):
    before = preft_jax.random_adapter(AdapterConfig(rank=3, targets=("k",), positions="all"), tiny.config,
                                      jax.random.key(int(rng.integers(1000))))  # fmt: skip
    save_adapter(tmp_path / "before", before)
    asked = {"positions": "f2", "assistant_turns": "skip", "dropout": 0.5}
    made = cases.job(tiny, CONFIG, [cases.example(CONFIG, rng)], init_from=tmp_path / "before", asked=asked)
    config = made.initial.config
    assert (config.rank, config.targets) == (3, ("k",))
    assert (config.positions, config.assistant_turns, config.dropout) == ("f2", "skip", 0.5)
    assert (config.base_model, config.base_model_digest) == ("tiny", tiny.digest)
    for a, b in zip(jax.tree.leaves(made.initial.params), jax.tree.leaves(before.params), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize(
    "fields",
    [
        {"name": ""}, {"name": "a/b"}, {"name": "../a"}, {"num_train_epochs": 0.0}, {"num_train_epochs": -1.0},
        {"num_train_epochs": math.nan}, {"num_train_epochs": math.inf}, {"num_train_epochs": 0.0, "max_steps": 0},
        {"gradient_accumulation_steps": 0},
    ],
)  # fmt: skip
def test_jobs_that_cannot_run_are_refused_by_name(fields):
    with pytest.raises(ConfigError, match=next(iter(fields))):
        JobConfig(**fields)
    assert JobConfig(num_train_epochs=0.0, max_steps=1).max_steps == 1


def test_an_adapter_that_would_do_nothing_is_not_trained():
    with pytest.raises(ConfigError, match="alpha is 0, so the adapter would do nothing"):
        JobConfig(adapter=AdapterConfig(rank=2, alpha=0.0))
