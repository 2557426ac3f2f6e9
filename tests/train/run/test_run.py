"""The program: resumed runs, and what goes wrong in the middle of one."""

import dataclasses
import errno
import json
import os
import shutil
import signal

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
import train_cases as cases

import preft_jax
from preft_jax import AdapterConfig
from preft_jax.config import PRESETS
from preft_jax.io.adapter_files import load_adapter, save_adapter
from train import sft
from train.checkpoint import CheckpointError, Checkpoints
from train.run import loop as runs
from train.run.kept import OPTIONS_FILE, read_options, write_options
from train.run.log import read_metrics
from train.step import Slots

pytestmark = pytest.mark.usefixtures("one_layer_tiny")

ADAPTER = ("adapter_config.json", "adapter_model.safetensors")


@pytest.fixture
def data(tmp_path):
    words = ["ab", "cde", "f", "gh", "ijkl", "mn", "op"]
    rows = [{"prompt": f"{word} ", "completion": word * 2} for word in words]
    return cases.write_rows(tmp_path / "data.jsonl", rows)


def arguments(data, out, *more):
    return [
        "--model", "tiny", "--dataset", str(data), "--eval-dataset", str(data), "--eval-steps", "4",
        "--eval-generations", "2",
        "--output-dir", str(out), "--per-device-train-batch-size", "3", "--max-steps", "7", "--rank", "4",
        "--targets", "q,down", "--lora-dropout", "0.2", "--max-length", "32", "--save-steps", "2", *more,
    ]  # fmt: skip


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Return the files of a run that nothing interrupted."""
    root = tmp_path_factory.mktemp("whole")
    words = ["ab", "cde", "f", "gh", "ijkl", "mn", "op"]
    data = cases.write_rows(root / "data.jsonl", [{"prompt": f"{w} ", "completion": w * 2} for w in words])
    assert sft.main(arguments(data, root / "out")) == 0
    return root / "out"


def adapter_bytes(out):
    return [(out / "adapter" / name).read_bytes() for name in ADAPTER]


def learned(out):
    """Return what the metrics say, without what depends on the clock."""
    timed = ("tokens_per_s", "flops_per_s", "mfu")
    return [{k: v for k, v in row.items() if k not in timed} for row in read_metrics(out / "metrics.jsonl")]


def test_a_run_leaves_adapter_metrics_picture_and_checkpoints(whole):
    assert {path.name for path in whole.iterdir()} == {
        "adapter", "checkpoints", "loss.png", "metrics.jsonl", "options.json"
    }  # fmt: skip
    assert sorted(path.name for path in (whole / "checkpoints").iterdir()) == ["6", "7"]
    assert (whole / "loss.png").read_bytes()[:4] == b"\x89PNG"
    rows = learned(whole)
    assert [row["step"] for row in rows if "loss" in row] == list(range(1, 8))
    assert [row["epoch"] for row in rows if "loss" in row] == [0.3333, 0.6667, 1, 1.3333, 1.6667, 2, 2.3333]
    assert [row["step"] for row in rows if "eval_loss" in row] == [4, 7]
    assert rows[-1]["eval_loss"] < rows[0]["loss"]
    assert 0 <= rows[-1]["exact_match"] <= 1


def test_a_status_line_tells_step_epoch_and_loss(data, tmp_path, capsys):
    assert sft.main(arguments(data, tmp_path / "out", "--max-steps", "2", "--logging-steps", "2")) == 0
    (row,) = [row for row in learned(tmp_path / "out") if "loss" in row]
    assert f"\nstep 2/2  epoch 0.67  loss {row['loss']:.4f}  grad " in capsys.readouterr().err


def interrupt_after(monkeypatch, step):
    """Let the terminal send an interrupt while an update runs."""
    real = runs.Trainer.step

    def patched(self):
        result = real(self)
        patched.count += 1
        if patched.count == step:
            os.kill(os.getpid(), signal.SIGINT)
        return result

    patched.count = 0
    monkeypatch.setattr(runs.Trainer, "step", patched)


@pytest.mark.parametrize("step", [1, 2, 4, 5, 6])
def test_a_run_interrupted_at_any_step_and_resumed_is_the_uninterrupted_one(
    step, whole, data, tmp_path, monkeypatch, capsys
):
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        interrupt_after(patch, step)
        assert sft.main(arguments(data, out)) == 130
    assert f"interrupted at step {step}" in capsys.readouterr().err
    assert not (out / "adapter").exists()
    assert sft.main(["--resume", "--output-dir", str(out)]) == 0
    assert adapter_bytes(out) == adapter_bytes(whole)
    assert learned(out) == learned(whole)


def evaluations(out):
    return [(row["job"], row["step"]) for row in learned(out) if "eval_loss" in row]


def test_an_evaluation_at_the_start_is_of_step_0_and_changes_nothing_else(whole, data, tmp_path, monkeypatch):
    """A run that is interrupted and resumed has it once."""
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        interrupt_after(patch, 2)
        assert sft.main(arguments(data, out, "--eval-on-start")) == 130
    assert sft.main(["--resume", "--output-dir", str(out)]) == 0
    assert evaluations(out) == [("adapter", step) for step in (0, 4, 7)]
    first, *rest = learned(out)
    assert (first["step"], first["eval_tokens"], "exact_match" in first) == (0, rest[-1]["eval_tokens"], True)
    assert rest == learned(whole)
    assert adapter_bytes(out) == adapter_bytes(whole)
    assert first["eval_loss"] > rest[-1]["eval_loss"]


def test_jobs_that_wait_for_others_are_evaluated_when_they_start(data, tmp_path):
    jobs, out = tmp_path / "jobs.yaml", tmp_path / "out"
    jobs.write_text("jobs:\n- {name: ann, max_steps: 2}\n- {name: bob, max_steps: 1}\n- {name: carl, max_steps: 1}\n")
    argv = arguments(data, out, "--jobs", str(jobs), "--max-jobs", "2", "--eval-steps", "0", "--eval-on-start")
    assert sft.main(argv) == 0
    assert evaluations(out) == [
        ("ann", 0), ("bob", 0), ("bob", 1), ("carl", 0), ("ann", 2), ("carl", 1)
    ]  # fmt: skip


def test_a_run_that_was_killed_goes_on_from_its_checkpoint(whole, data, tmp_path, monkeypatch):
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        real = runs.Trainer.step

        def patched(self):
            if patched.count == 5:
                raise SystemExit("killed")
            patched.count += 1
            return real(self)

        patched.count = 0
        patch.setattr(runs.Trainer, "step", patched)
        with pytest.raises(SystemExit):
            sft.main(arguments(data, out))
    assert sft.main(["--resume", "--output-dir", str(out)]) == 0
    assert adapter_bytes(out) == adapter_bytes(whole)
    assert learned(out) == learned(whole)


def damage(out, step):
    """Cut the files of a checkpoint in half."""
    for path in (out / "checkpoints" / str(step)).rglob("*"):
        if path.is_file():
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def test_a_damaged_checkpoint_is_told_and_the_one_before_it_taken(whole, data, tmp_path, monkeypatch, caplog):
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        interrupt_after(patch, 5)
        assert sft.main(arguments(data, out)) == 130
    damage(out, 5)
    assert sft.main(["--resume", "--output-dir", str(out)]) == 0
    assert "the checkpoint of step 5 is damaged" in caplog.text
    assert "going on from step 4" in caplog.text
    assert adapter_bytes(out) == adapter_bytes(whole)


def test_when_every_checkpoint_is_damaged_nothing_is_deleted(data, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        interrupt_after(patch, 3)
        assert sft.main(arguments(data, out)) == 130
    for step in (2, 3):
        damage(out, step)
    assert sft.main(["--resume", "--output-dir", str(out)]) == 1
    told = capsys.readouterr().err
    assert "no checkpoint" in told
    assert "step 2 is damaged" in told
    assert {path.name for path in (out / "checkpoints").iterdir()} == {"2", "3"}


def test_numbers_that_were_changed_in_a_checkpoint_are_noticed(tmp_path):
    checkpoints = Checkpoints(tmp_path / "here")
    state = Slots({"a": np.arange(1000, dtype=np.float32)}, {"m": np.zeros(3, np.float32)})
    checkpoints.save(1, {"x": 1}, {"one": state})
    found = checkpoints.latest()
    assert (found.step, found.meta) == (1, {"x": 1})
    np.testing.assert_array_equal(found.state("one", state).params["a"], state.params["a"])
    with pytest.raises(CheckpointError, match="another shape"):
        found.state("one", Slots({"a": np.zeros(5, np.float32)}, state.opt_state))
    real = ocp.CheckpointManager.restore

    def restore(self, *args, **kwargs):
        got = real(self, *args, **kwargs)
        if "state" in got:
            got["state"]["one/0"] = got["state"]["one/0"] + np.float32(1e-3)
        return got

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ocp.CheckpointManager, "restore", restore)
        with pytest.raises(CheckpointError, match="not the ones that were written"):
            checkpoints.latest()


def test_options_of_another_run_are_noticed_and_those_of_the_checkpoints_can_be_taken(whole, tmp_path, capsys):
    out = tmp_path / "out"
    shutil.copytree(whole, out)
    write_options(out, read_options(out).given | {"learning_rate": 0.5}, "another")
    assert sft.main(["--resume", "--output-dir", str(out)]) == 1
    assert "is of another run than the checkpoints beside it; delete it" in capsys.readouterr().err
    (out / OPTIONS_FILE).unlink()
    assert sft.main(["--resume", "--output-dir", str(out)]) == 0
    assert "the options of the checkpoint of step 7 count" in capsys.readouterr().err
    assert read_options(out).run == read_options(whole).run
    assert adapter_bytes(out) == adapter_bytes(whole)


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
def test_a_checkpoint_that_cannot_be_finished_leaves_the_one_before(error, whole, data, tmp_path, monkeypatch, capsys):
    """The disk is full, or the user loses patience, when half of it is written."""
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        _break_commit(patch, out, error)
        if isinstance(error, KeyboardInterrupt):
            assert sft.main(arguments(data, out)) == 130
        else:
            assert sft.main(arguments(data, out)) == 1
            told = capsys.readouterr().err
            assert "step 4 cannot be written" in told
            assert "the one of step 2 is whole" in told
            assert "No space left" in told
    assert "2" in {path.name for path in (out / "checkpoints").iterdir()}
    assert sft.main(["--resume", "--output-dir", str(out)]) == 0
    assert adapter_bytes(out) == adapter_bytes(whole)


def _break_commit(patch, out, error):
    """Let Orbax fail after the arrays of step 4 are written and before the checkpoint has its name."""
    real = ocp.CheckpointManager.save

    def save(self, step, *args, **kwargs):
        if step != 4:
            return real(self, step, *args, **kwargs)
        half = out / "checkpoints" / "4.orbax-checkpoint-tmp"
        half.mkdir()
        (half / "state").write_bytes(b"half")
        raise error

    patch.setattr(ocp.CheckpointManager, "save", save)


def test_an_update_that_is_no_number_ends_the_run_with_the_last_good_checkpoint(whole, data, tmp_path, capsys):
    out = tmp_path / "out"
    with pytest.MonkeyPatch.context() as patch:
        real = runs.Job.numbers

        def numbers(self):
            return real(self)._replace(learning_rate=np.float32(np.inf)) if self.step == 4 else real(self)

        patch.setattr(runs.Job, "numbers", numbers)
        assert sft.main(arguments(data, out)) == 1
    told = capsys.readouterr().err
    assert "the updated adapter is not finite at step 5" in told
    assert "lower learning_rate" in told
    assert not (out / "adapter").exists()
    assert any("failed" in row for row in read_metrics(out / "metrics.jsonl"))
    assert sft.main(["--resume", "--output-dir", str(out)]) == 0, "from step 4"
    assert adapter_bytes(out) == adapter_bytes(whole)


def test_a_directory_with_a_run_is_not_overwritten_unasked(whole, data, capsys):
    before = adapter_bytes(whole)
    assert sft.main(arguments(data, whole)) == 1
    told = capsys.readouterr().err
    assert "--resume" in told
    assert "--overwrite-output-dir" in told
    assert adapter_bytes(whole) == before


def test_a_run_is_not_resumed_on_other_data(data, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        interrupt_after(patch, 2)
        sft.main(arguments(data, out))
    cases.write_rows(data, [{"prompt": "x ", "completion": "yy"}])
    assert sft.main(["--resume", "--output-dir", str(out)]) == 1
    assert "is not the one that the run was begun with" in capsys.readouterr().err


def test_a_run_goes_on_beyond_its_end_when_told_to(whole, data, tmp_path, capsys):
    """With a constant learning rate, nothing in it knows how long it was to be."""
    constant = ("--lr-scheduler-type", "constant", "--eval-steps", "0")
    out, longer = tmp_path / "out", tmp_path / "longer"
    assert sft.main(arguments(data, out, *constant, "--max-steps", "3")) == 0
    assert sft.main(["--resume", "--output-dir", str(out), "--max-steps", "5"]) == 0
    assert "max_steps: 5 instead of 3" in capsys.readouterr().err
    assert sft.main(arguments(data, longer, *constant, "--max-steps", "5")) == 0
    assert adapter_bytes(out) == adapter_bytes(longer)
    assert sft.main(["--resume", "--output-dir", str(out)]) == 0, "nothing is left to do"
    assert adapter_bytes(out) == adapter_bytes(longer)


def test_a_run_is_not_resumed_with_another_shape(data, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        interrupt_after(patch, 2)
        sft.main(arguments(data, out))
    assert sft.main(["--resume", "--output-dir", str(out), "--rank", "8"]) == 1
    told = capsys.readouterr().err
    assert "rank: 8 instead of 4" in told
    assert "has another shape" in told


def test_jobs_of_a_file_are_trained_together(data, tmp_path, capsys):
    jobs = tmp_path / "jobs.yaml"
    jobs.write_text(
        "jobs:\n- name: ann\n  rank: 4\n- {name: bob, adapter_kind: direft, rank: 2, max_steps: 4, targets: block,"
        " lora_dropout: 0.0}\n"
    )
    out = tmp_path / "out"
    assert sft.main(arguments(data, out, "--jobs", str(jobs), "--publish", str(tmp_path / "served"))) == 0
    rows = read_metrics(out / "metrics.jsonl")
    assert {(row["job"], row["step"]) for row in rows if "loss" in row} == {
        *(("ann", i) for i in range(1, 8)), *(("bob", i) for i in range(1, 5))
    }  # fmt: skip
    for name in ("ann", "bob"):
        for file in ADAPTER:
            assert (out / name / "adapter" / file).read_bytes() == (tmp_path / "served" / name / file).read_bytes()
    assert json.loads((out / "options.json").read_text())["jobs"][0]["name"] == "ann"


def test_a_loss_that_rises_is_warned_of_and_is_no_failure(tmp_path, monkeypatch, capsys):
    """Every update climbs here. Of an interrupted run the first loss is that of its beginning."""
    out, data = tmp_path / "out", cases.write_rows(tmp_path / "data.jsonl", [{"prompt": "ab ", "completion": "abab"}])
    real = runs.Job.numbers
    monkeypatch.setattr(runs.Job, "numbers", lambda job: real(job)._replace(learning_rate=np.float32(-0.05)))
    with monkeypatch.context() as patch:
        interrupt_after(patch, 3)
        assert sft.main(arguments(data, out, "--lora-dropout", "0")) == 130
    assert "warning" not in capsys.readouterr().err
    assert sft.main(["--resume", "--output-dir", str(out)]) == 0
    first, *_, last = [row["loss"] for row in learned(out) if "loss" in row]
    assert last > first + 0.01
    told = capsys.readouterr().err
    assert f"warning: the training loss was {first:.4f} at first and is {last:.4f} at the end; lower learning" in told
    assert (out / "adapter").exists()


@pytest.fixture
def model(one_layer_tiny, monkeypatch):
    """Return what the programs load: two layers, since an edit behind the last one reaches no other token."""
    monkeypatch.setitem(PRESETS, "tiny", dataclasses.replace(PRESETS["tiny"], num_hidden_layers=2))
    return preft_jax.load_model("tiny")


def loreft(model, path):
    config = AdapterConfig(kind="loreft", rank=2, positions="f3+l2", share_weights=False)
    save_adapter(path, preft_jax.random_adapter(config, model.config, jax.random.key(3)))
    return path


def test_a_run_starts_from_an_adapter_whatever_its_kind(model, data, tmp_path, capsys):
    """Its options are the adapter's, those of positions and kind too: rows are edited where it has its weights."""
    old, out = loreft(model, tmp_path / "old"), tmp_path / "out"
    argv = ["--model", "tiny", "--dataset", str(data), "--max-steps", "2", "--max-length", "32"]
    assert sft.main([*argv, "--init-from", str(old), "--learning-rate", "0.01", "--output-dir", str(out)]) == 0
    assert f"loreft r2 at f3+l2 from {old}" in capsys.readouterr().err
    before, after = load_adapter(old, model), load_adapter(out / "adapter", model)
    assert (after.config.positions, after.config.share_weights) == ("f3+l2", False)
    for leaf in ("w", "r"):
        a, b = (np.asarray(one.params["layers"][0]["block"][leaf]) for one in (before, after))
        assert (np.abs(a - b).max(axis=1) > 0).all(), "weights of first and of last positions learn"


