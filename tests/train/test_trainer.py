"""The trainer: the peer's numbers step for step, and jobs that do not notice each other."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
import train_cases as cases
from conftest import ADAPTER_CONFIGS

import preft_jax
from preft_jax import AdapterConfig
from preft_jax.errors import ConfigError
from preft_jax.io.adapter_files import load_adapter
from preft_jax.text.chat import EncodedPrompt
from train.data.rows import Example
from train.trainer import Trainer, TrainOptions

FIXTURES = Path(__file__).parents[1] / "fixtures"

ATOL = 2e-4
"""Of parameters after some updates of 3e-3: Adam divides gradients by their size, so that the rounding of small ones
counts; measured below 2e-5."""


def close(one, other, atol=ATOL):
    assert jax.tree.structure(one.params) == jax.tree.structure(other.params)
    for a, b in zip(jax.tree.leaves(one.params), jax.tree.leaves(other.params), strict=True):
        np.testing.assert_allclose(a, b, atol=atol)


@pytest.mark.parametrize("masked", [False, True])
def test_ordinary_lora_is_trained_as_peft_and_torch_do(masked):
    model = preft_jax.load_model(FIXTURES / "models" / "llama3")
    oracle = np.load(FIXTURES / "training" / "oracle.npz")
    initial = load_adapter(FIXTURES / "training" / "init", model)
    learned = np.arange(24) >= (10 if masked else 1)
    edited = np.zeros((24, 2), bool)
    edited[:, 0] = True
    rows = [Example(row, edited, learned, EncodedPrompt([0], ()), [], 1) for row in oracle["tokens"].reshape(-1, 24)]
    job = cases.job(
        model, initial.config, rows, initial=initial, max_steps=50, batches={"batch_size": 2, "shuffle": False},
        optimizer={"learning_rate": 5e-3, "weight_decay": 0.01, "max_grad_norm": 1.0},
    )  # fmt: skip
    trainer = Trainer(model, [job])
    results = [*[trainer.step() for _ in range(50)][1:], trainer.finish()]
    found = [result.results[0].loss for result in results]
    np.testing.assert_allclose(found, oracle["losses_masked" if masked else "losses"], atol=1e-4)
    if not masked:
        norms = [result.results[0].grad_norm for result in results]
        np.testing.assert_allclose(norms, oracle["grad_norms"], rtol=1e-4)
        close(cases.released(trainer, job), load_adapter(FIXTURES / "training" / "final", model), atol=1e-4)


MIXED = {
    "lora_pattern": (ADAPTER_CONFIGS["lora_pattern"], {"max_steps": 3, "batches": {"batch_size": 1}}),
    "direft_free": (
        ADAPTER_CONFIGS["direft_free"],
        {"max_steps": 4, "batches": {"batch_size": 2}, "gradient_accumulation_steps": 2},
    ),
    "loreft_f3l2": (ADAPTER_CONFIGS["loreft_f3l2"], {"max_steps": 3, "batches": {"batch_size": 5}}),
}
"""Where the first one ends the last one joins, which has most of the rows: batches have two sizes."""


def mixed(model, rng, **fields):
    """Return makers of jobs of several kinds, with data, lengths, rates and clocks of their own."""
    made = {}
    for i, (name, (config, own)) in enumerate(MIXED.items()):
        data = cases.examples(config, rng, 7)
        own = {**own, "optimizer": {"learning_rate": 1e-3 * (1 + i % 3)}, "batches": {**own["batches"], "seed": i}}
        made[name] = lambda name=name, config=config, data=data, own=own: cases.job(
            model, config, data, name=name, **own, **fields
        )
    return made


def test_jobs_together_end_as_each_alone(lively, rng):
    """Some finish before others; with room for two at a time, one joins while another runs."""
    make = mixed(lively, rng)
    alone = {name: cases.train(lively, [one()]) for name, one in make.items()}
    together, losses = cases.train(lively, [one() for one in make.values()], max_jobs=2)
    for name, (adapters, own) in alone.items():
        np.testing.assert_allclose(losses[name], own[name], atol=1e-5)
        close(together[name], adapters[name])
    assert np.ptp([own[name][0] for name, (_, own) in alone.items()]) > 0.01, "they differ"


def test_jobs_of_one_shape_share_a_program_and_free_slots_are_taken_again(lively, rng):
    config = AdapterConfig(rank=4, targets=("q", "down"))
    jobs = [
        cases.job(lively, config, cases.examples(config, rng, 6), name=f"{i}", max_steps=2 + i % 2, batches={"seed": i})
        for i in range(5)
    ]
    alone = [cases.train(lively, [_again(lively, one)])[0][one.name] for one in jobs]
    trainer = Trainer(lively, jobs, TrainOptions(max_jobs=2))
    done, programs = {}, set()
    while trainer.jobs:
        trainer.step()
        programs.add(id(trainer.programs))
        assert len(trainer.running) <= 2
        for one in trainer.running:
            if one.done:
                done[one.name] = cases.released(trainer, one)
    assert len(programs) == 1
    for one, expected in zip(jobs, alone, strict=True):
        close(done[one.name], expected)


def _again(model, job):
    return cases.job(
        model, job.config.adapter, job.examples, name=job.name, max_steps=job.config.max_steps,
        batches={"seed": job.config.batches.seed},
    )  # fmt: skip


def test_two_jobs_of_one_name_are_refused(lively, rng):
    config = AdapterConfig(rank=4, targets=("q", "down"))
    jobs = [cases.job(lively, config, cases.examples(config, rng, 2)) for _ in range(2)]
    with pytest.raises(ConfigError, match="two jobs have the name"):
        Trainer(lively, jobs)


def test_accumulated_micro_batches_are_one_batch(lively, rng):
    """Losses are divided by the tokens of all of them: short micro-batches weigh less."""
    config = AdapterConfig(rank=8, targets=("q", "down"))
    data = [cases.example(config, rng, 6, answer) for answer in (1, 2, 9, 12)]
    whole, split, single = (
        cases.train(
            lively, [cases.job(lively, config, data, max_steps=3, batches={"batch_size": size, "shuffle": False},
                               gradient_accumulation_steps=4 // size)],
        )
        for size in (4, 2, 1)
    )  # fmt: skip
    for adapters, losses in (split, single):
        np.testing.assert_allclose(losses["adapter"], whole[1]["adapter"], atol=1e-5)
        close(adapters["adapter"], whole[0]["adapter"])


def test_dropout_is_drawn_from_the_seed_alone(lively, rng):
    """Whatever job lies beside it and however far its rows are padded, and not at all where the rate is zero."""
    config = AdapterConfig(rank=8, dropout=0.5, targets=("q", "down"))
    data = cases.examples(config, rng, 6)

    def make(name="adapter", config=config, seed=5):
        return cases.job(lively, config, data, name=name, batches={"seed": seed}, max_steps=4)

    (one,) = cases.train(lively, [make()])[0].values()
    (same,) = cases.train(lively, [make()])[0].values()
    close(one, same, atol=0)
    long = AdapterConfig(rank=4, targets=("q",))
    long = cases.job(lively, long, [cases.example(long, rng, 40, 9)], name="long", max_steps=4)
    close(cases.train(lively, [long, make()])[0]["adapter"], one)
    plain = dataclasses.replace(config, dropout=0.0)
    (without,) = cases.train(lively, [make(config=plain)])[0].values()
    with pytest.raises(AssertionError):
        close(one, without)
    beside = cases.train(lively, [make("other"), make(config=plain)])[0]
    close(beside["adapter"], without)
    (other,) = cases.train(lively, [make(seed=6)])[0].values()
    with pytest.raises(AssertionError):
        close(one, other)


def test_lora_plus_moves_b_faster(lively, rng):
    config = AdapterConfig(rank=8, targets=("q", "down"))
    data = cases.examples(config, rng, 4)
    moved = {}
    for ratio in (1.0, 16.0):
        job = cases.job(lively, config, data, max_steps=1, optimizer={"lora_plus_ratio": ratio, "learning_rate": 1e-4})
        (adapter,) = cases.train(lively, [job])[0].values()
        start = job.initial.params["layers"][0]["q"]
        moved[ratio] = [
            np.abs(adapter.params["layers"][0]["q"][leaf] - start[leaf]).max() for leaf in ("lora_a", "lora_b")
        ]
    assert moved[16.0][0] == moved[1.0][0]
    np.testing.assert_allclose(moved[16.0][1], 16 * moved[1.0][1], rtol=1e-4)


def test_loreft_stays_orthonormal_where_it_is_used(lively, rng):
    config = AdapterConfig(kind="loreft", rank=6)
    (adapter,) = cases.train(lively, [cases.job(lively, config, cases.examples(config, rng, 6))])[0].values()
    r = np.asarray(preft_jax.fold(adapter)["layers"][1]["block"].b_RF)
    np.testing.assert_allclose(r @ r.T, np.eye(6), atol=1e-5)


@pytest.mark.parametrize("optim", ["adamw", "lion", "sgd"])
def test_every_optimizer_learns(optim, lively, rng):
    config = AdapterConfig(rank=8)
    data = [cases.example(config, rng)] * 2
    rate = {"adamw": 1e-2, "lion": 1e-3, "sgd": 0.1}[optim]
    job = cases.job(lively, config, data, max_steps=25, optimizer={"optim": optim, "learning_rate": rate})
    losses = cases.train(lively, [job])[1]["adapter"]
    assert losses[-1] < 0.6 * losses[0]


@pytest.mark.parametrize("max_length", [160, 320])
def test_jobs_together_whose_rows_are_not_whole_tiles(max_length, lively):
    """No tile of rank pages reaches into another adapter's row."""
    config = AdapterConfig(rank=4, targets=("q", "down"))

    def make(name, seed):
        data = [cases.example(config, np.random.default_rng(seed), max_length - 20, 9) for _ in range(4)]
        return cases.job(lively, config, data, name=name, max_steps=2, batches={"max_length": max_length, "seed": seed})

    alone = {name: cases.train(lively, [make(name, i)])[0][name] for i, name in enumerate("ab")}
    together, _ = cases.train(lively, [make(name, i) for i, name in enumerate("ab")])
    for name, expected in alone.items():
        close(together[name], expected)


