import builtins
import json
import statistics

import pytest

from bench import accuracy, tables

pytestmark = pytest.mark.usefixtures("one_layer_tiny")

TINY = (
    "--model tiny --train-size 6 --held-out 5 --updates 3 --batch-size 2 --rank 4 --max-length 128 --seeds 1,2 "
    "--adapters direft-p:1e-2,loreft-p:1e-2"
)


@pytest.fixture
def copying(monkeypatch):
    """A task in reasoning-gym's place: any text is worth a half, and the true one everything."""
    asked = []

    def load_task(name, options, seed, count):
        asked.append((name, options, seed, count))
        entries = [{"question": f"{n % 15}?", "answer": str(n % 15)} for n in range(count)]
        return accuracy.Task(entries, lambda text, entry: 1.0 if text == entry["answer"] else 0.5, {"copying": "1"})

    monkeypatch.setattr(accuracy, "load_task", load_task)
    return asked


@pytest.fixture
def one_fails(monkeypatch):
    """The last job's loss is no number."""
    step = accuracy.Trainer.step

    def failing(trainer):
        trainer.jobs[-1].failed = "the loss is not finite"
        return step(trainer)

    monkeypatch.setattr(accuracy.Trainer, "step", failing)


def test_every_contender_is_trained_with_every_seed_and_judged(copying, one_fails, capsys, tmp_path):
    path = tmp_path / "figures.json"
    command = [*TINY.split(), "--task", "copy", "--task-options", '{"most": 15}', "--output-json", str(path)]
    command += ["--adapter-dtype", "fp8"]
    assert accuracy.main(command) == 0
    found = json.loads(path.read_text())
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == found
    assert copying == [("copy", {"most": 15}, 0, 22)]
    assert (found["schema"], found["options"]["task_options"]) == (accuracy.SCHEMA, {"most": 15})
    assert {"versions", "device", "commit", "date"} <= set(found)
    base, (direft, loreft) = found["base"], found["rows"]
    assert base["score"] == 0.5 + base["accuracy"] / 2
    assert [(row["adapter"], row["kind"], row["positions"]) for row in (direft, loreft)] == [
        ("direft-p", "direft", "prompt"),
        ("loreft-p", "loreft", "prompt"),
    ]
    losses = [run["eval_loss"] for run in direft["runs"]]
    assert [run["seed"] for run in direft["runs"]] == [1, 2]
    assert losses[0] != losses[1]
    assert direft["eval_loss"] == pytest.approx(statistics.fmean(losses), abs=1e-4)
    assert direft["eval_loss_std"] == pytest.approx(statistics.stdev(losses), abs=1e-4)
    assert direft["eval_loss"] < base["eval_loss"]
    assert [true for _, true in direft["runs"][0]["answers"]] == ["0", "1", "2", "3"]
    # What diverged is named, and left out of the mean.
    assert loreft["runs"][1] == {"seed": 2, "failed": "the loss is not finite"}
    assert (loreft["eval_loss"], loreft["eval_loss_std"]) == (loreft["runs"][0]["eval_loss"], None)
    made = tables.accuracy(found)
    assert made.count("\n| ") == 4
    assert "2 seeds, 5 held-out questions, copying 1" in made
    assert direft["pairs"] == 2 * loreft["pairs"] == 2 * 5
    assert direft["stored_accuracy"] == pytest.approx(direft["accuracy"] + direft["difference"], abs=1e-3)
    assert all(0 < run["stored"]["mean_kl"] < 0.1 for run in direft["runs"])
    assert "10 answers each" in tables.stored_adapters(found)


def test_a_difference_is_that_of_paired_answers():
    runs = [{"right": [1, 1, 0, 0], "stored": {"right": [1, 0, 1, 1], "mean_kl": 0.5}}, {"failed": "nan"}]
    spread = 1.96 * (11 / 16) ** 0.5 / 2
    assert accuracy.difference(runs) == {
        "stored_accuracy": 0.75, "difference": 0.25, "difference_low": pytest.approx(0.25 - spread, abs=1e-4),
        "difference_high": pytest.approx(0.25 + spread, abs=1e-4), "pairs": 4, "stored_mean_kl": 0.5,
    }  # fmt: skip


def test_held_out_questions_are_in_no_training_example():
    entries = [{"question": str(n % 7), "answer": ""} for n in range(20)]
    task = accuracy.Task(entries, lambda text, entry: 0.0, {})
    train, held_out = accuracy.split(task, 4, 3)
    assert len({entry["question"] for entry in [*train, *held_out]}) == 7
    with pytest.raises(accuracy.ConfigError, match="only 7 questions differ and 5 \\+ 3 are needed"):
        accuracy.split(task, 5, 3)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ("--adapters lara:1e-3", "unknown adapter 'lara' (did you mean 'lora'?)"),
        ("--adapters lora", "'lora' has no learning rate"),
        ("--seeds 1,b", "give --seeds such as 1,2,3"),
        ("--task-options {", "a JSON object"),
        ("--updates 0", "--updates is 0"),
    ],
)
def test_what_cannot_be_measured_ends_with_one_line(options, reason, copying, capsys):
    assert accuracy.main([*TINY.split(), *options.split()]) == 1
    assert reason in capsys.readouterr().err


def test_without_reasoning_gym_the_extra_is_named(monkeypatch, capsys):
    real = builtins.__import__

    def missing(name, *rest, **more):
        if name == "reasoning_gym":
            raise ModuleNotFoundError(name)
        return real(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", missing)
    assert accuracy.main([]) == 1
    assert "install the extra 'rl'" in capsys.readouterr().err


def test_a_task_of_reasoning_gym_judges_its_own_answers():
    pytest.importorskip("reasoning_gym")
    task = accuracy.load_task("chain_sum", {"max_terms": 2}, 0, 5)
    assert [task.score(entry["answer"], entry) for entry in task.entries] == [1.0] * 5
    assert task.score("none", task.entries[0]) == 0.0
    for name, options in (("no-such-task", {}), ("chain_sum", {"no_such_option": 1}), ("chain_sum", {"min_terms": 0})):
        with pytest.raises(accuracy.ConfigError, match="reasoning-gym cannot make the task"):
            accuracy.load_task(name, options, 0, 5)
