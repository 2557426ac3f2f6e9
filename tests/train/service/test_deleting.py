"""A fine-tuned adapter that its owner deletes: requests that run with it go on, and nothing is left of it."""

from concurrent.futures import Executor

import pytest
import service_cases as cases
from engine_outputs import TIGHT, advance, assert_as_alone, request, some

from preft_jax.io.adapter_files import load_adapter
from serve.engine.engine import Engine
from serve.store.names import RegistryError


@pytest.fixture
def made(lively, tmp_path):
    """Return a service with a job that has succeeded, its record, the store, and what makes services again."""
    services = []

    def make(**options):
        store = cases.make_store(lively, tmp_path / "store", **options)
        services.append(cases.make_service(lively, tmp_path / "jobs", store))
        return services[-1], store

    service, store = make()
    rows = cases.write_rows(tmp_path / "rows.jsonl")
    job = service.create(cases.spec(rows, cases.LORA | {"max_steps": 1, "save_steps": 1}), owner="ann")
    (record,) = cases.Pump(service, lively).to_end(job)
    cases.until(lambda: not service._open)
    yield service, record, store, make
    for one in services:
        one.close()


def directories(tmp_path, record):
    return {path.name for path in (tmp_path / "jobs" / record.id).iterdir() if path.is_dir()}


def test_a_request_that_runs_ends_as_it_would_have_and_nothing_is_left(lively, made, tmp_path, rng):
    service, record, store, make = made
    name, kept = record.fine_tuned_model, f"{record.fine_tuned_model}:ckpt-step-1"
    adapter = load_adapter(tmp_path / "jobs" / record.id / "adapter", lively)
    engine = Engine(lively, TIGHT, store=store)
    one = request(some(rng, 40), store.get(name), max_tokens=9)
    number, wholes = engine.add(one), {}
    while not engine.stats.generated_tokens:
        advance(engine, wholes, 1)
    assert service.delete_model(name)
    assert directories(tmp_path, record) == {"adapter-step-1"}
    while engine.has_work:
        advance(engine, wholes)
    assert_as_alone(lively, request(one.token_ids, adapter, max_tokens=9), [wholes[number, 0]])
    assert store.get(name) is None
    assert store.get(kept).owner == "ann"
    assert not service.delete_model(name)
    assert not service.delete_model("tiny")
    assert service.get(record.id).fine_tuned_model == name, "what happened stays"
    assert service.events(record.id)[0].message == f"Model deleted: {name}"
    service.close(), store.close()
    again, store = make()
    assert [adapter.name for adapter in store.list()] == [kept]
    assert again.delete_model(kept)
    assert again.checkpoints(record.id) == ()
    assert (store.list(), directories(tmp_path, record)) == ([], set())


def test_what_a_crash_leaves_of_a_deletion_is_deleted_at_the_next_start(made, tmp_path, monkeypatch):
    service, record, store, make = made

    def crash(name, path):
        raise SystemExit

    monkeypatch.setattr(service._publisher, "delete", crash)
    with pytest.raises(SystemExit):
        service.delete_model(record.fine_tuned_model)
    service.close(), store.close()
    _, store = make()
    assert store.get(record.fine_tuned_model) is None
    assert directories(tmp_path, record) == {"adapter-step-1"}


def test_a_name_that_cannot_be_taken_away_is_served_on(made, tmp_path, monkeypatch):
    service, record, store, make = made

    def full(name, keep_owner=False):
        raise RegistryError("the disk is full")

    with monkeypatch.context() as patch:
        patch.setattr(store, "unregister", full)
        with pytest.raises(RegistryError, match="the disk is full"):
            service.delete_model(record.fine_tuned_model)
    service.close(), store.close()
    _, store = make()
    assert store.get(record.fine_tuned_model).owner == "ann"
    assert directories(tmp_path, record) == {"adapter", "adapter-step-1"}


class Held(Executor):
    """Runs what it was given when it is told to."""

    def __init__(self):
        self.given = []

    def submit(self, function, *args):
        self.given.append((function, args))

    def run(self):
        for function, args in self.given:
            function(*args)


def test_the_directory_stays_until_a_request_that_waits_has_read_it(made, tmp_path):
    service, record, store, make = made
    service.close(), store.close()
    loaders = Held()
    service, store = make(loaders=loaders)
    lease = store.lease(store.get(record.fine_tuned_model))
    assert service.delete_model(record.fine_tuned_model)
    assert store.get(record.fine_tuned_model) is None
    assert directories(tmp_path, record) == {"adapter", "adapter-step-1"}
    loaders.run()
    assert store.poll() == [(lease, None)]
    assert lease.known is not None
    cases.until(lambda: directories(tmp_path, record) == {"adapter-step-1"})
    store.release(lease)
