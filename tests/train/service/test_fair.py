"""Many jobs of many tenants, with training that only counts: who is begun when, and that all end."""

import collections

import pytest
import service_cases as cases
from counting_training import counting_service

from serve.jobs import OPEN

pytestmark = pytest.mark.host

TENANTS = 10
EACH = 5
GREEDY = 100 - EACH * (TENANTS - 1)


@pytest.fixture
def counting(tiny_text, tmp_path, monkeypatch):
    """Return a service, its training and its store."""
    service, training, store, _ = counting_service(
        monkeypatch, tiny_text, tmp_path / "jobs", max_jobs=4, max_open_jobs=100, max_open_jobs_per_owner=GREEDY
    )
    yield service, training, store
    service.close()


def test_a_hundred_jobs_of_ten_tenants_all_end_and_nobody_starves(counting, tmp_path, rng):
    service, training, store = counting
    rows = cases.write_rows(tmp_path / "rows.jsonl")
    owners = ["greedy"] * GREEDY + [f"tenant-{n}" for n in range(1, TENANTS) for _ in range(EACH)]
    jobs = [service.create(cases.spec(rows, {"max_steps": int(rng.integers(1, 6))}), owner=owner) for owner in owners]
    by_id = {job.id: job for job in jobs}
    cases.until(lambda: all(record.status != "validating_files" for record in service.list()))
    woken = []
    service.wake = lambda: woken.append(True)

    def all_ended():
        training.update()
        return all(record.status not in OPEN for record in service.list())

    cases.until(all_ended)
    assert {record.status for record in service.list()} == {"succeeded"}
    assert training.most == 4
    assert sorted(training.begun) == sorted(by_id)
    assert woken
    turn = collections.defaultdict(list)
    for place, job_id in enumerate(training.begun):
        turn[by_id[job_id].owner].append(place)
    for owner, places in turn.items():
        begun = [job_id for job_id in training.begun if by_id[job_id].owner == owner]
        assert begun == sorted(begun), "an owner's jobs begin in the order of their age"
        if owner != "greedy":
            # Four were begun before the others came; then everybody has a turn before anybody has two.
            assert all(place < 4 + TENANTS * (k + 1) + 4 for k, place in enumerate(places))
    for record in service.list():
        assert record.trained_tokens == 10 * by_id[record.id].spec.hyperparameters["max_steps"]
        assert store.owners[record.fine_tuned_model] == record.owner


def test_a_higher_priority_is_begun_before_those_that_wait(counting, tmp_path):
    service, training, _ = counting
    rows = cases.write_rows(tmp_path / "rows.jsonl")
    for _ in range(8):
        service.create(cases.spec(rows, {"max_steps": 2}), owner="ann")
    urgent = service.create(cases.spec(rows, {"max_steps": 1}, priority=3), owner="ann")
    cases.until(lambda: all(record.status != "validating_files" for record in service.list()))

    def ended():
        training.update()
        return service.get(urgent.id).status == "succeeded"

    cases.until(ended)
    assert training.begun.index(urgent.id) <= 5
