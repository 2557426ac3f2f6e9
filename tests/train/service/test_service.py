"""Fine-tuning jobs in an engine's process: as trained alone, whatever comes between.

Sums in another order move parameters after updates of 3e-3 by less than 2e-4, as in ``test_jobs``; a job alone in its
updates is bitwise what it is without a crash, on a CPU.
"""

import dataclasses
import json
import os
import shutil
import threading
import time

import jax
import numpy as np
import pytest
import service_cases as cases
import train_cases
from engine_outputs import TIGHT, advance, assert_as_alone, assert_released, request, some

from preft_jax.errors import AdapterError, ConfigError, LimitError
from preft_jax.io.adapter_files import load_adapter
from serve.engine.engine import Engine
from serve.jobs import OPEN, JobRecord
from train.checkpoint import CheckpointError
from train.service import results as results_module
from train.service.loading import load_job
from train.service.options import ServiceOptions, make_plan
from train.service.records import Records

STEPS = 5


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    return cases.write_rows(tmp_path_factory.mktemp("rows") / "rows.jsonl")


@pytest.fixture
def make(lively, tmp_path):
    """Return a function that makes services on the test's directory; they are closed at its end."""
    made = []

    def make(directory=tmp_path / "jobs", store=None, **options):
        service = cases.make_service(lively, directory, store, **options)
        made.append(service)
        return service, cases.Pump(service, lively)

    yield make
    for service in made:
        service.close()


def asked(name, **more):
    return {"lora": cases.LORA, "reft": cases.REFT}[name] | {"max_steps": STEPS} | more


@pytest.fixture(scope="module")
def alone(lively, rows, tmp_path_factory):
    """Return adapters and losses of the jobs, each trained without a service and without the others."""
    records = Records(tmp_path_factory.mktemp("alone"))
    adapters, losses = {}, {}
    for name in ("lora", "reft"):
        spec = cases.spec(rows, asked(name))
        service_plan = make_plan(name, spec, lively.config, ServiceOptions())
        entry = records.create(record_of(name, spec), {})
        job = load_job(entry, service_plan, lively, ServiceOptions())
        found, own = train_cases.train(lively, [job])
        adapters |= found
        losses |= own
    return adapters, losses


@pytest.fixture(scope="module")
def whole(lively, rows, alone, tmp_path_factory):
    """Return the adapter of the LoRA job of a service that nothing has disturbed."""
    service = cases.make_service(lively, tmp_path_factory.mktemp("whole"))
    job = service.create(cases.spec(rows, asked("lora")), owner=None)
    (record,) = cases.Pump(service, lively).to_end(job)
    service.close()
    assert record.status == "succeeded"
    found = saved(lively, service, job)
    assert_near(found, alone[0]["lora"])
    return found


def record_of(name, spec):
    return JobRecord(id=name, owner=None, model="tiny", spec=spec, status="queued", created_at=1)


def assert_near(adapter, other, atol=2e-4):
    for ours, expected in zip(jax.tree.leaves(adapter.params), jax.tree.leaves(other.params), strict=True):
        np.testing.assert_allclose(ours, expected, atol=atol)


def saved(model, service, record):
    """Return the adapter that a job left."""
    return load_adapter(service._entries[record.id].adapter, model)


def messages(service, record):
    return [event.message for event in reversed(service.events(record.id))]


def losses_of(service, record):
    metrics = [event.data for event in reversed(service.events(record.id)) if event.type == "metrics"]
    return [data["train_loss"] for data in metrics if "train_loss" in data]


