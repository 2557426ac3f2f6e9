"""What ``bench.kills`` finds wrong, in directories and answers that are."""

import json
import random

import jax
import pytest

import preft_jax
from bench import kills, tables
from bench.kills_traffic import Book
from serve.store.files import AdapterFiles
from serve.store.host import AdapterStore
from serve.store.names import Registry

FIGURES = {
    "kills": 9, "kills_while_starting": 2, "jobs": 3, "jobs_succeeded": 3, "jobs_gone_on": 4, "adapters_read": 50,
    "answers": 70, "uploads": 5, "deletions": 1, "most_updates_lost": 20, "last_adapters": 1, "faults": [],
    "seconds": 600,
}  # fmt: skip


@pytest.fixture
def book():
    return Book(random.Random(0))


@pytest.fixture
def disk(tmp_path, tiny, book):
    """Return what checks a server's directory, with an adapter that has a name."""
    adapter = preft_jax.random_adapter(preft_jax.AdapterConfig(rank=4), tiny.config, jax.random.key(0))
    preft_jax.save_adapter(tmp_path / "adapter", adapter)
    store = AdapterStore(AdapterFiles(tiny), Registry(tmp_path / "adapters.sqlite"), host_bytes=10**8)
    store.register("ft:tiny:ann:1", tmp_path / "adapter")
    store.close()
    return kills.Disk(tmp_path, book, tiny)


def write_job(root, steps, states, *starts, status="running"):
    """Write a job's directory as a killed server leaves it; the last event is cut."""
    job = root / "finetuning" / "jobs" / "ftjob-1"
    for step in states:
        (job / "state" / str(step)).mkdir(parents=True, exist_ok=True)
    (job / "record.json").write_text(json.dumps({"record": {"status": status, "error": "why"}}))
    events = [{"message": f"Fine-tuning job started{start}", "data": {}} for start in starts]
    events += [{"message": "", "data": {"step": step, "train_loss": 1.0}} for step in range(1, steps + 1)]
    (job / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events) + '{"mess')


def test_a_job_goes_on_from_its_newest_state(tmp_path, disk, book):
    write_job(tmp_path, 27, (10, 20), "")
    disk.check()
    assert (disk.most_lost, book.faults) == (7, [])
    write_job(tmp_path, 41, (30, 40), "", ", going on after step 20")
    disk.check()
    assert (disk.most_lost, book.faults, book.counts["jobs_gone_on"]) == (7, [], 1)
    write_job(tmp_path, 41, (30, 40), "", ", going on after step 20", ", going on after step 30")
    disk.check()
    assert book.faults == ["ftjob-1: Fine-tuning job started, going on after step 30, and its state is of step 40"]


def test_lost_states_failed_jobs_and_torn_adapters_are_found(tmp_path, disk, book):
    write_job(tmp_path, 20, (20,), "")
    disk.check()
    assert book.faults == []
    assert disk.digests().keys() == {"ft:tiny:ann:1"}
    (tmp_path / "finetuning" / "jobs" / "ftjob-1" / "state" / "20").rmdir()
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    disk.check()
    assert book.faults[0] == "ftjob-1 had a state of step 20, and has one of 0"
    assert book.faults[1].startswith("ft:tiny:ann:1 is not whole: ")
    write_job(tmp_path, 20, (20,), "", status="failed")
    disk.check()
    assert "ftjob-1 is failed: why" in book.faults


def test_another_answer_of_the_same_adapter_is_found(book):
    for name in ("tiny", "ft:tiny:ann:1", "ft:tiny:ann:1:ckpt-step-20", "ft:tiny:ann:2:ckpt-step-20"):
        book.check_answer(name, "no", [-0.5, -0.25])
        book.check_answer(name, "no", [-0.5, -0.25004])
    assert not book.faults
    book.check_answer("ft:tiny:ann:3", "no", [-0.5, -0.3])
    book.check_answer("tiny", "yes", [-0.5, -0.25])
    book.check_answer("ft:tiny:ann:2:ckpt-step-20", "no", [-0.5])
    assert len(book.faults) == 3


def test_the_table_has_all_figures():
    figures = {"date": "2026-01-01", "device": {"kind": "cpu"}, "versions": {"jax": "1"}, "commit": "c"}
    made = tables.kills(figures | {"figures": FIGURES, "options": {"checkpoint_steps": 20}})
    assert made.startswith("| 10 minutes |")
    assert made.count("\n| ") == 10
