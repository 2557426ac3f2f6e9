"""Digests: what they depend on, and when a recorded one is trusted."""

import dataclasses
import hashlib
import json
import os

import pytest

from preft_jax.config import PRESETS
from preft_jax.errors import ModelError
from preft_jax.io import digest as module
from preft_jax.io.digest import RECORD_NAME, digest_parts, file_sha256, model_digest, preset_digest

pytestmark = pytest.mark.host

TINY = PRESETS["tiny"]


@pytest.fixture
def hashed(monkeypatch):
    """Names of the files that are really read and hashed."""
    names = []
    real = hashlib.file_digest

    def spy(file, algorithm):
        names.append(os.path.basename(file.name))
        return real(file, algorithm)

    monkeypatch.setattr(module.hashlib, "file_digest", spy)
    return names


def test_parts_are_length_prefixed():
    assert digest_parts(b"ab", b"c") != digest_parts(b"a", b"bc")
    assert digest_parts(b"ab") != digest_parts(b"ab", b"")
    expected = hashlib.sha256((2).to_bytes(8, "little") + b"ab" + (1).to_bytes(8, "little") + b"c").hexdigest()
    assert digest_parts(b"ab", b"c") == expected


def test_file_digest_is_sha256_and_is_read_once(tmp_path, hashed):
    path = tmp_path / "weights"
    path.write_bytes(b"content")
    expected = hashlib.sha256(b"content").hexdigest()
    assert [file_sha256(path, tmp_path / "cache") for _ in range(3)] == [expected] * 3
    assert hashed == ["weights"]
    assert (tmp_path / RECORD_NAME).is_file()


@pytest.mark.parametrize("content", [b"other bytes", b"CONTENT"], ids=["other size", "same size"])
def test_changed_file_is_hashed_again(tmp_path, content):
    path = tmp_path / "weights"
    path.write_bytes(b"content")
    before = file_sha256(path, tmp_path)
    path.write_bytes(content)
    stamp = path.stat()
    os.utime(path, ns=(stamp.st_atime_ns, stamp.st_mtime_ns + 1))
    assert file_sha256(path, tmp_path) == hashlib.sha256(content).hexdigest() != before


@pytest.mark.parametrize("record", ["not json", "[]", '{"weights": 3}', '{"weights": {"sha256": "x"}}'])
def test_damaged_record_is_ignored_and_replaced(tmp_path, record):
    path = tmp_path / "weights"
    path.write_bytes(b"content")
    (tmp_path / RECORD_NAME).write_text(record)
    assert file_sha256(path, tmp_path) == hashlib.sha256(b"content").hexdigest()
    assert json.loads((tmp_path / RECORD_NAME).read_text())["weights"]["size"] == len(b"content")


@pytest.mark.parametrize("field", ["sha256", "size", "mtime_ns", "check"])
def test_a_record_with_a_changed_digit_is_made_again(tmp_path, hashed, field):
    path, record = tmp_path / "weights", tmp_path / RECORD_NAME
    path.write_bytes(b"content")
    expected = file_sha256(path, tmp_path)
    whole = record.read_text()
    content = json.loads(whole)
    text = str(content["weights"][field])
    for i in range(0, len(text), 5):
        changed = text[:i] + ("1" if text[i] != "1" else "2") + text[i + 1 :]
        content["weights"][field] = type(content["weights"][field])(changed)
        record.write_text(json.dumps(content))
        hashed.clear()
        assert file_sha256(path, tmp_path) == expected
        assert hashed == ["weights"]
        assert record.read_text() == whole


def test_forged_record_of_another_shape_is_ignored(tmp_path):
    path = tmp_path / "weights"
    path.write_bytes(b"content")
    stamp = path.stat()
    entry = {"size": stamp.st_size, "mtime_ns": stamp.st_mtime_ns, "sha256": "z" * 64}
    (tmp_path / RECORD_NAME).write_text(json.dumps({"weights": entry}))
    assert file_sha256(path, tmp_path) == hashlib.sha256(b"content").hexdigest()


def test_record_goes_to_the_cache_where_the_directory_is_not_writable(tmp_path, hashed):
    models, cache = tmp_path / "models", tmp_path / "cache"
    models.mkdir()
    path = models / "weights"
    path.write_bytes(b"content")
    # A directory in the record's place cannot be replaced by a file, whoever runs the test.
    (models / RECORD_NAME).mkdir()
    assert file_sha256(path, cache) == file_sha256(path, cache)
    assert hashed == ["weights"]
    assert list((cache / "digests").glob("*.json"))
    assert [entry.name for entry in models.iterdir() if entry.name.endswith(".tmp")] == []


def test_nothing_writable_still_gives_the_digest(tmp_path, hashed):
    path = tmp_path / "weights"
    path.write_bytes(b"content")
    (tmp_path / RECORD_NAME).mkdir()
    (tmp_path / "cache").write_text("a file where the cache directory should be")
    assert file_sha256(path, tmp_path / "cache") == file_sha256(path, tmp_path / "cache")
    assert hashed == ["weights", "weights"]


def test_missing_file_is_an_error(tmp_path):
    with pytest.raises(ModelError, match="weights"):
        file_sha256(tmp_path / "weights", tmp_path)


def test_model_digest_depends_on_weights_and_shape_only(tmp_path):
    first, second = tmp_path / "a", tmp_path / "b"
    first.write_bytes(b"one")
    second.write_bytes(b"two")
    base = model_digest(TINY, [first, second], tmp_path)
    assert base == model_digest(TINY, [second, first], tmp_path)
    assert base == model_digest(
        dataclasses.replace(TINY, eos_token_ids=(5,), bos_token_id=1), [first, second], tmp_path
    )
    assert base != model_digest(dataclasses.replace(TINY, rope_theta=5.0), [first, second], tmp_path)
    assert base != model_digest(TINY, [first], tmp_path)
    second.write_bytes(b"three")
    assert base != model_digest(TINY, [first, second], tmp_path)


def test_preset_digest_depends_on_name_and_seed():
    digests = {preset_digest(TINY, name, seed) for name in ("tiny", "other") for seed in (0, 1)}
    assert len(digests) == 4
