"""Digests of base models: what an adapter says it was trained for, and what a prefix cache may be reused for.

Hashing a file reads all of it (about a second per gigabyte), so each file's SHA-256 is kept in ``.preft-sha256.json``
beside it, or in the cache directory where the model's is not writable, and holds while size and modification time do.
An entry has a checksum of its own: a damaged one is made again.
"""

import dataclasses
import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from preft_jax.config import ModelConfig
from preft_jax.errors import ModelError
from preft_jax.io.safetensors_io import write_file

RECORD_NAME = ".preft-sha256.json"
_NOT_COMPUTED = ("bos_token_id", "eos_token_ids", "max_position_embeddings", "model_type")
"""Fields of a config that do not change what the weights compute."""


def digest_parts(*parts: bytes) -> str:
    """Return the SHA-256 (hex) of parts that are each preceded by their length, so that no two lists collide."""
    total = hashlib.sha256()
    for part in parts:
        total.update(len(part).to_bytes(8, "little"))
        total.update(part)
    return total.hexdigest()


def config_bytes(config: ModelConfig) -> bytes:
    """Return the canonical form of what a config says about the computation: JSON with sorted keys."""
    fields = {key: value for key, value in dataclasses.asdict(config).items() if key not in _NOT_COMPUTED}
    return json.dumps(fields, sort_keys=True, separators=(",", ":")).encode()


def model_digest(config: ModelConfig, files: Iterable[Path], cache: Path) -> str:
    """Return the digest of a base model: SHA-256 over its config and the SHA-256 of each weight file, by file name.

    It does not depend on the dtype the weights are loaded in, on the tokenizer or on where the files lie.

    Raises:
        ModelError: if a file cannot be read.
    """
    digests = [bytes.fromhex(file_sha256(path, cache)) for path in sorted(files, key=lambda path: path.name)]
    return digest_parts(b"preft-base-1", config_bytes(config), *digests)


def preset_digest(config: ModelConfig, name: str, seed: int) -> str:
    """Return the digest of a preset's random weights, which its name and seed determine."""
    return digest_parts(b"preft-preset-1", config_bytes(config), name.encode(), str(seed).encode())


def file_sha256(path: Path, cache: Path) -> str:
    """Return a file's SHA-256 (hex), from its record if the file has not changed since, and record it otherwise.

    Args:
        path: the file.
        cache: directory for the record where the file's own directory cannot be written to.

    Raises:
        ModelError: if the file cannot be read.
    """
    records = (path.parent / RECORD_NAME, _shared_record(path, cache))
    try:
        stamp = _stamp(path)
        for record in records:
            entry = _read_record(record).get(path.name)
            if isinstance(entry, dict) and entry == _entry(path.name, stamp, entry.get("sha256")):
                return entry["sha256"]
        with path.open("rb") as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        unchanged = _stamp(path) == stamp
    except OSError as error:
        raise ModelError(f"cannot read {path}: {error.strerror or error}; give a file that can be read") from error
    if unchanged:
        any(_write_record(record, path.name, _entry(path.name, stamp, sha256)) for record in records)
    return sha256


def _stamp(path: Path) -> dict[str, int]:
    status = path.stat()
    return {"size": status.st_size, "mtime_ns": status.st_mtime_ns}


def _entry(name: str, stamp: dict[str, int], sha256: Any) -> dict[str, Any]:
    """Return a file's entry in a record; ``check`` is over the others, so that a damaged one is not taken."""
    entry = {**stamp, "sha256": sha256}
    return entry | {"check": digest_parts(name.encode(), json.dumps(entry).encode())}


def _shared_record(path: Path, cache: Path) -> Path:
    directory = hashlib.sha256(str(path.parent.resolve()).encode()).hexdigest()[:16]
    return cache / "digests" / f"{directory}.json"


def _read_record(record: Path) -> dict[str, Any]:
    try:
        entries = json.loads(record.read_text())
    except (OSError, ValueError):
        return {}
    return entries if isinstance(entries, dict) else {}


def _write_record(record: Path, name: str, entry: dict[str, Any]) -> bool:
    """Add an entry to a record; false if its directory cannot be written to."""
    try:
        record.parent.mkdir(parents=True, exist_ok=True)
        entries = {**_read_record(record), name: entry}
        write_file(record, json.dumps(entries, indent=1, sort_keys=True).encode(), error=ModelError)
    except (OSError, ModelError):
        return False
    return True
