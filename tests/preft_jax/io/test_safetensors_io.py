"""One safetensors file: what goes in comes out, and every bad file is an error of the caller's kind."""

import contextlib
import os
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from tensor_files import read_safetensors

from preft_jax.errors import AdapterError, ModelError
from preft_jax.io.safetensors_io import serialize_safetensors, write_file

pytestmark = pytest.mark.host

ADVICE = "get the file again"
DTYPES = (np.float32, np.float16, jnp.bfloat16, np.float64, np.int32, np.uint8, np.bool_)


def random_tensors(rng: np.random.Generator) -> dict[str, np.ndarray]:
    return {
        "matrix": rng.standard_normal((3, 5)).astype(np.float32),
        "scalar": np.array(rng.standard_normal(), np.float16),
        "empty": np.zeros((0, 4), np.float32),
        "half": rng.standard_normal(7).astype(jnp.bfloat16),
    }


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_dtype_comes_back_bit_for_bit(tmp_path: Path, dtype: type, rng: np.random.Generator) -> None:
    array = rng.integers(0, 2, (4, 3)).astype(dtype)
    write_file(tmp_path / "x.safetensors", serialize_safetensors({"x": array}), error=AdapterError)
    found = read_safetensors(tmp_path / "x.safetensors", error=AdapterError, advice=ADVICE)["x"]
    assert found.dtype == array.dtype
    assert found.tobytes() == array.tobytes()


def test_shapes_come_back_and_other_readers_agree(tmp_path: Path, rng: np.random.Generator) -> None:
    tensors = random_tensors(rng)
    path = tmp_path / "x.safetensors"
    write_file(path, serialize_safetensors(tensors, {"format": "pt"}), error=AdapterError)
    found = read_safetensors(path, error=AdapterError, advice=ADVICE)
    theirs = safetensors.numpy.load_file(path)
    assert set(found) == set(theirs) == set(tensors)
    for name, tensor in tensors.items():
        assert found[name].shape == tensor.shape
        np.testing.assert_array_equal(found[name], tensor)
        np.testing.assert_array_equal(theirs[name], tensor)


def test_strided_arrays_are_written_in_their_own_order(tmp_path: Path, rng: np.random.Generator) -> None:
    transposed = rng.standard_normal((4, 6)).astype(np.float32).T
    write_file(tmp_path / "x.safetensors", serialize_safetensors({"x": transposed}), error=AdapterError)
    found = read_safetensors(tmp_path / "x.safetensors", error=AdapterError, advice=ADVICE)
    np.testing.assert_array_equal(found["x"], transposed)


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: b"",
        lambda data: data[:5],
        lambda data: data[:-1],
        lambda data: data + b"\0",
        lambda data: b"\xff" * 8 + data[8:],
        lambda data: data[:8] + b"]" + data[9:],
        lambda data: b"PK\x03\x04" + data,
        lambda data: data.replace(b'"F32"', b'"F99"', 1),
    ],
    ids=["empty", "cut in the length", "cut in the data", "longer", "huge header", "bad JSON", "zip", "unknown dtype"],
)
@pytest.mark.parametrize("error", [AdapterError, ModelError])
def test_damaged_files_are_named(tmp_path: Path, damage, error: type, rng: np.random.Generator) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(damage(serialize_safetensors(random_tensors(rng))))
    with pytest.raises(error, match=r"x\.safetensors.*get the file again") as raised:
        read_safetensors(path, error=error, advice=ADVICE)
    assert type(raised.value) is error


def test_random_damage_is_an_error_or_harmless(tmp_path: Path, rng: np.random.Generator) -> None:
    data = serialize_safetensors(random_tensors(rng))
    header = 8 + int.from_bytes(data[:8], "little")
    path = tmp_path / "x.safetensors"
    for _ in range(200):
        damaged = bytearray(data)
        damaged[rng.integers(header)] = rng.integers(256)
        path.write_bytes(damaged)
        with contextlib.suppress(AdapterError):
            read_safetensors(path, error=AdapterError, advice=ADVICE)


def test_unknown_float_dtype_is_named(tmp_path: Path) -> None:
    tensors = {"x": np.zeros(4, jnp.float8_e5m2)}
    (tmp_path / "x.safetensors").write_bytes(safetensors.numpy.save(tensors))
    with pytest.raises(AdapterError, match=r"x has dtype F8_E5M2; allowed: .*BF16"):
        read_safetensors(tmp_path / "x.safetensors", error=AdapterError, advice=ADVICE)


@pytest.mark.parametrize("kind", ["missing", "directory"])
def test_unreadable_paths_are_named(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "x.safetensors"
    if kind == "directory":
        path.mkdir()
    with pytest.raises(AdapterError, match=r"x\.safetensors .*get the file again"):
        read_safetensors(path, error=AdapterError, advice=ADVICE)


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x"
    write_file(path, b"old", error=AdapterError)

    def full(source: object, target: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(AdapterError, match="cannot be written: No space left on device"):
        write_file(path, b"new", error=AdapterError)
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["x"]


def test_written_files_have_ordinary_permissions(tmp_path: Path) -> None:
    (tmp_path / "ordinary").write_bytes(b"")
    write_file(tmp_path / "ours", b"", error=AdapterError)
    assert (tmp_path / "ours").stat().st_mode == (tmp_path / "ordinary").stat().st_mode
