"""The two files of an adapter directory read and replaced as one.

A save first writes both files beside their places, the config before the tensors. Renaming the config is the moment
from which the directory holds the new adapter; renaming the tensors follows. So pending tensors without a pending
config are those of the new adapter, and a reader that finds them uses them: a crash at any point leaves the old
adapter or the new one. One writer at a time.

The name of pending tensors says which config they belong with and which tensors they are to replace. Where something
else has replaced either since, as by copying another adapter over the directory, they are not used.
"""

import contextlib
import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

from preft_jax.errors import AdapterError
from preft_jax.io.adapter_limits import AdapterLimits
from preft_jax.io.safetensors_io import (
    TensorFile,
    file_digest,
    open_safetensors,
    read_bytes,
    sync_directory,
    write_file,
)

CONFIG_FILE = "adapter_config.json"
TENSORS_FILE = "adapter_model.safetensors"
ADVICE = "give the directory of an adapter saved by preft-jax or PEFT, and save or copy it again if it is damaged"

_PENDING_CONFIG = f".{CONFIG_FILE}.next"
_PENDING_TENSORS = f".{TENSORS_FILE}.", ".next"
"""Begin and end of the name of pending tensors."""


@contextlib.contextmanager
def open_pair(path: Path, limits: AdapterLimits) -> Iterator[tuple[bytes, TensorFile]]:
    """Yield config and tensors of one and the same save, also while another is under way; the tensors not yet read.

    Raises:
        AdapterError: if a file is missing, damaged or larger than ``limits`` allow.
    """
    if not os.path.isdir(path):
        raise AdapterError(f"{path} is not a directory; {ADVICE}")
    with contextlib.ExitStack() as stack:
        for last in (False, False, True):
            try:
                config = _read_config(path, limits)
                tensors = stack.enter_context(
                    open_safetensors(
                        current_tensors(path, limits),
                        error=AdapterError,
                        advice=ADVICE,
                        max_bytes=limits.max_bytes,
                        max_header_bytes=limits.max_header_bytes,
                        max_tensors=limits.max_tensors,
                        roots=limits.roots,
                    )
                )
                if config == _read_config(path, limits):
                    break
            except AdapterError:
                if last:
                    raise
        else:
            raise AdapterError(f"{path} changes while it is read; load it when it is no longer being written")
        yield config, tensors


def _read_config(path: Path, limits: AdapterLimits) -> bytes:
    return read_bytes(
        path / CONFIG_FILE, error=AdapterError, advice=ADVICE, max_bytes=limits.max_config_bytes, roots=limits.roots
    )


def pending_name(config: bytes, replaced: str) -> str:
    """Return the name of pending tensors.

    Args:
        config: that they belong with.
        replaced: SHA-256 (hex) of the tensors in whose place they are to be, or nothing.
    """
    begin, end = _PENDING_TENSORS
    return begin + hashlib.sha256(hashlib.sha256(config).digest() + replaced.encode()).hexdigest()[:32] + end


def _pending(path: Path) -> list[Path]:
    """Return pending tensors, whatever they belong with."""
    begin, end = _PENDING_TENSORS
    return [path / name for name in os.listdir(path) if name.startswith(begin) and name.endswith(end)]


def _replaced(path: Path, limits: AdapterLimits) -> str:
    """Return what ``pending_name`` is to know of the tensors that are there."""
    if not os.path.exists(path / TENSORS_FILE):
        return ""
    return file_digest(
        path / TENSORS_FILE, error=AdapterError, advice=ADVICE, max_bytes=limits.max_bytes, roots=limits.roots
    )


def current_tensors(path: Path, limits: AdapterLimits | None = None) -> Path:
    """Return the file with the tensors of the directory's config: the pending one if only its rename is missing.

    Raises:
        AdapterError: if that cannot be said, or the tensors are a pickle.
    """
    limits = limits or AdapterLimits()
    try:
        pending = _pending(path)  # Before the config: a save that has not got so far has a pending one.
    except OSError as cause:
        raise AdapterError(f"{path} cannot be read: {cause.strerror or cause}; {ADVICE}") from None
    if pending and os.path.exists(path / CONFIG_FILE) and not os.path.exists(path / _PENDING_CONFIG):
        ours = path / pending_name(_read_config(path, limits), _replaced(path, limits))
        if ours in pending:
            return ours
    if not os.path.exists(path / TENSORS_FILE) and os.path.exists(path / "adapter_model.bin"):
        raise AdapterError(
            f"{path} holds adapter_model.bin, a pickle, which can run code and is never read; load it with PEFT where "
            "you trust it and save it with save_pretrained(safe_serialization=True)"
        )
    return path / TENSORS_FILE


def write_pair(path: Path, config: bytes, tensors: bytes) -> None:
    """Replace both files of a directory; see the module's text for the order."""
    made = not path.exists()
    committed = False
    try:
        path.mkdir(parents=True, exist_ok=True)
        _settle(path)
        pending = path / pending_name(config, _replaced(path, AdapterLimits()))
        write_file(path / _PENDING_CONFIG, config, error=AdapterError)
        write_file(pending, tensors, error=AdapterError)
        os.replace(path / _PENDING_CONFIG, path / CONFIG_FILE)
        committed = True
        sync_directory(path)
        os.replace(pending, path / TENSORS_FILE)
        sync_directory(path)
    except OSError as cause:
        state = (
            "the new adapter is complete and will be loaded; save again to finish"
            if committed
            else "nothing was replaced"
        )
        raise AdapterError(f"{path} cannot be written: {cause.strerror or cause}; {state}") from None
    finally:
        if not committed:
            _discard(path, made)


def _settle(path: Path) -> None:
    """Finish or undo what an interrupted save left."""
    current = current_tensors(path)
    if current != path / TENSORS_FILE:
        os.replace(current, path / TENSORS_FILE)
    _discard(path, made=False)


def _discard(path: Path, made: bool) -> None:
    """Remove pending files, tensors first so that they never look like those of the current config."""
    with contextlib.suppress(OSError):
        for pending in _pending(path):
            pending.unlink(missing_ok=True)
        (path / _PENDING_CONFIG).unlink(missing_ok=True)
        if made:
            path.rmdir()