def test_a_job_whose_loss_is_no_number_fails_alone(lively, rng):
    config = AdapterConfig(rank=8)
    good, bad = (
        cases.job(lively, config, cases.examples(config, rng, 6), name=name, max_steps=5, optimizer=optimizer)
        for name, optimizer in (("good", {}), ("bad", {"learning_rate": 1e30, "max_grad_norm": 0.0}))
    )
    (alone,) = cases.train(lively, [_again(lively, good)])[0].values()
    adapters, losses = cases.train(lively, [good, bad])
    assert set(adapters) == {"good"}
    close(adapters["good"], alone)
    assert "not finite at step" in bad.failed
    assert "learning_rate" in bad.failed
    assert np.isfinite(losses["good"]).all()


SHARDED = """
import json, sys
import numpy as np
import train_cases as cases
import preft_jax
from preft_jax import AdapterConfig
from preft_jax.device.compiles import CompileCounter
from preft_jax.device.mesh import Placement
from train.trainer import Trainer

model = preft_jax.load_model("tiny")
config = AdapterConfig(rank=8, targets=("q", "down"))
for mesh in sys.argv[1:]:
    job = cases.job(model, config, cases.examples(config, np.random.default_rng(0), 9), batches={"batch_size": 3})
    trainer = Trainer(model, [job], placement=Placement.parse(mesh))
    trainer.step()
    with CompileCounter() as compiles:
        losses = [trainer.step() for _ in range(5)] + [trainer.finish()]
    sharding = trainer._base["layers"][0]["down"].sharding
    parts = len({tuple(map(str, index)) for index in sharding.devices_indices_map((96, 64)).values()})
    sums = [float(np.abs(leaf).sum()) for leaf in cases.leaves(cases.released(trainer, job))]
    print(json.dumps({"losses": [one.results[0].loss for one in losses], "parts": parts, "sums": sums,
                      "compiles": compiles.count}))
"""


def test_eight_devices_train_as_one():
    """Each of them has an eighth of every weight, and nothing is compiled behind the first update."""
    here = str(Path(__file__).parents[1])
    flags = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
    environment = {
        **os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": os.pathsep.join([here, str(Path(here).parent), os.environ.get("PYTHONPATH", "")]),
    }  # fmt: skip
    command = [sys.executable, "-c", SHARDED, "fsdp=1", "fsdp=8"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    one, eight = map(json.loads, done.stdout.splitlines())
    assert (one["parts"], eight["parts"]) == (1, 8)
    assert (one["compiles"], eight["compiles"]) == (0, 0)
    np.testing.assert_allclose(eight["losses"], one["losses"], atol=1e-5)
    np.testing.assert_allclose(eight["sums"], one["sums"], rtol=1e-4)
