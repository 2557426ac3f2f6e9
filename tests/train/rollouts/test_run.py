"""The program: what it leaves, runs that are interrupted and resumed, and several jobs over one engine."""

import json
import os
import re
import signal
import sys
import time

import pytest

from train import rl
from train.rollouts import loop
from train.run.log import read_metrics

pytestmark = pytest.mark.usefixtures("one_layer_tiny")

ADAPTER = ("adapter_config.json", "adapter_model.safetensors")

REWARD = '''
def reward(prompt, completion, *, worth):
    """Return something that differs from sample to sample."""
    if worth == 0:
        raise ValueError("this one has no worth")
    return worth * (sum(map(ord, completion)) % 7) / 7
'''


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    """Return a folder with a reward and a dataset of prompts, for all runs."""
    folder = tmp_path_factory.mktemp("own")
    (folder / "worths.py").write_text(REWARD)
    rows = [{"prompt": f"word {i}: ", "worth": i % 3} for i in range(7)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(folder))
        yield folder


def arguments(own, out, *more):
    data = str(own / "rows.jsonl")
    return [
        "--model", "tiny", "--task", "worths:reward", "--dataset", data, "--eval-dataset", data,
        "--output-dir", str(out), "--rank", "4", "--targets", "q,down", "--num-generations", "3", "--max-steps", "4",
        "--save-steps", "2", "--per-device-train-batch-size", "6", "--gradient-accumulation-steps", "1",
        "--max-prompt-length", "16", "--max-completion-length", "6", "--num-iterations", "2", "--eval-steps", "3",
        "--num-eval-prompts", "3", "--num-generations-eval", "2", "--learning-rate", "1e-2", *more,
    ]  # fmt: skip


@pytest.fixture(scope="module")
def whole(own, tmp_path_factory):
    """Return the files of a run that nothing interrupted."""
    out = tmp_path_factory.mktemp("whole") / "out"
    assert rl.main(arguments(own, out, "--report-to", "tensorboard")) == 0
    return out


def left(out):
    """Return what a run leaves, without what depends on the clock."""
    rows = [
        {name: value for name, value in row.items() if not name.endswith("_seconds")}
        for row in read_metrics(out / "metrics.jsonl")
    ]
    files = [(out / "adapter" / name).read_bytes() for name in ADAPTER]
    return rows, files, (out / "transcripts.txt").read_text()


def test_a_run_leaves_adapter_metrics_picture_transcripts_and_results(whole):
    assert {path.name for path in whole.iterdir()} == {
        "adapter", "checkpoints", "metrics.jsonl", "options.json", "results.json", "reward.png", "tensorboard",
        "transcripts.txt",
    }  # fmt: skip
    assert (whole / "reward.png").read_bytes()[:4] == b"\x89PNG"
    rows, _, transcripts = left(whole)
    learned = [row for row in rows if "loss" in row]
    assert [row["step"] for row in learned] == [1, 2, 3, 4]
    assert [row["step"] for row in rows if "eval_reward" in row] == [0, 3, 4]
    assert all(row["sampling_logp_difference/max"] < 1e-4 for row in learned)
    assert all((row["sampling_logp_difference/std"] > 0) == (row["samples"] > 0) for row in learned)
    assert {row["samples_dropped"] for row in learned} >= {0, 6}, "a step without any samples is one too"
    assert all(row["samples"] + row["samples_dropped"] == 6 for row in learned)
    assert [line for line in transcripts.splitlines() if line[:1] == "="] == [
        f"=== step {step}, adapter" for step in (1, 2, 3, 4)
    ]
    assert "--- best: reward" in transcripts
    assert "no reward: ValueError: this one has no worth" in transcripts
    results = json.loads((whole / "results.json").read_text())["jobs"]["adapter"]
    first, last = (row["eval_reward"] for row in rows if row.get("eval_reward") is not None and row["step"] in (0, 4))
    assert (results["first_reward"]["mean"], results["last_reward"]["mean"]) == (first, last)
    assert results["rise"]["mean"] == pytest.approx(last - first)
    assert results["rise"]["low"] <= results["rise"]["mean"] <= results["rise"]["high"]


@pytest.mark.parametrize("step", [1, 2, 3])
@pytest.mark.parametrize("how", ["interrupted", "killed"])
def test_a_run_that_ends_at_any_step_and_is_resumed_is_the_whole_one(step, how, own, whole, tmp_path, monkeypatch):
    out, real = tmp_path / "out", loop.learn

    def patched(trainer, given):
        patched.count += 1
        if patched.count == step + (how == "killed"):
            if how == "killed":
                raise SystemExit("killed")
            os.kill(os.getpid(), signal.SIGINT)
        return real(trainer, given)

    patched.count = 0
    with monkeypatch.context() as patch:
        patch.setattr(loop, "learn", patched)
        if how == "killed":
            with pytest.raises(SystemExit):
                rl.main(arguments(own, out))
        else:
            assert rl.main(arguments(own, out)) == 130
    assert not (out / "adapter").exists()
    assert rl.main(["--resume", "--output-dir", str(out)]) == 0
    assert left(out) == left(whole)