def test_jobs_beside_requests_and_pauses_are_as_alone_and_so_are_requests(lively, alone, rows, adapters, make, rng):
    store = cases.make_store(lively)
    service, _ = make(store=store, max_jobs=2, checkpoint_steps=2)
    engine = Engine(lively, TIGHT, store=store, background=service.training, background_share=0.5)
    jobs = {name: service.create(cases.spec(rows, asked(name)), owner=name) for name in ("lora", "reft")}
    names = (None, "lora", "direft", None, "lora_r24", "loreft")
    requests = [request(some(rng, 5 + 3 * n), adapters.get(name), max_tokens=9) for n, name in enumerate(names)]
    wholes, ids, waiting = {}, [], list(requests)
    pauses = 0
    end = time.monotonic() + cases.PATIENCE
    while waiting or engine.has_work or any(service.get(job.id).finished_at is None for job in jobs.values()):
        assert time.monotonic() < end
        if waiting and rng.random() < 0.1:
            ids.append(engine.add(waiting.pop(0)))
        for job in jobs.values():
            status = service.get(job.id).status
            if status == "running" and rng.random() < 0.02 and pauses < 6:
                service.pause(job.id)
                pauses += 1
            elif status == "paused" and rng.random() < 0.1:
                service.resume(job.id)
        advance(engine, wholes)
        if not engine.has_work and engine.pause is None:
            time.sleep(0.002)
    assert_released(engine)
    for name, job in jobs.items():
        record = service.get(job.id)
        assert (record.status, record.step, record.error) == ("succeeded", STEPS, None)
        np.testing.assert_allclose(losses_of(service, job), alone[1][name], rtol=1e-4)
        assert_near(saved(lively, service, job), alone[0][name])
    for one, number in zip(requests, ids, strict=True):
        assert_as_alone(lively, one, [wholes[number, 0]])
    # The adapter is served the moment it is there, to its owner.
    named = store.get(service.get(jobs["lora"].id).fine_tuned_model)
    assert (named.name, named.owner) == (f"ft:tiny:lora:{jobs['lora'].id[-8:]}", "lora")
    tokens = some(rng, 9)
    number = engine.add(request(tokens, named))
    found = advance(engine, {}, 30)
    assert_as_alone(lively, request(tokens, saved(lively, service, jobs["lora"])), [found[number, 0]])


def test_a_job_goes_on_from_every_state_that_a_crash_can_leave(lively, whole, rows, make, tmp_path, rng, monkeypatch):
    """Each change of a name on disk is a moment of which a copy is taken; a service of any copy ends as the first."""
    copies, ours = [], tmp_path / "jobs"

    def copying(function):
        def call(*args, **kwargs):
            if str(ours) in str(args[0]):
                copies.append(tmp_path / f"copy-{len(copies)}")
                shutil.copytree(ours, copies[-1])
            return function(*args, **kwargs)

        return call

    store = cases.make_store(lively)
    service, pump = make(ours, store, checkpoint_steps=2)
    job = service.create(cases.spec(rows, asked("lora", save_steps=3)), owner="ann")
    cases.until(lambda: service.get(job.id).status != "validating_files")
    with monkeypatch.context() as patch:
        for name in ("rename", "replace"):
            patch.setattr(os, name, copying(getattr(os, name)))
        (record,) = pump.to_end(job)
        service.close()
    assert record.status == "succeeded"
    expected = saved(lively, service, job)
    assert expected.digest == whole.digest
    for copy in [*rng.choice(copies[:-4], 4, replace=False), *copies[-4:]]:
        again_store = cases.make_store(lively)
        again, pump = make(copy, again_store, checkpoint_steps=2)
        for name in (adapter.name for adapter in again_store.list()):
            assert name.startswith("ft:tiny:ann:")  # Whole ones only: the store has read them.
        (found,) = pump.to_end(job)
        assert dataclasses.replace(found, finished_at=0) == dataclasses.replace(record, finished_at=0)
        assert saved(lively, again, job).digest == expected.digest == again_store.get(found.fine_tuned_model).digest
        assert losses_of(again, job) == losses_of(service, job)
        (checkpoint,) = again.checkpoints(job.id)
        assert again_store.get(checkpoint.fine_tuned_model_checkpoint).digest
        again.close()
        assert not (copy / job.id / "state").exists()


