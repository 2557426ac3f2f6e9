"""Jobs that the operator gives at start: read, checked, created once."""

import fake_tuning
import pytest

from preft_jax.errors import ConfigError, LimitError
from serve.finetune import read_jobs, start_jobs
from serve.jobs import JobSpec

pytestmark = pytest.mark.host

JOBS = """
jobs:
- {name: lamps, training_file: rows.jsonl, hyperparameters: {n_epochs: 3, rank: 16}}
- name: tickets-2
  training_file: more/rows.jsonl
  validation_file: rows.jsonl
  suffix: helpdesk
  seed: 7
  priority: 1
  metadata: {team: support}
"""


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "more").mkdir()
    for name in ("rows.jsonl", "more/rows.jsonl"):
        (tmp_path / name).write_text("{}\n")
    (tmp_path / "jobs.yaml").write_text(JOBS)
    return tmp_path


def test_jobs_are_read_with_paths_beside_the_file(folder, monkeypatch):
    monkeypatch.chdir("/")
    assert read_jobs(folder / "jobs.yaml") == {
        "lamps": JobSpec(
            training_file="operator:lamps", training_path=folder / "rows.jsonl", suffix="lamps",
            hyperparameters={"n_epochs": 3, "rank": 16},
        ),
        "tickets-2": JobSpec(
            training_file="operator:tickets-2", training_path=folder / "more" / "rows.jsonl",
            validation_file="operator:tickets-2 (validation)", validation_path=folder / "rows.jsonl",
            suffix="helpdesk", seed=7, priority=1, metadata={"team": "support"},
        ),
    }  # fmt: skip


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "give 'jobs:' with a list of jobs"),
        ("[]", "give 'jobs:'"),
        ("jobs: []", "give 'jobs:'"),
        ("jobs: [a]\nmodel: tiny", "give 'jobs:'"),
        ("jobs: [a]", "job 1 is 'a'; give a mapping"),
        ("jobs: [", "cannot be read"),
        ("jobs: [{name: a, training_file: rows.jsonl, epochs: 3}]", "unknown field of .*job 1: 'epochs'"),
        ("jobs: [{training_file: rows.jsonl}]", "job 1: name is None; give a text"),
        ("jobs: [{name: a/b, training_file: rows.jsonl}]", "job 1: name is 'a/b'"),
        ("jobs: [{name: a}]", "training_file is None; give a path"),
        ("jobs: [{name: a, training_file: none.jsonl}]", "training_file is 'none.jsonl', and there is no file"),
        ("jobs: [{name: a, training_file: more}]", "there is no file"),
        ("jobs: [{name: a, training_file: rows.jsonl, validation_file: x}]", "validation_file is 'x'"),
        ("jobs: [{name: a, training_file: rows.jsonl, seed: true}]", "seed is True; give a whole number"),
        ("jobs: [{name: a, training_file: rows.jsonl, priority: high}]", "priority is 'high'"),
        ("jobs: [{name: a, training_file: rows.jsonl, hyperparameters: [1]}]", "hyperparameters is"),
        ("jobs: [{name: a, training_file: rows.jsonl}, {name: a, training_file: rows.jsonl}]", "job 2 has the name"),
    ],
)
def test_what_is_wrong_with_a_file_of_jobs_is_told(folder, text, told):
    (folder / "jobs.yaml").write_text(text)
    with pytest.raises(ConfigError, match=told):
        read_jobs(folder / "jobs.yaml")
    with pytest.raises(ConfigError, match="cannot be read"):
        read_jobs(folder / "none.yaml")


def test_each_is_created_once_whatever_became_of_it(folder):
    jobs = read_jobs(folder / "jobs.yaml")
    first = fake_tuning.FakeFineTuning()
    created = start_jobs(first, {"lamps": jobs["lamps"]})
    assert [(name, new) for name, _, new in created] == [("lamps", True)]
    first.cancel(created[0][1].id)
    # A user's job cannot pass for one of the operator's.
    first.create(JobSpec(training_file="operator:tickets-2", training_path=folder), owner="alice")
    again = fake_tuning.FakeFineTuning(first)
    again._ids = iter(range(100, 200))
    found = start_jobs(again, jobs)
    assert [(name, record.status, new) for name, record, new in found] == [
        ("lamps", "cancelled", False), ("tickets-2", "validating_files", True),
    ]  # fmt: skip
    assert found[0][1].id == created[0][1].id
    assert found[1][1].owner is None
    assert len(again.jobs) == 3


def test_one_that_cannot_be_created_is_named(folder):
    service = fake_tuning.FakeFineTuning()
    (folder / "jobs.yaml").write_text("jobs: [{name: a, training_file: rows.jsonl, hyperparameters: {epochs: 1}}]")
    with pytest.raises(ConfigError, match="the fine-tuning job 'a': unknown hyperparameter 'epochs'"):
        start_jobs(service, read_jobs(folder / "jobs.yaml"))
    service.most = 0
    (folder / "jobs.yaml").write_text("jobs: [{name: a, training_file: rows.jsonl}]")
    with pytest.raises(LimitError, match="open jobs"):
        start_jobs(service, read_jobs(folder / "jobs.yaml"))
