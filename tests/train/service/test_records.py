"""Jobs on disk: whole or not at all, and read as they were written."""

import dataclasses
import errno
import os
import shutil

import pytest

from preft_jax.errors import ConfigError
from serve.jobs import Checkpoint, JobRecord, JobSpec
from train.service.records import RecordError, Records, new_id

pytestmark = pytest.mark.host


@pytest.fixture
def rows(tmp_path):
    (tmp_path / "rows.jsonl.gz").write_bytes(b"rows")
    return tmp_path / "rows.jsonl.gz"


def record(rows, *, uploaded=False, **fields):
    spec = JobSpec(
        training_file="file-1", training_path=rows, validation_file="file-2", validation_path=rows, seed=3,
        suffix="mine", hyperparameters={"rank": 4, "targets": ["q", "v"]}, metadata={"a": "b"}, priority=2,
        uploaded=uploaded,
    )  # fmt: skip
    return JobRecord(**{"id": new_id("ftjob"), "owner": "ann", "model": "tiny", "spec": spec, "status": "queued",
                        "created_at": 5, **fields})  # fmt: skip


def test_what_was_written_is_read_and_the_oldest_comes_first(rows, tmp_path):
    records = Records(tmp_path / "jobs")
    made = [records.create(record(rows), {"rank": "auto"}) for _ in range(3)]
    rows.unlink()
    first = made[0]
    error = {"code": "x", "message": "y", "param": None}
    first.record = dataclasses.replace(first.record, status="failed", error=error, step=3, finished_at=9)
    first.checkpoints = (Checkpoint(id="c", created_at=1, step_number=2, fine_tuned_model_checkpoint="n",
                                    metrics={"loss": 0.5}),)  # fmt: skip
    records.write(first)
    found = Records(tmp_path / "jobs").load()
    assert found == made
    assert [entry.record.id for entry in found] == sorted(entry.record.id for entry in made)
    assert found[0].rows("training").name == "training.jsonl.gz"
    assert found[0].rows("validation").read_bytes() == b"rows"
    records.forget_rows(first)
    assert sorted(path.name for path in first.directory.iterdir()) == ["events.jsonl", "record.json"]


@pytest.mark.parametrize("uploaded", [True, False])
def test_only_uploads_are_linked(rows, tmp_path, uploaded):
    """A file that its owner appends to, while the job waits, is no job's."""
    entry = Records(tmp_path / "jobs").create(record(rows, uploaded=uploaded), {})
    for what in ("training", "validation"):
        assert os.path.samefile(entry.rows(what), rows) == uploaded
    if not uploaded:
        with open(rows, "ab") as file:
            file.write(b" and more")
    assert entry.rows("training").read_bytes() == entry.rows("validation").read_bytes() == b"rows"


def test_uploads_are_copied_where_they_cannot_be_linked(rows, tmp_path, monkeypatch):
    def other_disk(*args, **kwargs):
        raise OSError(errno.EXDEV, "another disk")

    monkeypatch.setattr(os, "link", other_disk)
    entry = Records(tmp_path / "jobs").create(record(rows, uploaded=True), {})
    assert entry.rows("training").read_bytes() == b"rows"


@pytest.mark.parametrize("name", ["copyfile", "rename", "replace", "mkdir"])
def test_a_job_that_cannot_be_written_leaves_nothing(name, rows, tmp_path, monkeypatch):
    records = Records(tmp_path / "jobs")

    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(shutil if name == "copyfile" else os, name, full)
        with pytest.raises(RecordError, match="No space left on device"):
            records.create(record(rows), {})
    assert list((tmp_path / "jobs").iterdir()) == []


def test_what_a_crash_leaves_of_a_job_that_was_being_made_is_deleted(rows, tmp_path):
    (tmp_path / "jobs" / ".new-ftjob-1").mkdir(parents=True)
    (tmp_path / "jobs" / ".new-ftjob-1" / "record.json").write_text("{")
    assert Records(tmp_path / "jobs").load() == []
    assert list((tmp_path / "jobs").iterdir()) == []


def test_a_damaged_record_is_left_and_told_of(rows, tmp_path, caplog):
    records = Records(tmp_path / "jobs")
    good, *bad = (records.create(record(rows), {}) for _ in range(4))
    path = bad[0].directory / "record.json"
    path.write_text(path.read_text().replace("queued", "failed"))
    (bad[1].directory / "record.json").write_text("{")
    (bad[2].directory / "record.json").unlink()
    assert records.load() == [good]
    assert [bad[0].record.id in text for text in caplog.messages].count(True) == 1
    assert len(caplog.messages) == 3
    assert bad[0].rows("training").exists()


def test_events_are_read_newest_first_and_a_cut_line_is_left_out(rows, tmp_path):
    records = Records(tmp_path / "jobs")
    entry = records.create(record(rows), {})
    for step in (1, 2, 3):
        records.append(entry, f"step {step}", {"step": step, "train_loss": float("nan") if step == 2 else 1.0})
    records.append(entry, "said", level="warn")
    path = entry.directory / "events.jsonl"
    path.write_bytes(path.read_bytes()[:-7])
    assert [event.message for event in records.events(entry)] == ["step 3", "step 2", "step 1"]
    records.append(entry, "after")
    found = records.events(entry)
    assert [event.message for event in found] == ["after", "step 3", "step 2", "step 1"]
    assert [event.type for event in found] == ["message", "metrics", "metrics", "metrics"]
    assert len({event.id for event in found}) == 4
    records.forget_after(entry, 1)
    assert [event.message for event in records.events(entry)] == ["after", "step 1"]


def test_a_directory_that_cannot_be_made_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot be used for fine-tuning jobs"):
        Records(tmp_path / "file" / "jobs")
