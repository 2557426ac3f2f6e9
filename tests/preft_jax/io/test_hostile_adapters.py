"""Adapter directories from strangers: every bad one is an ``AdapterError``, and little is read before it is known."""

import json
import os
import stat
import struct
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from adapter_dirs import CONFIG, MODEL, TENSORS, copy_fixture, edit_config, make

from preft_jax.adapters.config import AdapterConfig
from preft_jax.errors import AdapterError, ConfigError
from preft_jax.io.adapter_files import load_adapter, read_adapter, save_adapter
from preft_jax.io.adapter_limits import AdapterLimits, limits_for

pytestmark = pytest.mark.host

NAME = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return copy_fixture(tmp_path, "lora")


@pytest.fixture
def reft(tmp_path: Path) -> Path:
    config = AdapterConfig(kind="loreft", rank=3)
    save_adapter(tmp_path / "reft", make(config, np.random.default_rng(0)))
    return tmp_path / "reft"


def refused(path: Path, match: str, **options: object) -> str:
    """Load a directory in two ways; both must refuse it, in a message of bounded length that a terminal can show."""
    with pytest.raises(AdapterError, match=match) as raised:
        load_adapter(path, MODEL, **options)
    with pytest.raises(AdapterError):
        read_adapter(path)
    message = str(raised.value)
    assert len(message) < 4000
    assert message.isprintable()
    return message


def split(path: Path) -> tuple[dict, bytes]:
    data = (path / TENSORS).read_bytes()
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def put(path: Path, header: bytes | dict, body: bytes, length: int | None = None) -> None:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    (path / TENSORS).write_bytes(struct.pack("<Q", len(raw) if length is None else length) + raw + body)


# Files


@pytest.mark.parametrize("file", [CONFIG, TENSORS])
@pytest.mark.parametrize("kind", ["pipe", "device", "directory", "socket"])
def test_only_regular_files_are_opened(directory: Path, file: str, kind: str) -> None:
    """Opening a pipe would wait for a writer; reading a device would never end."""
    target = directory / file
    target.unlink()
    if kind == "pipe":
        os.mkfifo(target)
    elif kind == "device":
        target.symlink_to("/dev/zero")
    elif kind == "directory":
        target.mkdir()
    else:
        os.mknod(target, stat.S_IFSOCK | 0o600)
    refused(directory, f"{file} is not a regular file")


@pytest.mark.parametrize(("file", "limit"), [(CONFIG, "max_config_bytes"), (TENSORS, "max_bytes")])
def test_files_beyond_the_limit_are_refused_unread(
    directory: Path, monkeypatch: pytest.MonkeyPatch, file: str, limit: str
) -> None:
    size = (directory / file).stat().st_size
    load_adapter(directory, MODEL, limits=AdapterLimits(**{limit: size}))
    with pytest.raises(AdapterError, match=f"{file} has {size} bytes; allowed: up to {size - 1}; .* raise the limit"):
        load_adapter(directory, MODEL, limits=AdapterLimits(**{limit: size - 1}))
    os.truncate(directory / file, 2**40)
    refused(directory, rf"{file} has {2**40} bytes; allowed: up to \d+")


def test_limits_follow_the_base_model_and_the_rank(tmp_path: Path) -> None:
    limits = limits_for(MODEL, max_rank=16)
    largest = AdapterConfig(rank=16)
    save_adapter(tmp_path / "a", make(largest, np.random.default_rng(0)))
    size = (tmp_path / "a" / TENSORS).stat().st_size
    assert size <= limits.max_bytes <= size + 2**20
    load_adapter(tmp_path / "a", MODEL, limits=limits)
    with pytest.raises(AdapterError, match="rank 16 at 'q' of layer 0 is too large; allowed: up to 15"):
        load_adapter(tmp_path / "a", MODEL, limits=AdapterLimits(max_rank=15))
    with pytest.raises(AdapterError, match="rank 16 at 'q'"):
        read_adapter(tmp_path / "a", limits=AdapterLimits(max_rank=15))
    with pytest.raises(ConfigError, match="max_bytes is 0"):
        AdapterLimits(max_bytes=0)


def test_a_rank_of_position_groups_counts_together(tmp_path: Path) -> None:
    config = AdapterConfig(kind="loreft", rank=4, positions="f2+l2", share_weights=False)
    save_adapter(tmp_path / "a", make(config, np.random.default_rng(0)))
    load_adapter(tmp_path / "a", MODEL, limits=AdapterLimits(max_rank=8))
    with pytest.raises(AdapterError, match=r"rank 8 .* allowed: up to 7"):
        load_adapter(tmp_path / "a", MODEL, limits=AdapterLimits(max_rank=7))