def test_a_closed_service_goes_on_where_it_was(lively, whole, rows, make):
    service, pump = make(checkpoint_steps=100)
    job = service.create(cases.spec(rows, asked("lora")), owner=None)
    pump.learn(job, 2)
    pump.unit()
    pump.unit()  # An update is under way.
    service.close()
    assert service.training.next() is None
    learned = service.get(job.id).step
    assert learned >= 2
    again, pump = make(checkpoint_steps=100)
    assert again.get(job.id).status == "queued"
    (record,) = pump.to_end(job)
    assert f"Fine-tuning job started, going on after step {learned}" in messages(again, job)
    assert saved(lively, again, job).digest == whole.digest
    told = [event.data["trained_tokens"] for event in again.events(job.id) if "trained_tokens" in event.data]
    assert (record.trained_tokens, told[1]) == (told[0], 2 * told[3]), "an epoch of two updates has as many as another"


def test_a_paused_job_survives_a_restart_and_its_upload(lively, whole, rows, make, tmp_path):
    upload = shutil.copy(rows, tmp_path / "upload.jsonl")
    service, pump = make()
    job = service.create(cases.spec(tmp_path / "upload.jsonl", asked("lora")), owner=None)
    os.unlink(upload)
    pump.learn(job, 1)
    assert service.pause(job.id).status == "paused"
    with pytest.raises(ConfigError, match="the job is paused; this can be done to one that is queued"):
        service.pause(job.id)
    pump.until(lambda: not service._open[job.id].in_training)
    service.close()
    service, pump = make()
    assert service.get(job.id).status == "paused"
    for _ in range(5):
        assert not pump.unit()
    assert service.resume(job.id).status == "queued"
    pump.to_end(job)
    assert saved(lively, service, job).digest == whole.digest


def test_cancelled_jobs_leave_nothing_and_nobody_behind(lively, alone, rows, make):
    service, pump = make(max_jobs=2)
    names = ("lora", "reft", "reft", "lora")
    jobs = [service.create(cases.spec(rows, asked(name)), owner=str(n)) for n, name in enumerate(names)]
    pump.learn(jobs[1], 1)
    others = [service.create(cases.spec(rows, asked("lora")), owner="late")]
    for job in (jobs[1], jobs[3], *others):
        assert service.cancel(job.id).status == "cancelled"
        with pytest.raises(ConfigError, match="the job is cancelled; this can be done to one that is paused, queued"):
            service.cancel(job.id)
    kept = pump.to_end(jobs[0], jobs[2])
    assert [record.status for record in kept] == ["succeeded", "succeeded"]
    cases.until(lambda: not service._open)
    for n in (0, 2):
        assert_near(saved(lively, service, jobs[n]), alone[0][names[n]])
    for job in (jobs[1], jobs[3], *others):
        entry = service._entries[job.id]
        assert sorted(path.name for path in entry.directory.iterdir()) == ["events.jsonl", "record.json"]
        assert service.get(job.id).finished_at
    with pytest.raises(ConfigError, match="no fine-tuning job 'ftjob-0'"):
        service.cancel("ftjob-0")
    assert service.get("ftjob-0") is None


def test_a_job_that_diverges_spoils_no_other(lively, alone, rows, make):
    service, pump = make(max_jobs=2)
    good = service.create(cases.spec(rows, asked("lora")), owner=None)
    bad = service.create(cases.spec(rows, asked("lora", learning_rate=1e30)), owner=None)
    ended = pump.to_end(good, bad)
    assert [record.status for record in ended] == ["succeeded", "failed"]
    assert ended[1].error["code"] == "training_failed"
    assert "is not finite at step" in ended[1].error["message"]
    assert messages(service, bad)[-1].startswith("The job failed: the ")
    assert_near(saved(lively, service, good), alone[0]["lora"])


