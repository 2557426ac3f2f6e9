"""OpenAI's ``/v1/files``: what a tenant uploads to train on."""

import asyncio
import functools
import urllib.parse
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Annotated, Any, BinaryIO, Literal

from fastapi import FastAPI, Query, Request
from starlette.requests import ClientDisconnect
from starlette.responses import Response, StreamingResponse

from preft_jax.errors import PreftError, did_you_mean, plain
from serve.server.auth import Identity
from serve.server.failures import NOT_AGAIN, ApiError, not_there
from serve.server.form import ROOM, UploadForm
from serve.server.tuning import Tuning
from serve.store.uploads import Upload, Uploads

_PIECE = 2**18
_MOST = 10_000

_FORM = {
    "required": True,
    "content": {
        "multipart/form-data": {
            "schema": {
                "type": "object",
                "required": ["purpose", "file"],
                "additionalProperties": False,
                "properties": {
                    "purpose": {"type": "string", "enum": ["fine-tune"]},
                    "file": {"type": "string", "format": "binary"},
                },
            }
        }
    },
}


def file_object(upload: Upload) -> dict[str, Any]:
    """Return an upload as OpenAI's API shows it."""
    return {
        "id": upload.id,
        "object": "file",
        "bytes": upload.num_bytes,
        "created_at": upload.created_at,
        "filename": upload.filename,
        "purpose": upload.purpose,
        "status": "processed",
        "status_details": None,
        "expires_at": None,
    }


def find_file(uploads: Uploads, file_id: str, identity: Identity, param: str) -> Upload:
    """Return a file that someone sees.

    Raises:
        ApiError: 404, for one that is not there or is another tenant's.
    """
    upload = uploads.get(file_id)
    if upload is None or not identity.sees(upload.owner):
        raise not_there(f"file {plain(file_id)[:80]} does not exist", "/v1/files", code="file_not_found", param=param)
    return upload


def known_query(request: Request, allowed: Sequence[str]) -> None:
    """Refuse parameters of a query that are unknown, as unknown fields of a body are."""
    for name in request.query_params:
        if name not in allowed:
            near = did_you_mean(name, allowed)
            raise ApiError(
                400,
                f"{plain(name)} is no parameter of this endpoint{near}; leave it out",
                code="unknown_field",
                param=plain(name)[:80],
            )


def page(items: Sequence[dict[str, Any]], limit: int) -> dict[str, Any]:
    """Return a page of a list: up to ``limit`` of the items that are left, and whether there are more."""
    data = list(items[:limit])
    return {
        "object": "list",
        "data": data,
        "first_id": data[0]["id"] if data else None,
        "last_id": data[-1]["id"] if data else None,
        "has_more": len(items) > limit,
    }


async def receive(pieces: AsyncIterator[bytes], form: UploadForm, tuning: Tuning) -> Upload:
    """Receive a form; it is read, and its file written, in the threads that wait for the disk.

    Raises:
        ApiError, PreftError: see ``UploadForm``.
    """
    waiting: list[bytes] = []
    size = 0
    async for piece in pieces:
        waiting.append(piece)
        size += len(piece)
        if size >= _PIECE:
            await tuning.disk(form.feed, b"".join(waiting))
            waiting, size = [], 0
    await tuning.disk(form.feed, b"".join(waiting))
    return await tuning.disk(form.finish)


async def drain(pieces: AsyncIterator[bytes], most: int) -> None:
    """Read on and forget it: a client that is cut off while it sends does not see why."""
    async for piece in pieces:
        most -= len(piece)
        if most < 0:
            return


async def read_pieces(file: BinaryIO, tuning: Tuning) -> AsyncIterator[bytes]:
    """Yield a file's content, and close it."""
    try:
        while piece := await tuning.disk(file.read, _PIECE):
            yield piece
    finally:
        file.close()


def add_files(app: FastAPI, tuning: Tuning, errors: dict[int | str, Any]) -> None:
    """Add the routes of files."""
    _add_all(app, tuning, errors)
    _add_each(app, tuning, errors)