def test_tensors_that_are_not_the_configs_are_refused_before_they_are_read(directory: Path) -> None:
    """A file of sixty-four megabytes that claims to be one tensor costs less than one of them."""
    size = 2**26
    entry = {"dtype": "F32", "shape": [size // 4], "data_offsets": [0, size]}
    put(directory, {"x": entry}, b"")
    os.truncate(directory / TENSORS, (directory / TENSORS).stat().st_size + size)
    tracemalloc.start()
    try:
        with pytest.raises(AdapterError, match="does not hold the tensors of its config"):
            load_adapter(directory, MODEL, limits=AdapterLimits())
        assert tracemalloc.get_traced_memory()[1] < 2**20
    finally:
        tracemalloc.stop()


def test_nothing_stays_open(directory: Path) -> None:
    load_adapter(directory, MODEL)
    before = len(os.listdir("/proc/self/fd")) if Path("/proc/self/fd").exists() else 0
    for _ in range(5):
        load_adapter(directory, MODEL)
    (directory / TENSORS).write_bytes(b"")
    refused(directory, "is not a whole safetensors file: it has 0 bytes")
    after = len(os.listdir("/proc/self/fd")) if Path("/proc/self/fd").exists() else 0
    assert after == before


def test_a_pickle_is_refused_unread(directory: Path) -> None:
    (directory / TENSORS).unlink()
    os.mkfifo(directory / "adapter_model.bin")
    refused(directory, "a pickle, which can run code and is never read")


@pytest.mark.parametrize("path", ["x" * 300, "a\0b"], ids=["too long", "null"])
def test_paths_that_cannot_be_are_no_directories(tmp_path: Path, path: str) -> None:
    with pytest.raises(AdapterError, match="is not a directory"):
        load_adapter(tmp_path / path, MODEL)


# Headers


@pytest.mark.parametrize(
    ("length", "message"),
    [(2**63, "its header should have 9223372036854775808"), (2**33, "should have 8589934592"), (10**6, "1000000")],
)
def test_headers_longer_than_the_file_are_refused(directory: Path, length: int, message: str) -> None:
    header, body = split(directory)
    put(directory, header, body, length=length)
    refused(directory, message)


def test_headers_beyond_the_limit_are_refused(directory: Path) -> None:
    put(directory, b"{" + b" " * 2**21 + b"}", b"")
    refused(directory, r"header of 2097154 bytes; allowed: up to 2097152", limits=AdapterLimits())
    empty = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
    put(directory, {f"x{i}": empty for i in range(8193)}, b"")
    refused(directory, "has 8193 tensors; allowed: up to 8192", limits=AdapterLimits())


F32 = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"data_offsets": [0, 16]}, "16.*but 8 bytes by its shape"),
        ({"data_offsets": [8, 0]}, "but 8 bytes"),
        ({"data_offsets": [-8, 0]}, "the data_offsets"),
        ({"data_offsets": [4, 12]}, "begins at 4 of its data, where 0 is next"),
        ({"data_offsets": [0.0, 8.0]}, "the data_offsets"),
        ({"data_offsets": [False, 8]}, "the data_offsets"),
        ({"data_offsets": [0, 8, 8]}, "the data_offsets"),
        ({"data_offsets": [2**70, 2**70 + 8]}, "the data_offsets"),
        ({"data_offsets": "08"}, "the data_offsets"),
        ({"shape": [-2]}, "the shape"),
        ({"shape": [True, 2]}, "the shape"),
        ({"shape": [2.0]}, "the shape"),
        ({"shape": [2**62, 4]}, "but 73786976294838206464 bytes by its shape"),
        ({"shape": [2**40, 2**40, 0]}, "but 0 bytes by its shape"),
        ({"shape": [1] * 100_000}, "the shape"),
        ({"shape": 2}, "the shape"),
        ({"shape": [10**300]}, "the shape"),
        ({"dtype": "F99"}, "dtype F99; allowed"),
        ({"dtype": None}, "dtype None; allowed"),
        ({"dtype": ["F32"]}, "dtype .*; allowed"),
        ({"strides": [1]}, "not exactly data_offsets, dtype, shape"),
    ],
)
def test_entries_that_cannot_be_are_refused(directory: Path, change: dict, message: str) -> None:
    put(directory, {"x": F32 | change}, bytes(8))
    refused(directory, message)