def test_checkpoints_are_served_as_asked_and_the_oldest_goes(lively, rows, make, tmp_path):
    store = cases.make_store(lively)
    service, pump = make(store=store)
    held_out = cases.write_rows(tmp_path / "held.jsonl", seed=3)
    more = {"save_steps": 2, "save_total_limit": 2, "eval_steps": 2, "max_steps": 6}
    job = service.create(
        cases.spec(rows, asked("lora", **more), validation_file="file-2", validation_path=held_out, suffix="mine"),
        owner="ann",
    )
    pump.to_end(job)
    steps = [int(one.split()[4].rstrip(":")) for one in messages(service, job) if one.startswith("Checkpoint created")]
    assert steps == [2, 4, 6]
    found = service.checkpoints(job.id)
    assert [one.step_number for one in found] == [6, 4]
    assert found[0].metrics.keys() == {"step", "train_loss", "valid_loss", "full_valid_loss"}
    name = f"ft:tiny:mine:{job.id[-8:]}"
    kept = {f"{name}:ckpt-step-{step}" for step in (4, 6)}
    assert {adapter.name: adapter.owner for adapter in store.list()} == dict.fromkeys({name, *kept}, "ann")
    assert store.get(f"{name}:ckpt-step-6").digest == store.get(name).digest
    evaluated = [event.data["step"] for event in service.events(job.id) if "valid_loss" in event.data]
    assert evaluated == [6, 4, 2]


def test_a_checkpoint_is_served_on_request(lively, rows, make):
    store = cases.make_store(lively)
    service, pump = make(store=store)
    job = service.create(cases.spec(rows, asked("lora", max_steps=8)), owner="ann")
    with pytest.raises(ConfigError, match="a checkpoint can be taken of a running one"):
        service.checkpoint(job.id)
    pump.learn(job, 1)
    service.checkpoint(job.id)
    pump.to_end(job)
    (found,) = service.checkpoints(job.id)
    assert 1 < found.step_number <= 8
    assert store.get(found.fine_tuned_model_checkpoint).owner == "ann"
    assert store.get(found.fine_tuned_model_checkpoint).digest != store.get(service.get(job.id).fine_tuned_model).digest


def test_a_store_without_a_memory_is_told_again_and_one_with_it_is_not(lively, rows, make, tmp_path):
    service, pump = make()
    job = service.create(cases.spec(rows, asked("lora", max_steps=1)), owner="ann")
    (record,) = pump.to_end(job)
    service.close()
    store = cases.make_store(lively)
    make(store=store)[0].close()
    assert store.get(record.fine_tuned_model).owner == "ann"
    durable = cases.make_store(lively, tmp_path / "store")
    make(store=durable)[0].close()
    assert durable.list() == []  # Somebody has unloaded it.


def test_an_adapter_that_cannot_be_served_fails_the_job_and_leaves_nothing(lively, rows, make, monkeypatch):
    store = cases.make_store(lively)
    service, pump = make(store=store)
    job = service.create(cases.spec(rows, asked("lora", max_steps=1)), owner=None)

    def full(*args, **kwargs):
        raise AdapterError("the disk is full")

    monkeypatch.setattr(store, "register", full)
    (record,) = pump.to_end(job)
    assert (record.status, record.error["code"], record.fine_tuned_model) == ("failed", "not_served", None)
    assert "the disk is full" in record.error["message"]
    cases.until(lambda: not service._open)
    names = sorted(path.name for path in service._entries[job.id].directory.iterdir())
    assert names == ["events.jsonl", "record.json"]