def _add_all(app: FastAPI, tuning: Tuning, errors: dict[int | str, Any]) -> None:
    uploads = tuning.uploads

    @app.post("/v1/files", responses=errors, openapi_extra={"requestBody": _FORM})
    async def create(request: Request) -> dict[str, Any]:
        """Take a file of rows to train on."""
        known_query(request, ())
        begin = functools.partial(uploads.begin, request.state.identity.owner)
        most = uploads.limits.file_bytes + ROOM
        try:
            async with asyncio.timeout(tuning.upload_seconds):
                return file_object(await _received(request, begin, tuning, most))
        except TimeoutError:
            told = f"the file did not arrive within {tuning.upload_seconds:g} s"
            raise ApiError(408, told, code="timeout", headers={"Connection": "close"}) from None
        except ClientDisconnect:
            raise ApiError(499, "the client went away", code="disconnected") from None

    @app.get("/v1/files", responses=errors)
    async def listed(
        request: Request,
        after: str | None = None,
        limit: Annotated[int, Query(ge=1, le=_MOST)] = _MOST,
        order: Literal["asc", "desc"] = "desc",
        purpose: str | None = None,
    ) -> dict[str, Any]:
        """List the files that the key may see."""
        known_query(request, ("after", "limit", "order", "purpose"))
        identity = request.state.identity
        found = [upload for upload in uploads.list() if identity.sees(upload.owner)]
        if purpose is not None:
            found = [upload for upload in found if upload.purpose == purpose]
        if order == "asc":
            found.reverse()
        if after is not None:  # Ids are in order, so the file itself may be gone.
            found = [upload for upload in found if (upload.id > after if order == "asc" else upload.id < after)]
        return page([file_object(upload) for upload in found[: limit + 1]], limit)


def _add_each(app: FastAPI, tuning: Tuning, errors: dict[int | str, Any]) -> None:
    uploads = tuning.uploads

    @app.get("/v1/files/{file_id}", responses=errors)
    async def retrieve(request: Request, file_id: str) -> dict[str, Any]:
        """Describe a file."""
        return file_object(find_file(uploads, file_id, request.state.identity, "file_id"))

    @app.get(
        "/v1/files/{file_id}/content",
        responses={**errors, 200: {"content": {"application/octet-stream": {}}}},
        response_class=Response,
    )
    async def content(request: Request, file_id: str) -> Response:
        """Return a file's bytes."""
        upload = find_file(uploads, file_id, request.state.identity, "file_id")
        file = await tuning.disk(uploads.open, upload)
        headers = {
            "Content-Disposition": f"attachment; filename*=UTF-8''{urllib.parse.quote(upload.filename, safe='')}",
            "Content-Length": str(upload.num_bytes),
        }
        return StreamingResponse(read_pieces(file, tuning), headers=headers, media_type="application/octet-stream")

    @app.delete("/v1/files/{file_id}", responses=errors)
    async def delete(request: Request, file_id: str) -> dict[str, Any]:
        """Delete a file that no job has yet to read."""
        async with tuning.one_at_a_time:
            upload = find_file(uploads, file_id, request.state.identity, "file_id")
            tuning.check_change(request.state.identity, upload.owner)
            if (job := await tuning.disk(tuning.reader_of, upload.id)) is not None:
                raise ApiError(
                    409,
                    f"the job {job} has not read {upload.id} yet; cancel it, or delete the file later",
                    code="file_in_use",
                    param="file_id",
                    headers=NOT_AGAIN,
                )
            await tuning.disk(uploads.delete, upload)
        return {"id": upload.id, "object": "file", "deleted": True}


async def _received(request: Request, begin: Callable[[], Any], tuning: Tuning, most: int) -> Upload:
    """Receive an upload whole; of one that is refused the rest is read and forgotten, and nothing is kept."""
    form: UploadForm | None = None
    pieces = request.stream()
    try:
        form = UploadForm(request.headers.get("content-type", ""), begin)
        return await receive(pieces, form, tuning)
    except (ApiError, PreftError):
        await drain(pieces, most)
        raise
    finally:
        if form is not None:
            await tuning.disk(form.close)
