"""Multipart forms with one file, written to disk while they arrive."""

import threading
from collections.abc import Callable
from typing import Any

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from preft_jax.errors import ConfigError, did_you_mean, plain
from serve.server.failures import ApiError
from serve.store.uploads import Incoming, Upload, check_filename, check_purpose

ROOM = 2**16
"""Bytes that a form may have beside its file."""

_FIELDS = ("file", "purpose")
_UNSUPPORTED = ("expires_after",)
_MAX_PARTS = 16
_MAX_HEADERS = 8
_MAX_HEADER = 4096
_MAX_FIELD = 1024


class UploadForm:
    """The form of ``POST /v1/files``: ``purpose`` and ``file``, in any order.

    Args:
        content_type: the request's header, with the boundary.
        begin: begins to receive the file; called once.

    Raises:
        ApiError: 415 or 400, if it is no multipart form.
    """

    def __init__(self, content_type: str, begin: Callable[[], Incoming]):
        kind, options = parse_options_header(content_type)
        if kind != b"multipart/form-data":
            raise ApiError(
                415,
                "the body's Content-Type is not multipart/form-data; send a form with the fields purpose and file",
                code="not_multipart",
            )
        self._begin = begin
        self._size = 0
        self._parts = 0
        self._incoming: Incoming | None = None
        self._filename = ""
        self._values: dict[str, bytearray] = {}
        self._header = b""
        self._value = b""
        self._headers: dict[bytes, bytes] = {}
        self._part: str | None = None
        self._pieces: list[bytes] = []
        self._ended = False
        self._closed = False
        # A body that is given up may be closed while a thread is still reading its last bytes.
        self._lock = threading.Lock()
        names = ("part_begin", "part_data", "part_end", "header_field", "header_value", "header_end")
        names = (*names, "headers_finished", "end")
        callbacks: Any = {f"on_{name}": getattr(self, f"_on_{name}") for name in names}
        try:
            self._parser = MultipartParser(
                options.get(b"boundary", b""),
                callbacks,
                max_header_count=_MAX_HEADERS,
                max_header_size=_MAX_HEADER,
            )
        except FormParserError as error:
            raise _broken(error) from None
        if not options.get(b"boundary"):
            raise _broken("its Content-Type has no boundary")

    def feed(self, data: bytes) -> None:
        """Take the next bytes of the body.

        Raises:
            ApiError: 400, if it is no form or has other fields.
            LimitError, DiskError: as ``Incoming.write``.
        """
        with self._lock:
            if self._closed:
                return
            try:
                self._parser.write(data)
            except FormParserError as error:
                raise _broken(error) from None
            self._flush()
            self._size += len(data)
            if self._size - (0 if self._incoming is None else self._incoming.num_bytes) > ROOM:
                raise _broken(f"it has more than {ROOM} bytes beside the file")

    def finish(self) -> Upload:
        """Keep the file; the body has ended.

        Raises:
            ApiError: 400, if something is missing.
            DiskError: as ``Incoming.finish``.
        """
        self._flush()
        if not self._ended:
            raise _broken("it ends before its last boundary")
        if self._incoming is None:
            raise ApiError(400, "file is missing; send one", code="missing_field", param="file")
        if "purpose" not in self._values:
            raise ApiError(400, "purpose is missing; this endpoint needs it", code="missing_field", param="purpose")
        try:
            return self._incoming.finish(self._filename, self._text("purpose"))
        except ConfigError as error:
            raise ApiError(400, str(error), code="invalid_value", param="file") from None

    def close(self) -> None:
        """Remove what was received, unless it was kept."""
        with self._lock:
            self._closed = True
            if self._incoming is not None:
                self._incoming.close()

    def _flush(self) -> None:
        if self._incoming is not None and self._pieces:
            pieces, self._pieces = self._pieces, []
            self._incoming.write(b"".join(pieces))

    def _text(self, name: str) -> str:
        return self._values[name].decode("utf-8", "replace")

    # What the parser calls

    def _on_part_begin(self) -> None:
        self._parts += 1
        if self._parts > _MAX_PARTS:
            raise _broken(f"it has more than {_MAX_PARTS} parts")
        self._headers = {}

    def _on_header_field(self, data: bytes, start: int, end: int) -> None:
        self._header += data[start:end]

    def _on_header_value(self, data: bytes, start: int, end: int) -> None:
        self._value += data[start:end]

    def _on_header_end(self) -> None:
        self._headers[self._header.lower()] = self._value
        self._header = self._value = b""

    def _on_headers_finished(self) -> None:
        kind, options = parse_options_header(self._headers.get(b"content-disposition", b""))
        if kind != b"form-data" or b"name" not in options:
            raise _broken("a part has no Content-Disposition with a name")
        name = options[b"name"].decode("utf-8", "replace")
        outer = name.partition("[")[0]
        if outer in _UNSUPPORTED:
            raise ApiError(
                400, f"{outer} is not supported by this server; leave it out", code="unsupported_field", param=outer
            )
        if name not in _FIELDS:
            near = did_you_mean(name, _FIELDS)
            told = f"{plain(name)} is no field of this form{near}; leave it out"
            raise ApiError(400, told, code="unknown_field", param=plain(name)[:80])
        if name in self._values or (name == "file" and self._incoming is not None):
            raise ApiError(400, f"{name} is there twice; give it once", code="invalid_value", param=name)
        if name == "file":
            self._filename = options.get(b"filename", b"").decode("utf-8", "replace")
            _checked("file", check_filename, self._filename)
            self._incoming = self._begin()
        else:
            self._values[name] = bytearray()
        self._part = name

    def _on_part_data(self, data: bytes, start: int, end: int) -> None:
        if self._part == "file":
            self._pieces.append(data[start:end])
            return
        assert self._part is not None
        value = self._values[self._part]
        value += data[start:end]
        if len(value) > _MAX_FIELD:
            raise ApiError(400, f"{self._part} is too long", code="invalid_value", param=self._part)

    def _on_part_end(self) -> None:
        if self._part == "purpose":
            _checked("purpose", check_purpose, self._text("purpose"))
        self._part = None

    def _on_end(self) -> None:
        self._ended = True


def _checked(field: str, check: Callable[[str], None], value: str) -> None:
    try:
        check(value)
    except ConfigError as error:
        raise ApiError(400, str(error), code="invalid_value", param=field) from None


def _broken(what: object) -> ApiError:
    return ApiError(400, f"the form cannot be read: {plain(str(what))}", code="invalid_form")