@pytest.mark.parametrize("most", [1, 2])
def test_samples_are_drawn_beside_training_by_the_adapter_of_so_many_steps_before(most, own, tmp_path, monkeypatch):
    """The next batch is begun before this one is learned. A run that is resumed has its own adapter draw at first."""
    out, drew, learned, begun = tmp_path / "out", [], [], []
    real_draw, real_learn = loop.Drawing._draw, loop.learn

    def draw(self, asked, adapters, punish):
        if punish:
            drew.append(adapters[next(iter(adapters))].digest)
        return real_draw(self, asked, adapters, punish)

    def learn(trainer, given):
        (job,) = given
        learned.append(trainer.adapter_of(job).digest)
        steps = job.steps - (2 if "--resume" in sys.argv else 0)
        wanted, until = min(len(learned) + most, steps), time.monotonic() + 60
        while len(drew) < wanted and time.monotonic() < until:
            time.sleep(0.01)
        begun.append(len(drew))
        if job.batch == 1 and "--resume" not in sys.argv:
            os.kill(os.getpid(), signal.SIGINT)
        return real_learn(trainer, given)

    monkeypatch.setattr(loop.Drawing, "_draw", draw)
    monkeypatch.setattr(loop, "learn", learn)
    assert rl.main(arguments(own, out, "--max-staleness", str(most), "--eval-steps", "0")) == 130
    versions = [learned[max(0, batch - most)] for batch in range(2 + most)]
    assert drew == versions[:4]
    assert begun == [min(1 + most, 4), min(2 + most, 4)]
    drew.clear(), learned.clear()
    monkeypatch.setattr("sys.argv", ["train.rl", "--resume"])
    assert rl.main(["--resume", "--output-dir", str(out)]) == 0
    assert drew == [learned[0]] * 2, "the last two steps are as near as can be"
    rows = [row for row in left(out)[0] if "loss" in row]
    assert [row["staleness"] for row in rows] == [0, 1, 0, 1]
    for row in rows:
        assert (row["sampling_logp_difference/max"] > 1e-4) == (row["staleness"] > 0 and row["samples"] > 0)


def test_jobs_share_engine_and_micro_batches_and_each_learns_as_if_alone(own, whole, tmp_path, monkeypatch):
    jobs, out = tmp_path / "jobs.yaml", tmp_path / "out"
    jobs.write_text(
        "jobs:\n- {name: ann}\n- {name: bob, seed: 5}\n"
        "- {name: eve, algorithm: rloo, num_iterations: 1, max_steps: 2}\n"
    )
    shared, real = [], loop.Trainer.forward_backward

    def counted(self, rows, loss="cross_entropy"):
        shared.append((loss.partition("(")[0], sorted(job.name for job in rows)))
        return real(self, rows, loss)

    monkeypatch.setattr(loop.Trainer, "forward_backward", counted)
    assert rl.main(arguments(own, out, "--jobs", str(jobs), "--eval-steps", "0")) == 0
    assert set(map(str, shared)) == {"('grpo', ['ann', 'bob'])", "('rloo', ['eve'])"}
    rows = [row for row in read_metrics(out / "metrics.jsonl") if "loss" in row]
    alone = [row for row in left(whole)[0] if "loss" in row]
    ann = [row for row in rows if row["job"] == "ann"]
    assert [row["step"] for row in ann] == [1, 2, 3, 4]
    assert ann[0]["reward"] == alone[0]["reward"]
    assert ann[0]["loss"] == pytest.approx(alone[0]["loss"], abs=1e-4)
    assert [row["step"] for row in rows if row["job"] == "eve"] == [1, 2]
    assert all((out / name / "adapter" / ADAPTER[1]).exists() for name in ("ann", "bob", "eve"))


@pytest.mark.parametrize(
    ("argv", "told"),
    [
        (["--task", "worths"], "task is 'worths'; give builtin, reasoning_gym:NAME, or a reward's module:function"),
        (["--task", "worths:reward"], "needs prompts; give a dataset"),
        (["--task", "builtin", "--dataset", "a.jsonl"], "the task has prompts of its own; leave dataset out"),
        (["--num-generations", "7"], "a step has 32 samples .* no multiple of num_generations 7"),
        (["--max-steps", "0"], "max_steps is 0; give at least 1"),
        (["--max-staleness", "-1"], "max_staleness is -1; give at least 0"),
        (["--max-staleness", "1", "--importance-sampling-cap", "0"], "give a cap above 0, or max_staleness 0"),
        (["--top_p", "0.9"], "tokens are drawn from the whole distribution"),
        (["--epsilonn", "0.9"], r"unknown option --epsilonn \(did you mean --epsilon"),
    ],
)
def test_what_cannot_work_is_refused_with_what_to_do(argv, told, capsys):
    try:
        status = rl.main(argv)
    except SystemExit as error:
        status = error.code
    assert status == 2
    assert re.search(told, capsys.readouterr().err)


def test_a_reward_that_is_not_there_ends_the_run_before_it_begins(own, tmp_path, capsys):
    assert rl.main([*arguments(own, tmp_path / "out"), "--task", "worths:other"]) == 1
    assert "the reward worths:other cannot be loaded" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_the_built_in_task_is_learned(tmp_path):
    """As README has it; on words that were not trained on."""
    assert rl.main(["--output-dir", str(tmp_path / "out")]) == 0
    found = json.loads((tmp_path / "out" / "results.json").read_text())["jobs"]["adapter"]
    assert found["rise"]["low"] > 0
    assert found["last_reward"]["low"] > found["first_reward"]["high"]
