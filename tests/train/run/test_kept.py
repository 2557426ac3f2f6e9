"""A run's options and checkpoints, damaged: noticed, and taken from what is whole."""

import errno
import json
import os
import random
import shutil

import numpy as np
import pytest

from preft_jax.errors import ConfigError
from train.checkpoint import Checkpoints
from train.run.directory import RunDirectory
from train.run.kept import OPTIONS_FILE, read_options, write_options
from train.run.options import make_parser, settings
from train.step import Slots

pytestmark = pytest.mark.host

GIVEN = {"model": "tiny", "rank": 8, "learning_rate": 1e-3, "shuffle": False, "jobs": [{"name": "ann", "rank": 4}]}
STATE = Slots({"a": np.arange(20, dtype=np.float32)}, {"m": np.zeros(3, np.float32)})


def flip(data, rng):
    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)


def zero(data, rng):
    start, size = rng.randrange(len(data)), rng.choice((1, 16, 512))
    data[start : start + size] = bytes(len(data[start : start + size]))


def cut(data, rng):
    del data[rng.randrange(len(data)) :]


def digit(data, rng):
    data[rng.choice([i for i, byte in enumerate(data) if chr(byte).isalnum()])] = rng.choice(b"0123456789abcdef")


WAYS = (flip, zero, cut, digit)


def checkpoint(directory, meta, step=1):
    checkpoints = Checkpoints(directory / "checkpoints", keep=3)
    checkpoints.save(step, meta, {"one": STATE})
    checkpoints.close()


def test_options_are_read_back(tmp_path):
    write_options(tmp_path, GIVEN, "abc")
    assert read_options(tmp_path) == (GIVEN, "abc", ())


def test_damaged_options_are_always_noticed(tmp_path):
    write_options(tmp_path, GIVEN, "abc")
    whole, rng, damaged = (tmp_path / OPTIONS_FILE).read_bytes(), random.Random(0), 0
    while damaged < 1000:
        data = bytearray(whole)
        WAYS[damaged % 4](data, rng)
        if data.strip() == whole.strip():
            continue
        damaged += 1
        (tmp_path / OPTIONS_FILE).write_bytes(data)
        with pytest.raises(ConfigError, match=r"no run in .* to resume"):
            read_options(tmp_path)


@pytest.mark.parametrize("content", [b"{", b"\0" * 300, b"[]", b"{}", json.dumps(GIVEN).encode(), None])
def test_damaged_options_are_those_of_the_newest_checkpoint(content, tmp_path):
    checkpoint(tmp_path, {"options": GIVEN, "run": "abc"}, step=7)
    if content is not None:
        (tmp_path / OPTIONS_FILE).write_bytes(content)
    given, run, (said,) = read_options(tmp_path)
    assert (given, run) == (GIVEN, "abc")
    assert "options.json is not whole" in said
    assert said.endswith("the options of the checkpoint of step 7 count")


def test_a_resumed_run_says_where_its_options_come_from(tmp_path):
    checkpoint(tmp_path, {"options": {"rank": 8, "max_steps": 9}, "run": "abc"})
    (tmp_path / OPTIONS_FILE).write_text("{}")
    found = settings(make_parser("Trains."), ["--output-dir", str(tmp_path), "--resume", "--rank", "4"])
    assert (found.run, found.given["max_steps"], found.given["rank"]) == ("abc", 9, 4)
    assert "options.json is not whole" in found.changes[0]
    assert found.changes[1:] == ("rank: 4 instead of 8",)


@pytest.mark.parametrize("step", ["write", "replace", "fsync"])
def test_options_that_cannot_be_written_leave_those_that_were_there(step, tmp_path, monkeypatch):
    write_options(tmp_path, GIVEN, "abc")

    def fail(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("builtins.open" if step == "write" else f"os.{step}", fail)
        with pytest.raises(ConfigError, match="No space left"):
            write_options(tmp_path, GIVEN | {"rank": 1}, "abc")
    assert read_options(tmp_path).given == GIVEN
    assert os.listdir(tmp_path) == [OPTIONS_FILE]


def test_checkpoints_without_their_options_are_not_written_over(tmp_path):
    checkpoint(tmp_path, {"options": GIVEN, "run": "abc"})
    with pytest.raises(ConfigError, match="holds a run; go on with --resume"):
        RunDirectory(tmp_path, ["ann"], named=True).prepare(resume=False, overwrite=False)


def test_what_a_checkpoint_says_of_its_run_is_checked(tmp_path, caplog):
    """Options, jobs and their steps; the one before counts."""
    for step in (1, 2):
        checkpoint(tmp_path, {"options": GIVEN, "run": "abc", "jobs": {"one": {"step": step}}}, step=step)
    newest = tmp_path / "checkpoints" / "2"
    shutil.copytree(newest, tmp_path / "whole")
    whole, rng = (newest / "meta" / "metadata").read_bytes(), random.Random(0)
    for number in range(60):
        data = bytearray(whole)
        WAYS[number % 4](data, rng)
        if data == whole:
            continue
        caplog.clear()
        shutil.copytree(tmp_path / "whole", newest, dirs_exist_ok=True)  # A damaged one is deleted.
        (newest / "meta" / "metadata").write_bytes(data)
        checkpoints = Checkpoints(tmp_path / "checkpoints", keep=3)
        found = checkpoints.latest()
        checkpoints.close()
        assert found.step == 1
        assert found.meta["jobs"] == {"one": {"step": 1}}
        assert "the checkpoint of step 2 is damaged" in caplog.text


def test_a_checkpoint_in_place_of_another_is_noticed(tmp_path, caplog):
    for step in (1, 2):
        checkpoint(tmp_path, {"options": GIVEN, "run": "abc"}, step=step)
    os.rename(tmp_path / "checkpoints" / "1", tmp_path / "checkpoints" / "3")
    checkpoints = Checkpoints(tmp_path / "checkpoints", keep=3)
    assert checkpoints.latest().step == 2
    assert "it is the one of step 1" in caplog.text
    checkpoints.close()
