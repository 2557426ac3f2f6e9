"""One safetensors file, read into NumPy and written atomically. Every failure is an error of the caller's kind."""

import contextlib
import os
import secrets
from collections.abc import Mapping
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy

from preft_jax.errors import PreftError

_DTYPES: Mapping[str, np.dtype] = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(jnp.bfloat16),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U64": np.dtype(np.uint64),
    "U32": np.dtype(np.uint32),
    "U16": np.dtype(np.uint16),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}


def read_bytes(path: Path, *, error: type[PreftError], advice: str) -> bytes:
    """Return the contents of a file.

    Raises:
        error: naming the file, why it cannot be read, and ``advice``.
    """
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise error(f"{path} does not exist; {advice}") from None
    except OSError as cause:
        raise error(f"{path} cannot be read: {cause.strerror or cause}; {advice}") from None


def read_safetensors(path: Path, *, error: type[PreftError], advice: str) -> dict[str, np.ndarray]:
    """Return the tensors of a safetensors file by name, each in the dtype it is stored in (bfloat16 is ``ml_dtypes``').

    The file is read whole, so that replacing it later changes nothing here.

    Args:
        path: the file.
        error: the kind of error to raise.
        advice: what to do about a bad file, in the imperative; ends every message.

    Raises:
        error: if the file is missing, truncated, not a safetensors file, or holds a dtype that NumPy has no name for.
    """
    data = read_bytes(path, error=error, advice=advice)
    try:
        entries = safetensors.deserialize(data)
    except safetensors.SafetensorError as cause:
        raise error(f"{path} is not a whole safetensors file ({cause}); {advice}") from None
    tensors = {}
    for name, entry in entries:
        dtype = _DTYPES.get(entry["dtype"])
        if dtype is None:
            raise error(f"{path}: {name} has dtype {entry['dtype']}; allowed: {', '.join(_DTYPES)}; {advice}")
        tensors[name] = np.frombuffer(entry["data"], dtype).reshape(entry["shape"])
    return tensors


def serialize_safetensors(tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str] | None = None) -> bytes:
    """Return the bytes of a safetensors file that holds ``tensors``; C order, whatever the strides of the arrays."""
    arrays = {name: np.array(tensor, order="C", copy=None) for name, tensor in tensors.items()}
    return safetensors.numpy.save(arrays, metadata=dict(metadata) if metadata else None)


def write_file(path: Path, data: bytes, *, error: type[PreftError]) -> None:
    """Write a file atomically: after a crash or an error it holds what it held before, or ``data``, never a part.

    Raises:
        error: if it cannot be written.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
    try:
        with open(temporary, "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        sync_directory(path.parent)
    except OSError as cause:
        raise error(
            f"{path} cannot be written: {cause.strerror or cause}; free space or choose another place"
        ) from None
    finally:
        temporary.unlink(missing_ok=True)


def sync_directory(directory: Path) -> None:
    """Make renames inside ``directory`` survive a power cut, where the system can."""
    with contextlib.suppress(OSError):
        descriptor = os.open(directory, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def write_safetensors(
    path: Path, tensors: Mapping[str, np.ndarray], *, error: type[PreftError], metadata: Mapping[str, str] | None = None
) -> None:
    """Write ``tensors`` to a safetensors file, atomically.

    Raises:
        error: if the file cannot be written.
    """
    write_file(path, serialize_safetensors(tensors, metadata), error=error)