@pytest.mark.parametrize(
    ("header", "body", "message"),
    [
        ({"x": F32, "y": F32}, 8, "y begins at 0 of its data, where 8 is next"),
        ({"x": F32, "y": F32 | {"data_offsets": [4, 12]}}, 12, "begins at 4"),
        ({"x": F32, "y": F32 | {"data_offsets": [12, 20]}}, 20, "begins at 12"),
        ({"x": F32}, 7, "end at 8 of its data, which has 7"),
        ({"x": F32}, 9, "end at 8 of its data, which has 9"),
        ({"x": 3}, 0, "entry of x has not"),
        ({"__metadata__": {"a": 1}}, 0, "__metadata__"),
        ({"__metadata__": []}, 0, "__metadata__"),
        (b'{"x":' + json.dumps(F32).encode() + b',"x":' + json.dumps(F32).encode() + b"}", 8, "holds x twice"),
        (b'{"x":{"dtype":"F32","shape":[2],"shape":[2],"data_offsets":[0,8]}}', 8, "holds shape twice"),
        (b'{"x":{"dtype":"F32","shape":[NaN],"data_offsets":[0,8]}}', 8, "holds NaN"),
        (b'{"x":' * 100_000, 0, "not a whole safetensors file"),
        (b'{"x":' + b"9" * 10_000 + b"}", 0, "not a whole safetensors file"),
        (b'{"\xff":1}', 0, "not a whole safetensors file"),
        (b' {"x":1}', 0, "does not begin with an object"),
        (b"[]", 0, "does not begin with an object"),
        (b'"' + b"\xed\xa0\x80" * 9, 0, "does not begin with an object"),
        (b"", 0, "does not begin with an object"),
    ],
)  # fmt: skip
def test_headers_that_cannot_be_are_refused(directory: Path, header: bytes | dict, body: int, message: str) -> None:
    put(directory, header, bytes(body))
    refused(directory, message)


@pytest.mark.parametrize(
    ("name", "shown"), [("\x1b[31m\n", r"\\x1b\[31m\\n"), ("x" * 100_000, "xxxx"), ("\ud800", r"\\ud800")]
)
def test_strange_names_are_escaped_and_cut(directory: Path, name: str, shown: str) -> None:
    header, body = split(directory)
    end = len(body)
    put(directory, header | {name: F32 | {"data_offsets": [end, end + 8]}}, body + bytes(8))
    refused(directory, f"extra {shown}")


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite_are_refused(directory: Path, value: float) -> None:
    header, body = split(directory)
    begin = header[NAME]["data_offsets"][0]
    size = {"F32": 4, "F16": 2}[header[NAME]["dtype"]]
    bad = np.array(value, np.float32 if size == 4 else np.float16).tobytes()
    put(directory, header, body[:begin] + bad + body[begin + size :])
    refused(directory, "1 values that are not finite")


# Configs

COSTLY = "((((.?){1000}){1000}){1000}){1000}"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"r": 10**9}, "rank 1000000000 of 'rank' is not allowed"),
        ({"r": -1}, "rank -1"),
        ({"r": True}, "r is True"),
        ({"r": 4.0}, "r is 4.0"),
        ({"r": "4"}, "r is '4'"),
        ({"r": 10**400}, "rank 1000"),
        ({"lora_alpha": float("nan")}, "alpha nan"),
        ({"lora_alpha": float("inf")}, "alpha inf"),
        ({"lora_alpha": 10**400}, "alpha 1000.*give a finite number"),
        ({"lora_alpha": 1e39}, r"alpha 1e\+39.*in float32 too"),
        ({"lora_alpha": 10**308}, "alpha 1000"),
        ({"lora_dropout": 10**400}, "dropout"),
        ({"target_modules": ["q_proj"] * 100_000}, "target_modules has 100000 entries; allowed: up to 4096"),
        ({"target_modules": [["q_proj"]]}, r"target_modules holds \['q_proj'\]"),
        ({"target_modules": [{}]}, "target_modules holds {}"),
        ({"target_modules": "(a+)+$"}, "selects no linear"),
        ({"target_modules": COSTLY * 100 + "x"}, "target_modules: .* steps to match"),
        ({"target_modules": "(" * 100_000}, "target_modules: .* has 100000 characters"),
        ({"target_modules": "x" * 4000}, "selects no linear"),
        ({"exclude_modules": "(?<=a)b"}, "exclude_modules: .*not supported"),
        ({"rank_pattern": {f"{COSTLY * 100}{i}": 4 for i in range(9)}}, "takes more than .* steps"),
        ({"rank_pattern": {f"x{i}": 4 for i in range(2049)}}, "rank_pattern has 2049 names; allowed: up to 2048"),
        ({"rank_pattern": {"q_proj": 10**400}}, "rank 1000"),
        ({"alpha_pattern": {"q_proj": 10**400}}, "alpha 1000"),
        ({"alpha_pattern": {r"(a)\1": 4}}, "alpha_pattern: .*not supported"),
        ({"layers_to_transform": list(range(100_000))}, "layers_to_transform has 100000 entries"),
        ({"layers_to_transform": [10**30], "layers_pattern": "layers"}, "selects no linear"),
        ({"layers_to_transform": [0], "layers_pattern": "x|y"}, "layers_pattern holds 'x|y'; give the name of a list"),
        ({"layers_to_transform": [0], "layers_pattern": "(a+)+$"}, "layers_pattern holds"),
        ({"layers_to_transform": [0], "layers_pattern": [3]}, "layers_pattern holds 3"),
        ({"peft_type": [[[[[]]]]]}, "peft_type"),
        ({"new": "x" * 100_000}, "unknown key 'new'"),
        ({"x" * 100_000: 1}, "unknown key 'xxx"),
        ({"\x1b[31m": 1}, r"unknown key '\\x1b\[31m'"),
        ({"preft": "x" * 100_000}, "'preft' is 'xxx"),
    ],
)
def test_configs_that_cannot_be_are_refused(directory: Path, change: dict, message: str) -> None:
    edit_config(directory, lambda contents: contents.update(change))
    refused(directory, message)


