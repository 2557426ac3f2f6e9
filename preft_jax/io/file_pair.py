"""The two files of an adapter directory read and replaced as one.

A save first writes both files beside their places, the config before the tensors. Renaming the config is the moment
from which the directory holds the new adapter; renaming the tensors follows. So pending tensors without a pending
config are those of the new adapter, and a reader that finds them uses them: a crash at any point leaves the old
adapter or the new one. One writer at a time.
"""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from preft_jax.errors import AdapterError
from preft_jax.io.adapter_limits import AdapterLimits
from preft_jax.io.safetensors_io import TensorFile, open_safetensors, read_bytes, sync_directory, write_file

CONFIG_FILE = "adapter_config.json"
TENSORS_FILE = "adapter_model.safetensors"
ADVICE = "give the directory of an adapter saved by preft-jax or PEFT, and save or copy it again if it is damaged"

_PENDING_CONFIG = f".{CONFIG_FILE}.next"
_PENDING_TENSORS = f".{TENSORS_FILE}.next"


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
                        current_tensors(path),
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


def current_tensors(path: Path) -> Path:
    """Return the file with the tensors of the directory's config: the pending one if only its rename is missing."""
    if os.path.exists(path / _PENDING_TENSORS) and not os.path.exists(path / _PENDING_CONFIG):
        return path / _PENDING_TENSORS
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
        write_file(path / _PENDING_CONFIG, config, error=AdapterError)
        write_file(path / _PENDING_TENSORS, tensors, error=AdapterError)
        os.replace(path / _PENDING_CONFIG, path / CONFIG_FILE)
        committed = True
        sync_directory(path)
        os.replace(path / _PENDING_TENSORS, path / TENSORS_FILE)
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
    if current_tensors(path) == path / _PENDING_TENSORS:
        os.replace(path / _PENDING_TENSORS, path / TENSORS_FILE)
    _discard(path, made=False)


def _discard(path: Path, made: bool) -> None:
    """Remove pending files, tensors first so that they never look like those of the current config."""
    with contextlib.suppress(OSError):
        (path / _PENDING_TENSORS).unlink(missing_ok=True)
        (path / _PENDING_CONFIG).unlink(missing_ok=True)
        if made:
            path.rmdir()
