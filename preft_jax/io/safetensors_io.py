"""One safetensors file, read into NumPy and written atomically. Every failure is an error of the caller's kind.

A file may be anybody's: nothing of it is read, and no memory taken for it, before its kind, its size and its header
have been checked.
"""

import contextlib
import hashlib
import json
import math
import os
import secrets
import stat
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import jax.numpy as jnp
import numpy as np
import safetensors.numpy

from preft_jax.errors import PreftError, plain, shown
from preft_jax.io.confined import open_below

_DTYPES: Mapping[str, np.dtype] = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(jnp.bfloat16),
    "F8_E4M3": np.dtype(jnp.float8_e4m3fn),
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


MAX_HEADER = 2**21
"""Bytes of a file's header unless another limit is given; 256 for each of eight thousand tensors."""

_PIECE = 2**20
_MAX_DIMENSIONS = 8
_LARGEST = 2**63 - 1
_ENTRY = ("data_offsets", "dtype", "shape")


def read_bytes(
    path: Path, *, error: type[PreftError], advice: str, max_bytes: int | None = None, roots: Sequence[str] = ()
) -> bytes:
    """Return the contents of a file.

    Args:
        path: the file; nothing else is opened, so neither a pipe nor a device keeps the reader waiting.
        error: the kind of error to raise.
        advice: what to do about a bad file, in the imperative; ends every message.
        max_bytes: a larger file is refused unread; None: any size.
        roots: directories below one of which it must lie, links followed (``open_below``); empty: anywhere.

    Raises:
        error: naming the file, why it cannot be read, and what to do.
    """
    with _open(path, error, advice, roots) as file, _told(path, error, advice):
        size = _check_size(path, file, max_bytes, error)
        data = file.read(-1 if max_bytes is None else size + 1)
        if max_bytes is not None and len(data) > size:
            raise error(f"{path} grows while it is read; {advice}")
        return data


def file_digest(
    path: Path, *, error: type[PreftError], advice: str, max_bytes: int | None = None, roots: Sequence[str] = ()
) -> str:
    """Return SHA-256 (hex) of a file; arguments and errors are those of ``read_bytes``."""
    found = hashlib.sha256()
    with _open(path, error, advice, roots) as file, _told(path, error, advice):
        left = _check_size(path, file, max_bytes, error)
        while piece := file.read(min(left, _PIECE)):
            found.update(piece)
            left -= len(piece)
    return found.hexdigest()


class TensorEntry(NamedTuple):
    """What a header says of a tensor, checked: its dtype, its shape and where its bytes lie behind the header."""

    dtype: np.dtype
    shape: tuple[int, ...]
    begin: int
    end: int


class TensorFile:
    """An open safetensors file whose header was read and checked; replacing the file changes nothing here.

    Attributes:
        entries: what the header says of each tensor.
        metadata: texts that the header has besides.
    """

    def __init__(self, path: Path, file: BinaryIO, start: int, header: "_Header", fail: "_Fail"):
        self.entries, self.metadata = header
        self._path = path
        self._file = file
        self._start = start
        self._fail = fail

    def read(self) -> dict[str, np.ndarray]:
        """Return the tensors by name, each in the dtype it is stored in (bfloat16 is ``ml_dtypes``').

        Raises:
            PreftError: of the file's kind, if it became shorter or cannot be read.
        """
        with _told(self._path, self._fail.error, self._fail.advice):
            return {name: self._tensor(entry) for name, entry in self.entries.items()}

    def read_one(self, name: str) -> np.ndarray:
        """Return one tensor, as ``read`` does."""
        with _told(self._path, self._fail.error, self._fail.advice):
            return self._tensor(self.entries[name])

    def _tensor(self, entry: TensorEntry) -> np.ndarray:
        self._file.seek(self._start + entry.begin)
        data = self._file.read(entry.end - entry.begin)
        if len(data) < entry.end - entry.begin:
            raise self._fail.error(f"{self._path} became shorter while it was read; {self._fail.advice}")
        return np.frombuffer(data, entry.dtype).reshape(entry.shape)


class _Header(NamedTuple):
    entries: dict[str, TensorEntry]
    metadata: dict[str, str]


class _Fail(NamedTuple):
    error: type[PreftError]
    advice: str


