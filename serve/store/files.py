"""Adapters on disk, as the store reads them: their own directories, and rank pages kept ready for the device.

Reading an adapter's directory means checking it, folding it and cutting it to rank pages. With a state directory the
pages are kept in a file named by the adapter's digest; a later load is then one read, and finds the same adapter even
if its directory has changed since. A checksum over name and contents is kept with them and checked by every load; what
is damaged is made again from the directory, and the log says so.
"""

import contextlib
import dataclasses
import logging
import os
import zlib
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from kernels.xla.pages import slab_width
from preft_jax.adapters.adapter import Adapter
from preft_jax.adapters.config import AdapterConfig
from preft_jax.adapters.fold import FOLD_VERSION
from preft_jax.adapters.pages import fold_and_cut
from preft_jax.errors import AdapterError, PreftError
from preft_jax.io.adapter_files import load_adapter
from preft_jax.io.adapter_limits import AdapterLimits, limits_for
from preft_jax.io.safetensors_io import open_safetensors, serialize_safetensors, write_file
from preft_jax.loading import Model, check_base
from preft_jax.shapes import BANK_SITES, KV_DTYPES, LINEAR_SITES, NUM_GROUPS, RANK_PAGE
from serve.store.host_copy import ALL_LINEARS, Columns, Known, pack

_LAYOUT = 3
"""Version of what a file of rank pages holds."""

_CHECKSUM = "crc32"

_log = logging.getLogger("preft.store")


class Read(NamedTuple):
    """An adapter that was read: ``known.slabs`` are NumPy arrays."""

    config: AdapterConfig
    digest: str
    known: Known


