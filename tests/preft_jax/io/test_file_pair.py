"""Saves of an adapter directory: a crash or an error at any step leaves one whole adapter."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from adapter_dirs import CONFIG, MODEL, assert_same, make

from preft_jax.adapters.adapter import Adapter
from preft_jax.adapters.config import AdapterConfig
from preft_jax.errors import AdapterError
from preft_jax.io import file_pair
from preft_jax.io.adapter_files import load_adapter, save_adapter

pytestmark = pytest.mark.host

OLD = AdapterConfig(rank=4)
NEW = AdapterConfig(rank=3, targets=("v", "q"), layers=(2, 0), positions="f3+l2", alpha=7.5)
THIRD = AdapterConfig(kind="loreft", rank=3)


class PowerCut(BaseException):
    """Nothing after it runs: not even cleaning up."""


def cut_power_at(monkeypatch: pytest.MonkeyPatch, step: int, error: type[BaseException]) -> None:
    """Make the ``step``-th rename raise, and after a power cut every later change of the disk too."""
    renames = 0

    def guard(change: Callable[..., Any]) -> Callable[..., Any]:
        def guarded(*args: Any, **kwargs: Any) -> Any:
            nonlocal renames
            renames += change is os_replace
            if renames == step if change is os_replace else error is PowerCut and renames >= step:
                raise error("power cut")
            return change(*args, **kwargs)

        return guarded

    os_replace = os.replace
    monkeypatch.setattr(os, "replace", guard(os.replace))
    for name in ("unlink", "rmdir"):
        monkeypatch.setattr(Path, name, guard(getattr(Path, name)))


@pytest.mark.parametrize("step", range(1, 5))
@pytest.mark.parametrize("error", [PowerCut, OSError])
def test_a_crash_at_any_step_leaves_one_whole_adapter(
    tmp_path: Path, step: int, error: type[BaseException], rng: np.random.Generator
) -> None:
    old, new, third = (make(config, rng) for config in (OLD, NEW, THIRD))
    save_adapter(tmp_path, old)
    (tmp_path / "README.md").write_text("keep me")
    with pytest.MonkeyPatch.context() as monkeypatch:
        cut_power_at(monkeypatch, step, error)
        with pytest.raises((PowerCut, AdapterError)):
            save_adapter(tmp_path, new)
    left = load_adapter(tmp_path, MODEL)
    assert_same(left, new if step == 4 else old)
    save_adapter(tmp_path, third)
    assert_same(load_adapter(tmp_path, MODEL), third)
    assert (tmp_path / "README.md").read_text() == "keep me"
    assert not [name for name in os.listdir(tmp_path) if name.endswith(".next")]


@pytest.mark.parametrize("step", range(1, 5))
def test_a_crash_in_the_first_save_leaves_no_half_adapter(tmp_path: Path, step: int, rng: np.random.Generator) -> None:
    adapter = make(OLD, rng)
    with pytest.MonkeyPatch.context() as monkeypatch:
        cut_power_at(monkeypatch, step, PowerCut)
        with pytest.raises(PowerCut):
            save_adapter(tmp_path / "a", adapter)
    if step < 4:
        with pytest.raises(AdapterError, match="does not exist"):
            load_adapter(tmp_path / "a", MODEL)
    save_adapter(tmp_path / "a", adapter)
    assert_same(load_adapter(tmp_path / "a", MODEL), adapter)


def test_a_failed_first_save_leaves_no_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rng: np.random.Generator
) -> None:
    cut_power_at(monkeypatch, 2, OSError)
    with pytest.raises(AdapterError, match="cannot be written"):
        save_adapter(tmp_path / "a", make(OLD, rng))
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize("same_config", [True, False])
@pytest.mark.parametrize("has_old", [True, False])
@pytest.mark.parametrize("error", [PowerCut, OSError])
def test_an_adapter_that_is_copied_over_an_interrupted_save_is_the_one_that_is_read(
    tmp_path: Path, same_config: bool, has_old: bool, error: type[BaseException], rng: np.random.Generator
) -> None:
    old, new, other, last = (make(config, rng) for config in (NEW, NEW, NEW if same_config else OLD, THIRD))
    if has_old:
        save_adapter(tmp_path / "a", old)
    save_adapter(tmp_path / "other", other)
    with pytest.MonkeyPatch.context() as monkeypatch:
        cut_power_at(monkeypatch, 4, error)
        with pytest.raises((PowerCut, AdapterError)):
            save_adapter(tmp_path / "a", new)
    shutil.copytree(tmp_path / "a", tmp_path / "moved")
    assert_same(load_adapter(tmp_path / "moved", MODEL), new)
    shutil.copytree(tmp_path / "other", tmp_path / "a", dirs_exist_ok=True)
    assert_same(load_adapter(tmp_path / "a", MODEL), other)
    with pytest.MonkeyPatch.context() as monkeypatch:
        cut_power_at(monkeypatch, 3, error)
        with pytest.raises((PowerCut, AdapterError)):
            save_adapter(tmp_path / "a", last)
    assert_same(load_adapter(tmp_path / "a", MODEL), other)
    save_adapter(tmp_path / "a", last)
    assert sorted(os.listdir(tmp_path / "a")) == [CONFIG, "adapter_model.safetensors"]


def test_a_refused_save_leaves_the_old_adapter(tmp_path: Path, rng: np.random.Generator) -> None:
    old = make(OLD, rng)
    save_adapter(tmp_path, old)
    broken = Adapter(old.config, jax.tree.map(lambda x: x * np.nan, old.params))
    with pytest.raises(AdapterError, match="not finite"):
        save_adapter(tmp_path, broken)
    assert_same(load_adapter(tmp_path, MODEL), old)


def test_a_path_that_is_a_file_is_an_error(tmp_path: Path, rng: np.random.Generator) -> None:
    (tmp_path / "a").write_text("")
    with pytest.raises(AdapterError, match="cannot be written"):
        save_adapter(tmp_path / "a", make(OLD, rng))
    assert (tmp_path / "a").exists()


def test_a_reader_beside_a_writer_sees_whole_adapters(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rng: np.random.Generator
) -> None:
    """Replace the adapter between a reader's look at the config and at the tensors."""
    old, new = make(OLD, rng), make(THIRD, rng)
    save_adapter(tmp_path, old)
    read_bytes, saves = file_pair.read_bytes, [new]

    def read_then_replace(path: Path, **options: Any) -> bytes:
        data = read_bytes(path, **options)
        if path.name == CONFIG and saves:
            save_adapter(tmp_path, saves.pop())
        return data

    monkeypatch.setattr(file_pair, "read_bytes", read_then_replace)
    assert_same(load_adapter(tmp_path, MODEL), new)
