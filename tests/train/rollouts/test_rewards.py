"""Rewards in a process of their own: what one does wrong costs its own sample alone."""

import dataclasses
import os
import time
from pathlib import Path

import pytest
import rollout_cases as cases

from preft_jax import AdapterConfig, ConfigError
from train.rollouts import builtin, gym
from train.rollouts.rewarding import Rewarder
from train.rollouts.rewards import Question, RewardProcess
from train.rollouts.worker import find

REWARDS = """
import os, subprocess, sys, time

def reward(prompt, completion, *, what="", pids=None):
    print("a line of its own")
    sys.stdin.read()
    if what == "raise":
        raise ValueError("no such thing")
    if what == "hang":
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
        open(pids, "w").write(f"{os.getpid()} {child.pid}")
        time.sleep(600)
    if what == "die":
        os._exit(3)
    if what in ("nan", "inf"):
        return float(what)
    if what == "text":
        return "much"
    return len(completion) + (prompt == "twice") * len(completion)
"""


@pytest.fixture
def spec(tmp_path, monkeypatch):
    (tmp_path / "own_rewards.py").write_text(REWARDS)
    monkeypatch.syspath_prepend(str(tmp_path))
    return "own_rewards:reward"


def lives(pid):
    """Whether a process runs: one that ended and that nobody has asked about does not."""
    status = Path(f"/proc/{pid}/stat")
    return status.exists() and status.read_text().rpartition(")")[2].split()[0] != "Z"


def test_what_a_reward_does_wrong_costs_its_own_sample_alone(spec, tmp_path):
    pids = tmp_path / "pids"
    wrong = ("raise", "hang", "die", "nan", "inf", "text")
    questions = [Question("twice", "abc", {})]
    for what in wrong:
        questions += [Question("p", "", {"what": what, "pids": str(pids)}), Question("p", "abcd", {})]
    with RewardProcess(spec, timeout=3.0) as process:
        first, *rest = process.rewards(questions)
    assert first == (6.0, None)
    assert all(found == (4.0, None) for found in rest[1::2])
    assert all(found.value is None for found in rest[::2])
    told = [str(found.error) for found in rest[::2]]
    for text, part in zip(
        told,
        ("ValueError: no such thing", "longer than 3 s", "its process ended", "is nan", "is inf", "could not convert"),
        strict=True,
    ):
        assert part in text
    until = time.monotonic() + 10
    while any(map(lives, pids.read_text().split())) and time.monotonic() < until:
        time.sleep(0.01)
    assert not any(map(lives, pids.read_text().split())), "nothing that a reward has started is left"


def test_a_reward_that_is_not_there_is_told_at_once(spec):
    for name, part in (("own_rewards:other", "no attribute 'other'"), ("no_such_module:f", "No module named")):
        with RewardProcess(name, timeout=1.0) as process, pytest.raises(ConfigError, match=part):
            process.start()


def test_samples_get_their_rewards_less_what_they_lose_for_their_length(spec, tiny_text, rng):
    job = cases.job(tiny_text, AdapterConfig(rank=2), soft_punish_cache=4, num_generations=3)
    job.task = dataclasses.replace(job.task, reward=spec)
    groups = cases.groups(rng, 1, 3)
    fine, cut, bad = groups[0].samples
    fine.text, fine.token_ids, cut.text, cut.token_ids = "abc", [1, 2], "ab", [1] * cases.COMPLETION
    bad.error = "it was not sampled"
    for sample in groups[0].samples:
        sample.reward = float("nan")
    with Rewarder() as rewarder:
        rewarder.start([job])
        rewarder.reward(job, groups)
        assert (fine.reward, cut.reward, bad.error) == (3.0, 1.0, "it was not sampled")
        assert bad.reward != bad.reward
        rewarder.reward(job, groups, punish=False)
        assert (fine.reward, cut.reward) == (3.0, 2.0)


def test_the_built_in_task_has_a_way_up_and_holds_words_out():
    prompts = [builtin.prompt(0, place, held_out=False) for place in range(300)]
    held_out = [builtin.prompt(0, place, held_out=True) for place in range(30)]
    assert not {row["word"] for _, row in prompts} & {row["word"] for _, row in held_out}
    assert all(row["word"] in messages[-1]["content"] for messages, row in prompts)
    assert prompts[:5] == [builtin.prompt(0, place, held_out=False) for place in range(5)]
    assert prompts != [builtin.prompt(1, place, held_out=False) for place in range(300)]
    texts = ("", "Here it comes", "The lamp is bright.", "Lamp, lamp!", "lamp")
    found = [builtin.reward("", text, word="lamp") for text in texts]
    assert found == [0, 0, 0.25, 1, 1]
    assert find("train.rollouts.builtin:reward") is builtin.reward


def test_questions_of_reasoning_gym_are_scored_by_its_own_scorers():
    pytest.importorskip("reasoning_gym")
    entry = gym.dataset("chain_sum", 5)[3]
    row = {"name": "chain_sum", "seed": 5, "index": 3}
    for completion, reward in (
        (entry["answer"], 1.0),
        (f"<answer>0</answer> so <answer>\n{entry['answer']} </answer>.", 1.0),
        ("-1", 0.0),
    ):
        assert gym.reward(entry["question"], completion, **row) == reward
    with pytest.raises(ConfigError, match="the task reasoning_gym:no_such cannot be made"):
        gym.dataset("no_such", 0)


def test_the_reward_finds_what_this_process_finds_and_no_device(tmp_path, monkeypatch):
    (tmp_path / "looks.py").write_text(
        "import os\ndef reward(p, c): return float(os.environ['JAX_PLATFORMS'] == 'cpu')"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setitem(os.environ, "JAX_PLATFORMS", "cuda")
    with RewardProcess("looks:reward", timeout=5.0) as process:
        assert process.rewards([Question("", "", {})]) == [(1.0, None)]