class AdapterFiles:
    """Reads adapters for one base model.

    Args:
        model: the base model.
        kept: the directory for rank pages, or None.
        limits: how much is read of an adapter; None: what one of the largest rank takes.
        dtype: of rank pages: the engine's ``adapter_dtype``, else its ``bank_dtype``; None: that of the weights.
        roots: groups of directories; the files of an adapter below one of a group must lie below one of that group,
            links followed. The first group that holds a path counts.

    Attributes:
        dtype: of rank pages.
    """

    def __init__(
        self,
        model: Model,
        kept: Path | None = None,
        *,
        limits: AdapterLimits | None = None,
        dtype: Any = None,
        roots: Sequence[Sequence[Path]] = (),
    ):
        self._model = model
        self._limits = limits_for(model.config) if limits is None else limits
        self._roots = [tuple(os.path.realpath(root) for root in group) for group in roots]
        self.dtype = np.dtype(KV_DTYPES.get(dtype, dtype) or model.params["embed"].dtype)
        self._kept = kept
        if kept is not None:
            kept.mkdir(parents=True, exist_ok=True)

    def read(self, path: str) -> Read:
        """Read, check and fold an adapter.

        Raises:
            AdapterError: if it cannot be read, is larger than the limits allow, or is not for this base model.
        """
        inside = next((group for group in self._roots if any(Path(path).is_relative_to(one) for one in group)), ())
        limits = dataclasses.replace(self._limits, roots=inside)
        return self.take(load_adapter(path, self._model, limits=limits))

    def take(self, adapter: Adapter) -> Read:
        """Check and fold an adapter that is in memory, once for digest and rank pages.

        Raises:
            AdapterError: if it is not for this base model, or holds what is not finite.
        """
        check_base(adapter, self._model)
        digest, packed = fold_and_cut(adapter, self._model.config, self.dtype)
        return Read(adapter.config, digest, pack(packed))

    def load(self, path: str, digest: str) -> Known:
        """Return the rank pages of an adapter that was read before.

        Raises:
            AdapterError: if they are not kept, and the directory does not hold that adapter any more, or there is none.
        """
        damage: AdapterError | None = None
        if self._kept is not None and self._file(digest).exists():
            try:
                return self._unpack(self._file(digest))
            except AdapterError as error:
                damage = error
                _log.warning("kept rank pages are damaged", extra={"facts": {"reason": str(error), "source": path}})
                self.drop(digest)  # So that they are kept again, whoever brings them.
        if not path:
            raise AdapterError(
                "the adapter was published from memory and its rank pages are no longer kept; publish it again"
            ) from damage
        read = self.read(path)
        if read.digest != digest:
            raise AdapterError(
                f"{path} holds another adapter than the one that was registered; register it again"
            ) from damage
        if damage is not None:
            self.keep(digest, read.known)
        return read.known

    def keep(self, digest: str, known: Known) -> bool:
        """Keep rank pages for later loads, if there is a directory for them; return whether there is."""
        if self._kept is None:
            return False
        if self._file(digest).exists():
            return True
        tensors = {
            f"{site}.{n}.{known.sites[LINEAR_SITES[0] if site == ALL_LINEARS else site].groups[n]}": array
            for site, slabs in known.slabs.items()
            for n, array in enumerate(slabs)
        }
        checksum = {_CHECKSUM: _checksum(self._file(digest).name, tensors)}
        write_file(self._file(digest), serialize_safetensors(tensors, checksum), error=AdapterError)
        return True

    def drop(self, digest: str) -> None:
        """Delete the rank pages kept of an adapter."""
        if self._kept is not None:
            with contextlib.suppress(OSError):
                self._file(digest).unlink(missing_ok=True)

    def drop_others(self, digests: Collection[str]) -> None:
        """Delete what is kept of adapters that are not among these."""
        if self._kept is not None:
            wanted = {self._file(digest).name for digest in digests}
            for entry in os.scandir(self._kept):
                if entry.name not in wanted and entry.name.endswith((".pages", ".tmp")):
                    os.unlink(entry.path)

    def _file(self, digest: str) -> Path:
        assert self._kept is not None
        return self._kept / f"{digest}.{self.dtype.name}.{FOLD_VERSION}.{_LAYOUT}.pages"

    def _unpack(self, file: Path) -> Known:
        with open_safetensors(file, error=AdapterError, advice="it is made again") as opened:
            tensors = opened.read()
            if opened.metadata != {_CHECKSUM: _checksum(file.name, tensors)}:
                raise AdapterError(f"{file} does not hold what was written to it; it is made again")
        slabs: dict[str, list[Any]] = {}
        groups: dict[str, list[int]] = {}
        try:
            for name in sorted(tensors, key=lambda name: int(name.split(".")[1])):
                site, _, group = name.split(".")
                slabs.setdefault(site, []).append(tensors[name])
                groups.setdefault(site, []).append(int(group))
        except (ValueError, IndexError) as error:
            raise AdapterError(f"{file} holds no rank pages; it is made again") from error
        self._check(file, slabs, groups)
        for site in LINEAR_SITES if ALL_LINEARS in groups else ():
            groups[site] = groups[ALL_LINEARS]
        return Known({site: Columns(tuple(columns)) for site, columns in groups.items() if site != ALL_LINEARS}, slabs)

    def _check(self, file: Path, slabs: Mapping[str, list[Any]], groups: Mapping[str, list[int]]) -> None:
        """Raise ``AdapterError`` unless these are slabs that the engine can copy to the bank."""
        model = self._model.config
        wide = {site: slab_width(*model.site_shape(site), RANK_PAGE, self.dtype) for site in BANK_SITES}
        wide[ALL_LINEARS] = sum(wide[site] for site in LINEAR_SITES)
        for site, some in slabs.items():
            whole = all(
                site in wide and array.dtype == self.dtype and array.shape == (model.num_hidden_layers, wide[site])
                for array in some
            )
            if not whole or not set(groups[site]) <= set(range(NUM_GROUPS)):
                raise AdapterError(f"{file} holds no rank pages of this base model at {site!r}; it is made again")
        if not slabs or (ALL_LINEARS in slabs and len(slabs) > 1):
            raise AdapterError(f"{file} holds the rank pages of {', '.join(slabs) or 'no site'}; it is made again")


def _checksum(name: str, tensors: Mapping[str, np.ndarray]) -> str:
    """Return CRC-32 (hex) over a file's name and its tensors; it keeps up with a disk, which SHA-256 does not."""
    total = zlib.crc32(name.encode())
    for key in sorted(tensors):
        array = tensors[key]
        total = zlib.crc32(f"{key} {array.dtype} {array.shape} ".encode(), total)
        total = zlib.crc32(np.ascontiguousarray(array).reshape(-1).view(np.uint8), total)
    return f"{total:08x}"


def told(error: BaseException) -> str:
    """Return what a user is told of an adapter that could not be loaded."""
    return str(error) if isinstance(error, PreftError) else f"{type(error).__name__}: {error}"
