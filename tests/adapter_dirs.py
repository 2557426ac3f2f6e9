"""Helpers of the tests of adapter directories."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import safetensors.numpy

from preft_jax.adapters.adapter import Adapter
from preft_jax.adapters.config import AdapterConfig
from preft_jax.adapters.init import random_adapter
from preft_jax.config import PRESETS

MODEL = PRESETS["tiny"]
FIXTURES = Path(__file__).parent / "fixtures" / "peft"
CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"


def make(config: AdapterConfig, rng: np.random.Generator) -> Adapter:
    key = jax.random.wrap_key_data(rng.integers(2**32, size=2, dtype=np.uint32))  # Made of a number, it is compiled.
    return random_adapter(config, MODEL, key)


def assert_same(found: Adapter, expected: Adapter) -> None:
    assert found.config == expected.config
    found_leaves, found_tree = jax.tree.flatten(found.params)
    expected_leaves, expected_tree = jax.tree.flatten(expected.params)
    assert found_tree == expected_tree
    for a, b in zip(found_leaves, expected_leaves, strict=True):
        assert a.dtype == np.float32
        assert a.tobytes() == np.asarray(b, np.float32).tobytes()


def edit_config(directory: Path, change: Callable[[dict[str, Any]], object]) -> None:
    contents = json.loads((directory / CONFIG).read_text())
    change(contents)
    (directory / CONFIG).write_text(json.dumps(contents))


def edit_tensors(directory: Path, change: Callable[[dict[str, np.ndarray]], object]) -> None:
    tensors = safetensors.numpy.load_file(directory / TENSORS)
    change(tensors)
    safetensors.numpy.save_file(tensors, directory / TENSORS)


def copy_fixture(tmp_path: Path, name: str) -> Path:
    return Path(shutil.copytree(FIXTURES / name, tmp_path / name))
