"""Files that tenants uploaded, on disk.

An upload is a directory named by its id that holds ``content.jsonl`` and ``about.json``. It is written under another
name and renamed once both are on disk: whenever the process ends, an upload is there whole or not at all. Deleting
renames it first, too. What is left of uploads that did not end is removed at the next start.
"""

import collections
import contextlib
import dataclasses
import errno
import hashlib
import json
import logging
import os
import re
import secrets
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from preft_jax.errors import ConfigError, LimitError, PreftError, shown
from preft_jax.io.safetensors_io import sync_directory

PURPOSES = ("fine-tune",)
"""What a file may be uploaded for."""

CONTENT = "content.jsonl"
_ABOUT = "about.json"
_LARGEST_ABOUT = 2**16
_LONGEST_FILENAME = 255
_ID = re.compile(r"file-[0-9a-f]{24}")
_PIECE = 2**20
_FULL = (errno.ENOSPC, errno.EDQUOT)

_log = logging.getLogger("preft.store")


class FileTooLargeError(LimitError):
    """A file that has more bytes than any may have."""


class DiskError(PreftError):
    """The disk did not do what was asked; ``full``: because it has no room. What was there before is there still."""

    def __init__(self, message: str, *, full: bool = False):
        super().__init__(message)
        self.full = full


@dataclasses.dataclass(frozen=True, kw_only=True)
class UploadLimits:
    """How much may be uploaded.

    Attributes:
        file_bytes: of one file.
        owner_bytes: of all files of an owner.
        owner_files: files of an owner.
        at_once: uploads of an owner that are under way.
    """

    file_bytes: int = 512 * 2**20
    owner_bytes: int = 2048 * 2**20
    owner_files: int = 256
    at_once: int = 4


@dataclasses.dataclass(frozen=True, kw_only=True)
class Upload:
    """An uploaded file.

    Attributes:
        id: ``file-`` and 24 hexadecimal digits. Ids are in the order in which uploads ended.
        owner: whose it is; None: everybody's.
        filename: as the client gave it; no path on this machine.
        num_bytes: of its content.
        purpose: one of ``PURPOSES``.
        created_at: seconds since 1970.
        sha256: of its content, hexadecimal.
    """

    id: str
    owner: str | None
    filename: str
    num_bytes: int
    purpose: str
    created_at: int
    sha256: str


def check_purpose(purpose: str) -> None:
    """Raise ``ConfigError`` for what files are not taken for."""
    if purpose not in PURPOSES:
        raise ConfigError(f"the purpose is {shown(purpose)}; allowed: {', '.join(PURPOSES)}")


def check_filename(filename: str) -> None:
    """Raise ``ConfigError`` for a name that no file can have."""
    if not filename or not filename.isprintable() or len(filename) > _LONGEST_FILENAME:
        raise ConfigError(f"the filename is {shown(filename)}; give 1 to {_LONGEST_FILENAME} printable characters")


