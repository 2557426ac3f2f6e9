"""A process with a fine-tuning job is killed at random moments, again and again: it ends as one that never was."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import service_cases as cases

pytestmark = pytest.mark.slow

KILLS = 20
PROGRAM = Path(__file__).with_name("killed.py")


def start(directory, rows):
    return subprocess.Popen(
        [sys.executable, str(PROGRAM), str(directory), str(rows)], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        text=True, env=os.environ | {"PYTHONPATH": str(PROGRAM.parents[3])},
    )  # fmt: skip


def finish(directory, rows):
    """Run the program to its end; return its last line, and how long that took after it had begun."""
    process = start(directory, rows)
    assert process.stdout.readline() == "begun\n", process.stderr.read()
    begun = time.monotonic()
    out, error = process.communicate(timeout=600)
    assert process.returncode == 0, error
    return out.splitlines()[-1], time.monotonic() - begun


def test_a_killed_process_loses_no_more_than_its_last_checkpoint_interval(tmp_path, rng):
    rows = cases.write_rows(tmp_path / "rows.jsonl")
    finish(tmp_path / "first", rows)  # It compiles.
    expected, seconds = finish(tmp_path / "whole", rows)
    assert re.match(r"succeeded 30 \d+ [0-9a-f]{64}", expected)
    directory, kills, learned = tmp_path / "killed", 0, 0
    while kills < KILLS:
        process = start(directory, shutil.copy(rows, tmp_path / "upload.jsonl"))
        assert process.stdout.readline() == "begun\n", process.stderr.read()
        (tmp_path / "upload.jsonl").unlink()
        try:
            process.wait(rng.uniform(0, 1.2 * seconds))
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.communicate()
            kills += 1
            steps = [int(path.name) for path in directory.glob("jobs/*/state/[0-9]*") if path.name.isdigit()]
            assert max(steps, default=learned) >= learned, "what was learned is not lost"
            learned = max(steps, default=learned)
            continue
        assert process.returncode == 0, process.stderr.read()
        assert process.communicate()[0].splitlines()[-1] == expected
        shutil.rmtree(directory)
        learned = 0
    assert finish(directory, rows)[0] == expected
