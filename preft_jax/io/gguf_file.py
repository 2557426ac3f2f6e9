"""Reading the container format GGUF: metadata, and tensors dequantised one at a time.

The header is parsed here and not by the ``gguf`` package because a file may come from anywhere: every count, length and
offset is checked against the file's size before it is used, so that a damaged file is an error and never a hang. The
``gguf`` package supplies the table of types and the dequantisation.

Layout (GGUF v2 and v3, little-endian): magic, version, tensor count, metadata count; metadata as (key, type, value);
tensor infos as (name, dimensions innermost first, type, offset); padding; tensor data.
"""

import dataclasses
import mmap
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFValueType
from gguf.quants import dequantize

from preft_jax.errors import ModelError

SUPPORTED_TYPES = ("F32", "F16", "BF16", "Q4_0", "Q4_1", "Q8_0")
"""Tensor types that are dequantised; k-quants and the others are refused by name."""

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_MAX_DIMENSIONS = 4
_SCALARS: Mapping[int, tuple[str, str]] = {
    GGUFValueType.UINT8: ("<B", "<u1"),
    GGUFValueType.INT8: ("<b", "<i1"),
    GGUFValueType.UINT16: ("<H", "<u2"),
    GGUFValueType.INT16: ("<h", "<i2"),
    GGUFValueType.UINT32: ("<I", "<u4"),
    GGUFValueType.INT32: ("<i", "<i4"),
    GGUFValueType.FLOAT32: ("<f", "<f4"),
    GGUFValueType.UINT64: ("<Q", "<u8"),
    GGUFValueType.INT64: ("<q", "<i8"),
    GGUFValueType.FLOAT64: ("<d", "<f8"),
    GGUFValueType.BOOL: ("<?", "?"),
}
"""Value type -> (struct format, numpy dtype)."""


class _DamagedError(Exception):
    """The header contradicts itself or the file's size; the message says how."""


@dataclasses.dataclass(frozen=True)
class TensorInfo:
    """Where one tensor lies: ``shape`` outermost first, ``start`` and ``size`` in bytes from the file's beginning."""

    type: GGMLQuantizationType
    shape: tuple[int, ...]
    start: int
    size: int


