"""What is sent to TensorBoard and to wandb, and when it is there."""

import sys
import time
import types

import pytest
import train_cases as cases

from preft_jax import ConfigError
from train import sft
from train.run.log import read_metrics
from train.run.reporters import make_reporters

pytestmark = pytest.mark.usefixtures("one_layer_tiny")


def written(directory):
    (events,) = (directory / "tensorboard").iterdir()
    return events.read_bytes()


def test_tensorboard_gets_every_scalar(tmp_path):
    (reporter,) = make_reporters(["tensorboard"], tmp_path, "run")
    reporter.report("a", 1, {"loss": 0.5, "grad_norm": 2.0})
    reporter.report("b", 1, {"loss": 0.25})
    reporter.close(failed=False)
    assert all(tag in written(tmp_path) for tag in (b"a/loss", b"a/grad_norm", b"b/loss"))


def test_tensorboard_shows_what_was_sent_while_the_run_goes_on(tmp_path):
    """At once, and not with the next value or after two minutes; this waits for half a minute at most."""
    (reporter,) = make_reporters(["tensorboard"], tmp_path, "run")
    for step, name in enumerate(("first", "second", "third")):
        reporter.report("a", step, {name: 0.5})
        deadline = time.monotonic() + 30
        while f"a/{name}".encode() not in written(tmp_path) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert f"a/{name}".encode() in written(tmp_path)
    reporter.close(failed=False)


@pytest.fixture
def wandb(monkeypatch):
    """Put a module in wandb's place that keeps what it is told, in order."""
    told = []
    run = types.SimpleNamespace(
        define_metric=lambda name, **how: told.append(("define_metric", name, how)),
        log=lambda values: told.append(("log", values)),
        finish=lambda **how: told.append(("finish", how)),
    )
    module = types.ModuleType("wandb")
    module.init = lambda **how: told.append(("init", how)) or run
    monkeypatch.setitem(sys.modules, "wandb", module)
    return told


def test_wandb_has_a_clock_for_each_job(wandb, tmp_path):
    (reporter,) = make_reporters(["wandb"], tmp_path, "run")
    reporter.report("a", 7, {"loss": 0.5, "grad_norm": 2.0})
    reporter.report("b", 1, {"loss": 0.25})
    reporter.report("a", 8, {"loss": 0.4})
    reporter.close(failed=False)
    assert wandb == [
        ("init", {"project": "preft-jax", "name": "run", "dir": str(tmp_path)}),
        ("define_metric", "a/*", {"step_metric": "a/step"}),
        ("log", {"a/loss": 0.5, "a/grad_norm": 2.0, "a/step": 7}),
        ("define_metric", "b/*", {"step_metric": "b/step"}),
        ("log", {"b/loss": 0.25, "b/step": 1}),
        ("log", {"a/loss": 0.4, "a/step": 8}),
        ("finish", {"exit_code": 0}),
    ]


@pytest.fixture
def argv(tmp_path):
    data = cases.write_rows(tmp_path / "data.jsonl", [{"prompt": "ab ", "completion": "cd"}] * 3)
    return [
        "--model", "tiny", "--dataset", str(data), "--eval-dataset", str(data), "--eval-steps", "2",
        "--max-length", "32", "--max-steps", "3", "--rank", "2", "--output-dir", str(tmp_path / "out"),
        "--report-to", "tensorboard,wandb",
    ]  # fmt: skip


def test_a_run_sends_what_is_in_its_metrics_to_the_last(argv, wandb, tmp_path):
    assert sft.main(argv) == 0
    rows = read_metrics(tmp_path / "out" / "metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2, 2, 3, 3]
    assert [values for what, values in (one for one in wandb if one[0] == "log")] == [
        {f"adapter/{name}": value for name, value in row.items() if name != "job"} for row in rows
    ]
    assert wandb[0][1]["name"] == "out"
    assert wandb[-1] == ("finish", {"exit_code": 0})
    assert written(tmp_path / "out").count(b"adapter/loss") == 3
    assert written(tmp_path / "out").count(b"adapter/eval_loss") == 2


def test_a_run_that_is_broken_off_is_told_so(argv, wandb, monkeypatch):
    def save(*_):
        raise OSError("no space left")

    monkeypatch.setattr("train.run.interruptible.save_adapter", save)
    assert sft.main(argv) == 1
    assert wandb[-1] == ("finish", {"exit_code": 1})


@pytest.mark.parametrize(("name", "package"), [("tensorboard", "tensorboardX"), ("wandb", "wandb")])
def test_a_reporter_that_is_not_installed_is_told_with_the_remedy(name, package, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ConfigError, match=f"--report-to {name} needs {package}.*pip install"):
        make_reporters([name], tmp_path, "run")


def test_a_reporter_that_is_not_known_is_refused_by_name(tmp_path):
    with pytest.raises(ConfigError, match="'tensorbord'; allowed: tensorboard, wandb"):
        make_reporters(["tensorbord"], tmp_path, "run")
    assert make_reporters([], tmp_path, "run") == []