@pytest.mark.parametrize(
    ("change", "code", "message"),
    [
        ({"rows": '{"prompt": "a", "completion": "b"}\nnot json\n'}, "invalid_training_file", "file-1:2: this is not"),
        ({"rows": '{"prompt": "a"}\n'}, "invalid_training_file", "file-1:1: "),
        ({"rows": ""}, "invalid_training_file", "file-1 has no lines"),
        (
            {"rows": json.dumps({"prompt": "a", "completion": "b" * 80})},
            "invalid_training_file",
            "file-1:1: the example has 81 tokens and max_length is 64; raise hyperparameters.max_length, shorten it, "
            "or give hyperparameters.truncate",
        ),
        ({"held_out": "[]"}, "invalid_validation_file", "file-2 has no lines"),
        ({"count": 9, "max_rows": 8}, "limit_exceeded", "file-1 has more than 8 rows; give fewer"),
        ({"max_tokens": 20}, "limit_exceeded", "file-1 has more than 20 tokens; give fewer"),
        ({"max_steps": 3}, "invalid_hyperparameters", "the job has 6 updates; allowed: up to 3; lower n_epochs"),
    ],
)
def test_what_is_wrong_with_rows_is_told(change, code, message, make, tmp_path):
    path = cases.write_rows(tmp_path / "bad.jsonl", count=change.get("count", 6))
    if "rows" in change:
        path.write_text(change["rows"])
    fields = {}
    if "held_out" in change:
        fields = {"validation_file": "file-2", "validation_path": tmp_path / "held.jsonl"}
        fields["validation_path"].write_text(change["held_out"])
    service, _ = make(**{name: value for name, value in change.items() if name.startswith("max_")})
    job = service.create(cases.spec(path, **fields), owner=None)
    cases.until(lambda: service.get(job.id).status == "failed")
    error = service.get(job.id).error
    param = "validation_file" if fields else "hyperparameters" if "updates" in message else "training_file"
    assert (error["code"], error["param"]) == (code, param)
    assert error["message"].startswith(message)
    assert str(tmp_path) not in json.dumps([error, *messages(service, job)])
    assert service.training.next() is None


def test_what_is_not_allowed_is_refused_before_anything_is_written(lively, rows, make, tmp_path):
    store = cases.make_store(lively)
    Engine(lively, dataclasses.replace(TIGHT, all_token=False), store=store)
    service, _ = make(store=store, max_open_jobs=3, max_open_jobs_per_owner=2)
    for wrong, reason in (
        ({"n_epoch": 1}, "unknown hyperparameter 'n_epoch'"),
        ({"positions": "all"}, "this engine serves prompt-only adapters"),
        ({"layers": "0,7"}, "the base model has layers 0 to 1"),
    ):
        with pytest.raises(ConfigError, match=reason):
            service.create(cases.spec(rows, wrong), owner=None)
    with pytest.raises(ConfigError, match="the training file is not there any more"):
        service.create(cases.spec(tmp_path / "gone.jsonl"), owner=None)
    assert list((tmp_path / "jobs").iterdir()) == []
    mine = [service.create(cases.spec(rows), owner="ann") for _ in range(2)]
    with pytest.raises(LimitError, match="you have 2 fine-tuning jobs that have not ended; allowed: up to 2"):
        service.create(cases.spec(rows), owner="ann")
    service.create(cases.spec(rows), owner="bob")
    with pytest.raises(LimitError, match="there are 3 fine-tuning jobs"):
        service.create(cases.spec(rows), owner="cem")
    service.cancel(mine[0].id)
    service.create(cases.spec(rows), owner="cem")
    assert [record.status in OPEN for record in service.list()] == [True, True, True, False]


def test_a_full_disk_costs_a_checkpoint_and_not_the_job(lively, whole, rows, make, monkeypatch):
    service, pump = make(checkpoint_steps=1)
    job = service.create(cases.spec(rows, asked("lora")), owner=None)
    given, calls = results_module.save_state, []

    def full(*args):
        calls.append(args)
        if len(calls) == 1:
            raise CheckpointError("no space left on device")
        given(*args)

    monkeypatch.setattr(results_module, "save_state", full)
    pump.to_end(job)
    assert len(calls) >= 2
    assert any("could not be written; the job goes on" in one for one in messages(service, job))
    assert saved(lively, service, job).digest == whole.digest


def test_threads_end_with_the_service(make):
    before = threading.active_count()
    service, _ = make()
    assert threading.active_count() == before + 2
    service.close()
    assert threading.active_count() == before