class Uploads:
    """The uploaded files below a directory. Thread-safe; reading names and figures never waits for the disk.

    Args:
        root: made if it is not there. One process at a time may use it.
        limits: see there.
        clock: seconds since 1970.

    Raises:
        ConfigError: if another process uses the directory, or it cannot be written.
    """

    def __init__(self, root: Path, limits: UploadLimits = UploadLimits(), clock: Callable[[], float] = time.time):
        self.limits = limits
        self._root = Path(os.path.abspath(root))
        self._clock = clock
        # Never held while the disk is asked for something.
        self._lock = threading.Lock()
        self._files: dict[str, Upload] = {}
        self._bytes: collections.Counter[str | None] = collections.Counter()
        self._counts: collections.Counter[str | None] = collections.Counter()
        self._receiving: collections.Counter[str | None] = collections.Counter()
        try:
            self._root.mkdir(parents=True, exist_ok=True, mode=0o700)
            self._held = _hold(self._root / "lock")
            self._read()
        except OSError as error:
            raise ConfigError(
                f"uploads cannot be kept in {self._root}: {error.strerror or error}; give another directory"
            ) from None
        self._last = max((int(name[5:16], 16) for name in self._files), default=0)

    def list(self) -> list[Upload]:
        """Return all files, the newest first."""
        with self._lock:
            return sorted(self._files.values(), key=lambda upload: upload.id, reverse=True)

    def get(self, upload_id: str) -> Upload | None:
        """Return a file, or None if there is none with this id."""
        with self._lock:
            return self._files.get(upload_id)

    def path(self, upload: Upload) -> Path:
        """Return where a file's content lies."""
        return self._root / upload.id / CONTENT

    def open(self, upload: Upload) -> BinaryIO:
        """Open a file's content; it can be read to its end if the file is deleted meanwhile.

        Raises:
            DiskError: if it cannot be opened.
        """
        with _disk_errors(f"{upload.id} cannot be read"):
            return open(self.path(upload), "rb")

    def verify(self, upload: Upload) -> None:
        """Raise ``DiskError`` if a file's content is not what was uploaded."""
        found = hashlib.sha256()
        with self.open(upload) as file, _disk_errors(f"{upload.id} cannot be read"):
            while piece := file.read(_PIECE):
                found.update(piece)
        if found.hexdigest() != upload.sha256:
            raise DiskError(f"{upload.id} was damaged on the server's disk; delete it and upload it again")

    def begin(self, owner: str | None) -> "Incoming":
        """Begin to receive a file.

        Raises:
            LimitError: if its owner has as many files, or as many uploads under way, as are allowed.
            DiskError: if the disk takes nothing.
        """
        limits = self.limits
        with self._lock:
            if self._receiving[owner] >= limits.at_once:
                raise LimitError(f"{self._receiving[owner]} uploads are under way, and at most {limits.at_once} may be")
            if self._counts[owner] + self._receiving[owner] >= limits.owner_files:
                raise LimitError(f"there are {limits.owner_files} files, and no more may be kept; delete some")
            self._receiving[owner] += 1
        try:
            with _disk_errors("the upload cannot be kept"):
                return Incoming(self, owner, self._root / f".incoming-{secrets.token_hex(12)}")
        except BaseException:
            self._end(owner, 0)
            raise

    def delete(self, upload: Upload) -> bool:
        """Delete a file; False if it is not there any more.

        Raises:
            DiskError: if it cannot be deleted; it is there still.
        """
        with self._lock:
            if self._files.pop(upload.id, None) is None:
                return False
        gone = self._root / f".gone-{secrets.token_hex(12)}"
        try:
            with _disk_errors(f"{upload.id} cannot be deleted"):
                os.rename(self._root / upload.id, gone)
        except BaseException:
            with self._lock:
                self._files[upload.id] = upload
            raise
        with self._lock:
            self._counts[upload.owner] -= 1
            self._bytes[upload.owner] -= upload.num_bytes
        sync_directory(self._root)
        shutil.rmtree(gone, ignore_errors=True)
        return True

    def close(self) -> None:
        """Let another process use the directory."""
        os.close(self._held)

    # For ``Incoming``

    def _grow(self, owner: str | None, size: int, more: int) -> None:
        """Count bytes that come in; raises ``LimitError`` if they are too many, and counts nothing then."""
        if size + more > self.limits.file_bytes:
            raise FileTooLargeError(f"the file has more than {self.limits.file_bytes} bytes; send a smaller one")
        with self._lock:
            if self._bytes[owner] + more > self.limits.owner_bytes:
                raise LimitError(
                    f"with this file there would be more than {self.limits.owner_bytes} bytes; delete other files"
                )
            self._bytes[owner] += more

    def _end(self, owner: str | None, size: int) -> None:
        """Forget an upload that was given up."""
        with self._lock:
            self._receiving[owner] -= 1
            self._bytes[owner] -= size

    def _next_id(self) -> tuple[str, int]:
        """Return a new id and its time in seconds; ids are in order, also when the clock goes back."""
        with self._lock:
            now = self._clock()
            self._last = max(int(1000 * now), self._last + 1)
            return f"file-{self._last:011x}{secrets.token_hex(7)[:13]}", int(now)

    def _add(self, upload: Upload) -> None:
        with self._lock:
            self._files[upload.id] = upload
            self._counts[upload.owner] += 1
            self._receiving[upload.owner] -= 1

    def _read(self) -> None:
        """Read what is there, and remove what is left of uploads and deletions that did not end."""
        for entry in sorted(self._root.iterdir()):
            if entry.name.startswith("."):
                shutil.rmtree(entry, ignore_errors=True)
            elif _ID.fullmatch(entry.name):
                try:
                    upload = _read_about(entry)
                except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
                    _log.warning("upload refused", extra={"facts": {"file": entry.name, "reason": str(error)}})
                    continue
                self._files[upload.id] = upload
                self._counts[upload.owner] += 1
                self._bytes[upload.owner] += upload.num_bytes