@contextlib.contextmanager
def open_safetensors(
    path: Path,
    *,
    error: type[PreftError],
    advice: str,
    max_bytes: int | None = None,
    max_header_bytes: int = MAX_HEADER,
    max_tensors: int | None = None,
    roots: Sequence[str] = (),
) -> Iterator[TensorFile]:
    """Open a safetensors file and read its header, so that its tensors can be judged before they are read.

    Args:
        path: the file; nothing else is opened.
        error: the kind of error to raise.
        advice: what to do about a bad file, in the imperative; ends every message.
        max_bytes: a larger file is refused unread; None: any size.
        max_header_bytes: the same for its header.
        max_tensors: most tensors; None: any number.
        roots: see ``read_bytes``.

    Raises:
        error: if the file is missing, truncated, too large, or not a safetensors file whose tensors fill it without
            gaps and overlaps, or holds a dtype that NumPy has no name for.
    """
    with _open(path, error, advice, roots) as file:
        with _told(path, error, advice):
            size = _check_size(path, file, max_bytes, error)
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > size - 8:
                raise error(
                    f"{path} is not a whole safetensors file: it has {size} bytes, and its header should have "
                    f"{length if size >= 8 else 'its length in the first 8'}; {advice}"
                )
            if length > max_header_bytes:
                raise error(f"{path} has a header of {length} bytes; allowed: up to {max_header_bytes}; {advice}")
            raw = file.read(length)
        try:
            header = _parse_header(raw, size - 8 - length)
        except (ValueError, RecursionError) as cause:
            raise error(f"{path} is not a whole safetensors file: {cause}; {advice}") from None
        if max_tensors is not None and len(header.entries) > max_tensors:
            raise error(f"{path} has {len(header.entries)} tensors; allowed: up to {max_tensors}; {advice}")
        yield TensorFile(path, file, 8 + length, header, _Fail(error, advice))


@contextlib.contextmanager
def _open(path: Path, error: type[PreftError], advice: str, roots: Sequence[str] = ()) -> Iterator[BinaryIO]:
    """Open a file that is one: not a directory, a pipe or a device, which could block or never end."""
    with _told(path, error, advice):
        # Not blocking, should it become a pipe in this moment.
        flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
        if not roots and not stat.S_ISREG(os.stat(path).st_mode):
            raise error(f"{path} is not a regular file; {advice}")
        descriptor = open_below(path, roots, flags) if roots else os.open(path, flags)
    with open(descriptor, "rb") as file:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise error(f"{path} is not a regular file; {advice}")
        yield file


@contextlib.contextmanager
def _told(path: Path, error: type[PreftError], advice: str) -> Iterator[None]:
    """Turn what the system says into an ``error``."""
    try:
        yield
    except FileNotFoundError:
        raise error(f"{path} does not exist; {advice}") from None
    except OSError as cause:
        raise error(f"{path} cannot be read: {cause.strerror or cause}; {advice}") from None


def _check_size(path: Path, file: BinaryIO, max_bytes: int | None, error: type[PreftError]) -> int:
    size = os.fstat(file.fileno()).st_size
    if max_bytes is not None and size > max_bytes:
        raise error(
            f"{path} has {size} bytes; allowed: up to {max_bytes}; give a smaller one, or raise the limit where you "
            "trust it (AdapterLimits; the server's --max-adapter-bytes)"
        )
    return size


def _parse_header(raw: bytes, data_bytes: int) -> _Header:
    """Return what a header says; ``ValueError`` if it is not what the format asks for."""
    if not raw.startswith(b"{"):
        raise ValueError("its header does not begin with an object")
    header = json.loads(raw.decode(), object_pairs_hook=_without_repeats, parse_constant=_no_constant)
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(text, str) for text in metadata.values()):
        raise ValueError("__metadata__ of its header is no object of texts")
    entries = {name: _entry(name, fields) for name, fields in header.items()}
    end = 0
    for name, entry in sorted(entries.items(), key=lambda item: item[1][2:]):
        if entry.begin != end:
            raise ValueError(f"{plain(name)} begins at {entry.begin} of its data, where {end} is next")
        end = entry.end
    if end != data_bytes:
        raise ValueError(f"its tensors end at {end} of its data, which has {data_bytes} bytes")
    return _Header(entries, metadata)


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise ValueError(f"its header holds {plain(name)} twice")
        found[name] = value
    return found


def _no_constant(name: str) -> Any:
    raise ValueError(f"its header holds {name}")


def _entry(name: str, fields: Any) -> TensorEntry:
    if not isinstance(fields, dict) or sorted(fields) != list(_ENTRY):
        raise ValueError(f"the header's entry of {plain(name)} has not exactly {', '.join(_ENTRY)}")
    if not isinstance(fields["dtype"], str) or fields["dtype"] not in _DTYPES:
        raise ValueError(f"{plain(name)} has dtype {plain(str(fields['dtype']))}; allowed: {', '.join(_DTYPES)}")
    dtype = _DTYPES[fields["dtype"]]
    shape, offsets = fields["shape"], fields["data_offsets"]
    if not _are_sizes(shape) or len(shape) > _MAX_DIMENSIONS:
        raise ValueError(f"{plain(name)} has the shape {shown(shape)}; give up to {_MAX_DIMENSIONS} sizes")
    if not _are_sizes(offsets) or len(offsets) != 2:
        raise ValueError(f"{plain(name)} has the data_offsets {shown(offsets)}; give begin and end")
    size = math.prod(shape) * dtype.itemsize
    if offsets[1] - offsets[0] != size:
        raise ValueError(
            f"{plain(name)} has the data_offsets {shown(offsets)}, but {size} bytes by its shape {shown(shape)}"
        )
    return TensorEntry(dtype, tuple(shape), *offsets)


def _are_sizes(value: Any) -> bool:
    return isinstance(value, list) and all(type(size) is int and 0 <= size <= _LARGEST for size in value)


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
