"""The programs that a new user runs first, on the real model."""

import json
import runpy
from pathlib import Path

import pytest

from train import sft
from train.run.log import read_metrics

pytestmark = pytest.mark.slow


def test_the_built_in_task_is_learned(smollm2, tmp_path):
    assert sft.main(["--output-dir", str(tmp_path / "out"), "--eval-steps", "0"]) == 0
    rows = read_metrics(tmp_path / "out" / "metrics.jsonl")
    assert rows[-1]["eval_loss"] < 0.05 < 2 < rows[0]["loss"]
    assert rows[-1]["exact_match"] >= 0.9
    assert (
        json.loads((tmp_path / "out" / "adapter" / "adapter_config.json").read_text())["preft"]["positions"] == "prompt"
    )


def test_the_teaching_loop_teaches(smollm2, capsys):
    teach = runpy.run_path(str(Path(__file__).parents[3] / "examples" / "teach.py"))
    teach["main"]()
    told = capsys.readouterr().out
    assert "adapter: '[owl] hoots!'" in told
    assert "base:    '[owl] hoots!'" not in told