class Incoming:
    """A file that is being received. Thread-safe; ``close`` removes what is there unless ``finish`` kept it."""

    def __init__(self, uploads: Uploads, owner: str | None, folder: Path):
        self._uploads = uploads
        self._owner = owner
        self._folder = folder
        self._sum = hashlib.sha256()
        self._lock = threading.Lock()
        self._open = True
        self.num_bytes = 0
        try:
            folder.mkdir(mode=0o700)
            self._file = open(folder / CONTENT, "xb", buffering=0, opener=_private)  # noqa: SIM115 (``close`` does it)
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise

    def write(self, data: bytes) -> None:
        """Write the next bytes.

        Raises:
            LimitError: if there are too many; a ``FileTooLargeError`` if any owner's would be.
            DiskError: if the disk does not take them.
        """
        with self._lock, _disk_errors("the upload cannot be kept"):
            self._check_open()
            self._uploads._grow(self._owner, self.num_bytes, len(data))
            self.num_bytes += len(data)
            self._sum.update(data)
            view = memoryview(data)
            while view:
                view = view[self._file.write(view) :]

    def finish(self, filename: str, purpose: str) -> Upload:
        """Let the file be there, on disk, and return it.

        Raises:
            ConfigError: if it has no bytes, or for a filename or a purpose that is not allowed.
            DiskError: if the disk does not take it.
        """
        with self._lock, _disk_errors("the upload cannot be kept"):
            self._check_open()
            check_purpose(purpose)
            check_filename(filename)
            if not self.num_bytes:
                raise ConfigError("the file is empty; send one with at least one line")
            os.fsync(self._file.fileno())
            upload_id, created_at = self._uploads._next_id()
            upload = Upload(
                id=upload_id, owner=self._owner, filename=filename, num_bytes=self.num_bytes, purpose=purpose,
                created_at=created_at, sha256=self._sum.hexdigest(),
            )  # fmt: skip
            _write_about(self._folder, upload)
            os.rename(self._folder, self._uploads._root / upload_id)
            sync_directory(self._uploads._root)
            self._open = False
            self._file.close()
            self._uploads._add(upload)
            return upload

    def close(self) -> None:
        """Remove what was received, unless it was kept; once is enough, more often does no harm."""
        with self._lock:
            if not self._open:
                return
            self._open = False
            with contextlib.suppress(OSError):
                self._file.close()
            shutil.rmtree(self._folder, ignore_errors=True)
            self._uploads._end(self._owner, self.num_bytes)

    def _check_open(self) -> None:
        if not self._open:
            raise DiskError("the upload was given up")


@contextlib.contextmanager
def _disk_errors(what: str) -> Iterator[None]:
    """Turn an ``OSError`` into a ``DiskError`` that tells no path."""
    try:
        yield
    except OSError as error:
        _log.error("%s: %s", what, error)
        if error.errno in _FULL:
            raise DiskError(f"{what}: the server's disk is full; try again when there is room", full=True) from error
        raise DiskError(f"{what}: {error.strerror or type(error).__name__}; the server's log says more") from error


def _private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)


def _hold(path: Path) -> int:
    """Return a descriptor that holds a lock for as long as it is open.

    Raises:
        ConfigError: if another process holds it.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        import fcntl
    except ImportError:  # Windows, where nothing is locked.
        return descriptor
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        raise ConfigError(f"another process keeps uploads in {path.parent}; give each server its own") from None
    return descriptor


def _sum_of(about: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()


def _write_about(folder: Path, upload: Upload) -> None:
    about = dataclasses.asdict(upload)
    with open(folder / _ABOUT, "xb", opener=_private) as file:
        file.write(json.dumps({"about": about, "sum": _sum_of(about)}).encode())
        file.flush()
        os.fsync(file.fileno())
    sync_directory(folder)


def _read_about(folder: Path) -> Upload:
    """Read what is known of an upload; raises whatever a damaged file gives."""
    with open(folder / _ABOUT, "rb") as file:
        read = json.loads(file.read(_LARGEST_ABOUT))
    about = read["about"]
    if read["sum"] != _sum_of(about) or about["id"] != folder.name:
        raise ValueError(f"{_ABOUT} is damaged")
    upload = Upload(**about)
    if (size := os.path.getsize(folder / CONTENT)) != upload.num_bytes:
        raise ValueError(f"{CONTENT} has {size} bytes, and {upload.num_bytes} were uploaded")
    return upload
