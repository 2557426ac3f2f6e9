"""Hyperparameters of a job: OpenAI's, ``train.sft``'s, and what is allowed."""

from pathlib import Path

import pytest

from preft_jax.config import PRESETS
from preft_jax.errors import ConfigError
from serve.jobs import JobSpec
from train.service.loading import JobError
from train.service.options import ALLOWED, ServiceOptions, check_spec, in_fields, make_plan

pytestmark = pytest.mark.host

MODEL = PRESETS["tiny"]


def spec(hyperparameters=None, **fields):
    return JobSpec(
        **{"training_file": "file-1", "training_path": Path("rows"), "seed": 3,
           "hyperparameters": hyperparameters or {}, **fields}
    )  # fmt: skip


def plan(**hyperparameters):
    return make_plan("ftjob-1", spec(hyperparameters), MODEL, ServiceOptions())


def test_what_is_not_given_is_train_sfts_default_and_is_said():
    found = plan()
    config = found.config
    assert found.hyperparameters == {"n_epochs": 3, "batch_size": 8, "learning_rate_multiplier": 1}
    assert (config.name, config.batches.seed, config.num_train_epochs) == ("ftjob-1", 3, 3.0)
    assert (config.adapter.kind, config.adapter.rank, config.optimizer.learning_rate) == ("lora", 16, 1e-3)
    assert config.batches.max_length == config.data.max_length == MODEL.max_position_embeddings == 1024
    assert (found.eval_steps, found.save_steps, found.save_total_limit) == (50, 0, 3)
    assert plan(n_epochs="auto", batch_size=None).hyperparameters == found.hyperparameters


def test_openais_names_and_train_sfts_come_to_the_same():
    ours = plan(num_train_epochs=2, per_device_train_batch_size=4, learning_rate=2e-3, targets=["q", "v_proj"])
    theirs = plan(n_epochs=2, batch_size=4, learning_rate_multiplier=2.0, targets="q,v")
    assert ours.config == theirs.config
    assert ours.config.adapter.targets == ("q", "v")
    assert all(plan(targets=text).config.adapter.targets == ("q", "v") for text in ("q_proj v_proj", "q_proj, v"))
    assert {name: ours.hyperparameters[name] for name in ("n_epochs", "batch_size", "learning_rate_multiplier")} == {
        "n_epochs": 2, "batch_size": 4, "learning_rate_multiplier": 2,
    }  # fmt: skip
    assert plan(packing=True, shuffle=False, adapter_kind="loreft").config.batches.packing


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ({"n_epoch": 3}, r"unknown hyperparameter 'n_epoch' \(did you mean 'n_epochs'\?\); allowed: adam_beta1, "),
        ({"init_from": "/etc"}, "unknown hyperparameter 'init_from'"),
        ({"dataset": "x"}, "unknown hyperparameter 'dataset'"),
        ({"n_epochs": 51}, "n_epochs is 51; allowed: up to 50"),
        ({"n_epochs": 0}, "n_epochs is 0; give a number above 0, or 'auto'"),
        ({"n_epochs": float("nan")}, "n_epochs is nan; give a number of at least 0"),
        ({"n_epochs": "many"}, "n_epochs is 'many'; give a number"),
        ({"batch_size": 2.5}, "batch_size is 2.5; give an integer of at least 1"),
        ({"batch_size": True}, "batch_size is True; give an integer"),
        ({"batch_size": 65}, "batch_size is 65; allowed: up to 64"),
        ({"batch_size": 64, "gradient_accumulation_steps": 65}, "the rows of an update is 4160; allowed: up to 4096"),
        ({"batch_size": 4, "per_device_train_batch_size": 4}, "batch_size and per_device_train_batch_size are given"),
        ({"learning_rate_multiplier": -1}, "learning_rate_multiplier is -1; give a number of at least 0"),
        ({"learning_rate": "nan"}, "learning_rate is nan; give a number from 0.0 to inf"),
        ({"rank": "x"}, "hyperparameter rank: invalid int value: 'x'"),
        ({"rank": [1, 2]}, "hyperparameter rank: invalid int value: '1,2'"),
        ({"rank": {"a": 1}}, "hyperparameter rank: invalid int value"),
        ({"rank": True}, "rank is True; it takes a value"),
        ({"adapter_kind": "lorra"}, "hyperparameter adapter_kind: invalid choice: 'lorra'"),
        ({"layers": "0,99"}, "layers names layer 99; the base model has layers 0 to 2"),
        ({"max_length": 10**6}, "max_length is 1000000; allowed: up to 1024 with this model"),
        ({"max_steps": 10**6}, "the job has 1000000 updates; allowed: up to 100000"),
        ({"eval_steps": -1}, "eval_steps is -1; give a number of at least 0"),
        ({"save_total_limit": 0}, "save_total_limit is 0; give a number of at least 1"),
    ],
)
def test_what_cannot_work_is_refused_by_name(given, reason):
    with pytest.raises(ConfigError, match=reason):
        plan(**given)


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"suffix": "a:b"}, "suffix is 'a:b'; give 1 to 64 letters"),
        ({"suffix": ""}, "suffix is ''; give 1 to 64 letters"),
        ({"suffix": "x" * 65}, "give 1 to 64 letters"),
        ({"seed": -1}, "seed is -1; give an integer from 0 to 4294967295"),
        ({"seed": 1.0}, "seed is 1.0"),
        ({"priority": "high"}, "priority is 'high'; give an integer"),
        ({"metadata": {str(n): "" for n in range(17)}}, "metadata has 17 pairs; give up to 16"),
        ({"metadata": {"a": 1}}, "metadata has the pair 'a': 1; give texts"),
    ],
)
def test_other_fields_of_a_job_are_checked(fields, reason):
    check_spec(spec(suffix="my-model_1.0", metadata={"a": "b"}))
    with pytest.raises(ConfigError, match=reason):
        check_spec(spec(**fields))


def test_bounds_are_checked():
    with pytest.raises(ConfigError, match="max_jobs is 0; give at least 1"):
        ServiceOptions(max_jobs=0)


def test_flags_become_fields_and_others_stay():
    said = "raise --max-length, or give --truncate; a --name's file is --rank-2 or ----, choose another --output-dir"
    assert in_fields(said) == (
        "raise hyperparameters.max_length, or give hyperparameters.truncate; a --name's file is --rank-2 or ----, "
        "choose another --output-dir"
    )
    assert JobError("x", said).as_record()["message"] == in_fields(said)
    for name in ALLOWED:
        assert in_fields(f"(--{name.replace('_', '-')})") == f"(hyperparameters.{name})"