def test_a_run_that_contradicts_the_adapter_to_start_from_is_refused(model, data, tmp_path, capsys):
    old, out = loreft(model, tmp_path / "old"), tmp_path / "out"
    argv = ["--model", "tiny", "--dataset", str(data), "--init-from", str(old), "--output-dir", str(out)]
    assert sft.main([*argv, "--rank", "16"]) == 1
    assert f"rank is 16 and that of the adapter to start from, {old}, is 2; leave rank out" in capsys.readouterr().err
    jobs = tmp_path / "jobs.yaml"
    jobs.write_text("jobs:\n- {name: ann}\n- {name: bob, adapter_kind: lora}\n")
    assert sft.main([*argv, "--jobs", str(jobs)]) == 1
    assert "job 'bob': adapter_kind is lora and" in capsys.readouterr().err
    assert not out.exists()


def test_a_run_that_goes_on_with_other_jobs_tells_what_is_other(data, tmp_path, monkeypatch, capsys):
    """And goes on with what can be: the optimizer's state is there for other steps and rates, not for another rank."""
    jobs, out = tmp_path / "jobs.yaml", tmp_path / "out"
    jobs.write_text("jobs:\n- {name: ann}\n- {name: bob, rank: 2}\n")
    argv = ["--resume", "--output-dir", str(out), "--jobs", str(jobs)]
    with monkeypatch.context() as patch:
        interrupt_after(patch, 2)
        assert sft.main(arguments(data, out, "--jobs", str(jobs))) == 130
    jobs.write_text("jobs:\n- {name: ann}\n- {name: bob, rank: 4}\n")
    assert sft.main(argv) == 1
    told = capsys.readouterr().err
    assert "bob: rank: 4 instead of 2\n" in told
    assert "the checkpoint's adapter 'bob' has another shape" in told
    jobs.write_text("jobs:\n- {name: ann, max_steps: 3}\n- {name: carl, max_steps: 1}\n")
    assert sft.main(argv) == 0
    told = capsys.readouterr().err
    assert "ann: max_steps: 3 instead of 7\n" in told
    assert "carl: a new job\n" in told
    assert "bob: not trained any further\n" in told
    assert {path.name for path in out.iterdir() if (path / "adapter").exists()} == {"ann", "carl"}
    assert [row["step"] for row in learned(out) if row["job"] == "ann" and "loss" in row] == [1, 2, 3]


def test_the_built_in_task_is_learnable_and_held_out():
    from train.data.builtin import rows

    train, held_out = rows()
    questions = {row["messages"][0]["content"] for row in train}
    answers = {row["messages"][1]["content"] for row in train}
    assert len(train) == 128
    for row in held_out:
        assert row["messages"][0]["content"] not in questions
        assert row["messages"][1]["content"] not in answers
        assert set(json.loads(row["messages"][1]["content"])) == {"device", "room", "set"}
    assert rows() == rows()