@dataclasses.dataclass(frozen=True)
class GGUFFile:
    """An opened GGUF file: ``metadata`` as plain Python values and numpy arrays, ``tensors`` by name."""

    path: Path
    metadata: Mapping[str, Any]
    tensors: Mapping[str, TensorInfo]
    data: mmap.mmap = dataclasses.field(repr=False)

    def read(self, name: str) -> np.ndarray:
        """Return one tensor, dequantised to float32, outermost dimension first (a new array)."""
        info = self.tensors[name]
        raw = np.frombuffer(self.data, np.uint8, count=info.size, offset=info.start)
        if info.type == GGMLQuantizationType.F32:
            return raw.view("<f4").reshape(info.shape).astype(np.float32)
        if info.type == GGMLQuantizationType.F16:
            return raw.view("<f2").reshape(info.shape).astype(np.float32)
        block, size = GGML_QUANT_SIZES[info.type]
        rows = raw.reshape(*info.shape[:-1], info.shape[-1] // block * size)
        return dequantize(rows, info.type)


class _Cursor:
    """A position in the file that cannot leave it."""

    def __init__(self, data: mmap.mmap):
        self.data, self.at, self.end = data, 0, len(data)

    def take(self, count: int) -> bytes:
        if count > self.end - self.at:
            raise _DamagedError(f"{count} bytes are wanted at byte {self.at}, and the file has {self.end}")
        self.at += count
        return self.data[self.at - count : self.at]

    def scalar(self, kind: int) -> Any:
        form = _SCALARS[kind][0]
        return struct.unpack(form, self.take(struct.calcsize(form)))[0]

    def uint32(self) -> int:
        return self.scalar(GGUFValueType.UINT32)

    def uint64(self) -> int:
        return self.scalar(GGUFValueType.UINT64)

    def string(self) -> str:
        return self.take(self.uint64()).decode("utf-8")

    def value(self) -> Any:
        kind = self.uint32()
        if kind == GGUFValueType.STRING:
            return self.string()
        if kind == GGUFValueType.ARRAY:
            return self.array()
        if kind not in _SCALARS:
            raise _DamagedError(f"metadata type {kind} at byte {self.at - 4} does not exist")
        return self.scalar(kind)

    def array(self) -> Any:
        kind, count = self.uint32(), self.uint64()
        if kind == GGUFValueType.STRING:
            if count * 8 > self.end - self.at:
                raise _DamagedError(f"an array of {count} strings at byte {self.at} does not fit the file")
            return self.strings(count)
        if kind not in _SCALARS:
            raise _DamagedError(f"array element type {kind} at byte {self.at - 12} is not supported")
        dtype = np.dtype(_SCALARS[kind][1])
        return np.frombuffer(self.take(count * dtype.itemsize), dtype)

    def strings(self, count: int) -> list[str]:
        """Read many strings; a vocabulary has 100,000, so this avoids a call for each part of each."""
        data, at, end = self.data, self.at, self.end
        unpack = struct.Struct("<Q").unpack_from
        result = []
        for _ in range(count):
            if end - at < 8:
                raise _DamagedError(f"a string is wanted at byte {at}, and the file has {end}")
            stop = at + 8 + unpack(data, at)[0]
            if stop > end:
                raise _DamagedError(f"a string at byte {at} ends at byte {stop}, and the file has {end}")
            result.append(data[at + 8 : stop].decode("utf-8"))
            at = stop
        self.at = at
        return result


def _read_metadata(cursor: _Cursor, count: int) -> dict[str, Any]:
    metadata: dict[str, Any] = {}
    for _ in range(count):
        key = cursor.string()
        if key in metadata:
            raise _DamagedError(f"metadata key {key!r} appears twice")
        metadata[key] = cursor.value()
    return metadata


def _read_tensor_info(cursor: _Cursor) -> tuple[str, TensorInfo]:
    """Read one tensor's entry; ``start`` is still relative to the data section."""
    name = cursor.string()
    dimensions = cursor.uint32()
    if dimensions > _MAX_DIMENSIONS:
        raise _DamagedError(f"tensor {name!r} has {dimensions} dimensions; at most {_MAX_DIMENSIONS} are allowed")
    shape = tuple(reversed([cursor.uint64() for _ in range(dimensions)]))
    kind, start = cursor.uint32(), cursor.uint64()
    known = kind in {int(member) for member in GGMLQuantizationType}
    type_name = GGMLQuantizationType(kind).name if known else f"number {kind}"
    if type_name not in SUPPORTED_TYPES:
        raise _DamagedError(
            f"tensor {name!r} has type {type_name}, which is not supported; allowed: {', '.join(SUPPORTED_TYPES)}. "
            "Use a file quantised to one of these, or the model's safetensors"
        )
    tensor_type = GGMLQuantizationType(kind)
    block, size = GGML_QUANT_SIZES[tensor_type]
    elements = 1
    for extent in shape:
        elements *= extent
    if not shape or shape[-1] % block:
        raise _DamagedError(
            f"tensor {name!r} of shape {list(shape)} does not divide into {type_name} blocks of {block}"
        )
    return name, TensorInfo(tensor_type, shape, start, elements // block * size)


def _read_tensor_infos(cursor: _Cursor, count: int) -> dict[str, TensorInfo]:
    infos: dict[str, TensorInfo] = {}
    for _ in range(count):
        name, info = _read_tensor_info(cursor)
        if name in infos:
            raise _DamagedError(f"tensor {name!r} appears twice")
        infos[name] = info
    return infos


def _place_tensors(infos: dict[str, TensorInfo], data_start: int, alignment: int, end: int) -> dict[str, TensorInfo]:
    """Turn relative offsets into file offsets and check that every tensor lies inside the file."""
    placed = {}
    for name, info in infos.items():
        start = data_start + info.start
        if info.start % alignment:
            raise _DamagedError(f"tensor {name!r} starts at offset {info.start}, not a multiple of {alignment}")
        if start + info.size > end:
            raise _DamagedError(
                f"tensor {name!r} ends at byte {start + info.size}, and the file has {end}: it is cut short"
            )
        placed[name] = dataclasses.replace(info, start=start)
    return placed


def _parse(data: mmap.mmap) -> tuple[dict[str, Any], dict[str, TensorInfo]]:
    cursor = _Cursor(data)
    magic = cursor.take(4)
    if magic != _MAGIC:
        raise _DamagedError(f"it begins with {magic!r}, not {_MAGIC!r}: it is no GGUF file")
    version = cursor.uint32()
    if version not in _VERSIONS:
        raise _DamagedError(f"GGUF version {version} is not supported; allowed: {_VERSIONS}, little-endian")
    tensor_count, metadata_count = cursor.uint64(), cursor.uint64()
    metadata = _read_metadata(cursor, metadata_count)
    infos = _read_tensor_infos(cursor, tensor_count)
    alignment = metadata.get("general.alignment", 32)
    if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
        raise _DamagedError(f"general.alignment is {alignment!r}; it must be a power of two")
    data_start = -(-cursor.at // alignment) * alignment
    return metadata, _place_tensors(infos, data_start, alignment, cursor.end)


def open_gguf(path: Path) -> GGUFFile:
    """Open a GGUF file and check its header; tensor data is mapped, not read.

    Raises:
        ModelError: if the file is missing, cut short or damaged, or holds a tensor type that is not supported.
    """
    try:
        with path.open("rb") as file:
            data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        metadata, tensors = _parse(data)
    except (OSError, ValueError, _DamagedError) as error:
        raise ModelError(f"cannot read GGUF file {path}: {error}") from error
    return GGUFFile(path, metadata, tensors, data)