def test_a_number_too_large_for_a_float_is_refused(directory: Path) -> None:
    text = (directory / CONFIG).read_text()
    alpha = json.loads(text)["lora_alpha"]
    (directory / CONFIG).write_text(text.replace(f'"lora_alpha": {alpha}', '"lora_alpha": 1e400'))
    refused(directory, "alpha inf")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rank": 10**9}, "rank 1000000000"),
        ({"rank": 10**400}, "rank 1000"),
        ({"rank": True}, "rank of the 'preft' object is True"),
        ({"rank": -1}, "rank -1"),
        ({"layers": [10**9]}, "layers names layer 1000000000"),
        ({"layers": list(range(5000))}, "layers has 5000 entries"),
        ({"dropout": 10**400}, "dropout"),
        ({"positions": "f" * 100_000}, "positions 'ffff"),
        ({"positions": "f\u0663+l2"}, "is not a rule"),
        ({"kind": "x" * 100_000}, "unknown kind 'xxx"),
        ({"version": {}}, "version {}"),
        ({"assistant_turns": "x" * 100_000}, "assistant_turns 'xxx"),
        ({"base_model_digest": []}, "base_model_digest"),
    ],
)
def test_preft_objects_that_cannot_be_are_refused(reft: Path, change: dict, message: str) -> None:
    edit_config(reft, lambda contents: contents["preft"].update(change))
    refused(reft, message)


def test_layers_without_a_base_model_are_bounded(reft: Path) -> None:
    edit_config(reft, lambda contents: contents["preft"].update(layers=[10**9]))
    with pytest.raises(AdapterError, match="name layer 1000000000; allowed without a base model: up to 1023"):
        read_adapter(reft)
    edit_config(reft, lambda contents: contents["preft"].update(layers=None))
    put(reft, {"layers.99999999.block.w": F32}, bytes(8))
    with pytest.raises(AdapterError, match="name layer 99999999"):
        read_adapter(reft)


@pytest.mark.parametrize(
    "content",
    [
        b'{"r":' * 100_000, b"[" * 1_000_000, b'{"a":"\xff"}', b"9" * 100_000, b'{"r":' + b"9" * 5000 + b"}",
        b"\x00" * 100, "\ufeff{}".encode(), b"NaN", b'"x"',
    ],
)  # fmt: skip
def test_configs_that_are_no_objects_are_refused(directory: Path, content: bytes) -> None:
    (directory / CONFIG).write_bytes(content)
    refused(directory, CONFIG)


def test_a_strangers_words_about_the_base_model_are_escaped(directory: Path, tiny_text) -> None:
    contents = json.loads((directory / CONFIG).read_text())
    contents["preft"] = {"version": 1, "kind": "lora", "positions": "all", "base_model_digest": "\x1b" * 9999}
    contents["base_model_name_or_path"] = "\x1b]" * 9999
    (directory / CONFIG).write_text(json.dumps(contents))
    with pytest.raises(AdapterError, match="trained on a base model with digest") as raised:
        load_adapter(directory, tiny_text)
    assert str(raised.value).isprintable()
    assert len(str(raised.value)) < 1500
