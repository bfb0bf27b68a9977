"""`/v1/files`: what clients upload and batches have written."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import ExitStack
from typing import Any

from starlette.requests import ClientDisconnect, Request
from starlette.responses import FileResponse, JSONResponse, Response

from windlass.errors import RequestError, UsageError
from windlass.protocol.fields import shorten
from windlass.server.batch_record import lifetime
from windlass.server.data_folder import DataFolder
from windlass.server.errors import HttpError, refusal
from windlass.server.file_store import StoredFile, StoreFull, Upload
from windlass.server.multipart import MultipartReader, Part
from windlass.server.paging import paged
from windlass.server.state import ServerState

PURPOSES = ("batch", "assistants", "evals", "fine-tune", "user_data", "vision")
_FIELDS = ("purpose", "expires_after[anchor]", "expires_after[seconds]")
_LONGEST_FIELD = 1024  # bytes
_LONGEST_NAME = 255  # characters
_WRITE_BYTES = 1 << 20
_MOST_SHOWN = 10_000


async def files(state: ServerState, request: Request) -> Response:
    data = state.data_folder()
    if request.method == "POST":
        if state.is_draining:
            raise HttpError(503, "the server is shutting down", headers={"retry-after": "30"})
        return await _upload(data, request)
    try:
        purpose = request.query_params.get("purpose")
        found = await asyncio.to_thread(data.files.all)
        wanted = [one for one in found if purpose in (None, one.purpose)]
        return JSONResponse(
            paged(wanted, request.query_params, limits=(_MOST_SHOWN, _MOST_SHOWN),
                  show=StoredFile.shown, also=("purpose", "order"))
        )  # fmt: skip
    except RequestError as error:
        return refusal(error, request.url.path)


async def file(state: ServerState, request: Request) -> Response:
    data, found = _found(state, request)
    if request.method != "DELETE":
        return JSONResponse(found.shown())
    user = data.book.uses(found.id)
    if user is not None:
        raise HttpError(400, f"file {found.id}: batch {user.id} reads it, which has not ended")
    await asyncio.to_thread(data.files.delete, found.id)
    return JSONResponse({"id": found.id, "object": "file", "deleted": True})


async def content(state: ServerState, request: Request) -> Response:
    data, found = _found(state, request)
    return FileResponse(data.files.path(found.id), media_type="application/octet-stream")


def _found(state: ServerState, request: Request) -> tuple[DataFolder, StoredFile]:
    data, name = state.data_folder(), request.path_params["name"]
    found = data.files.get(name)
    if found is None:
        raise HttpError(404, f"No such File object: {shorten(name)}")
    return data, found


async def _upload(data: DataFolder, request: Request) -> Response:
    reader = MultipartReader(request.headers.get("content-type", ""))
    announced = request.headers.get("content-length", "")
    if announced.isdecimal():
        least = int(announced) - 64 * _LONGEST_FIELD  # of the file; the rest is fields
        if least > data.most_bytes:
            raise _too_large(data.most_bytes)
        try:
            data.files.check_room(least)
        except StoreFull as error:
            raise _no_more(error) from error
    with ExitStack() as stack:
        form = _Form(data, stack)
        try:
            async for event in _events(reader, request):
                await form.take(event)
            if not reader.has_ended:
                raise HttpError(400, "body: the last boundary is missing")
            kept = await form.end()
        except ClientDisconnect as error:
            raise HttpError(400, "the request's body did not arrive whole") from error
        except RequestError as error:
            return refusal(error, request.url.path)
        except StoreFull as error:
            raise _no_more(error) from error
        except UsageError as error:
            raise HttpError(400, str(error), headers={"connection": "close"}) from error
        except OSError as error:
            raise no_room(error) from error
    return JSONResponse(kept.shown())


async def _events(reader: MultipartReader, request: Request) -> AsyncIterator[Part | bytes]:
    async for piece in request.stream():
        for event in reader.feed(piece):
            yield event


class _Form:
    """The parts of an upload: the file goes to the disk as it comes, fields are kept."""

    def __init__(self, data: DataFolder, stack: ExitStack) -> None:
        self._data = data
        self._stack = stack
        self._part: Part | None = None
        self._fields: dict[str, bytearray] = {}
        self._upload: Upload | None = None
        self._filename = ""
        self._pending = bytearray()

    async def take(self, event: Part | bytes) -> None:
        """Raises RequestError, HttpError, UsageError, OSError."""
        if isinstance(event, Part):
            await self._begin(event)
        elif self._part is not None and self._part.name == "file":
            self._pending += event
            if len(self._pending) >= _WRITE_BYTES:
                await self._flush()
        elif self._part is not None:
            field = self._fields[self._part.name]
            field += event
            if len(field) > _LONGEST_FIELD:
                raise RequestError(
                    f"{self._part.name}: got {len(field)} bytes or more, allowed {_LONGEST_FIELD}"
                )

    async def end(self) -> StoredFile:
        if self._upload is None:
            raise RequestError("file: missing", param="file", code="missing_required_parameter")
        values = {name: value.decode("utf-8", "replace") for name, value in self._fields.items()}
        purpose = values.get("purpose", "")
        if purpose not in PURPOSES:
            raise RequestError(
                f"purpose: got {shorten(purpose)}, allowed {', '.join(PURPOSES)}", param="purpose"
            )
        lives_s = _lifetime(values)
        await self._flush()
        upload = self._upload

        def keep() -> StoredFile:
            upload.end()
            return self._data.files.keep(
                upload.path, filename=self._filename, purpose=purpose, lives_s=lives_s
            )

        return await asyncio.to_thread(keep)

    async def _begin(self, part: Part) -> None:
        self._part = part
        if part.name == "file":
            if self._upload is not None:
                raise RequestError("file: got two, allowed one", param="file")
            if part.filename is None:
                raise RequestError("file: got a text, allowed a file", param="file")
            self._filename = part.filename[-_LONGEST_NAME:]
            begun = await asyncio.to_thread(self._data.files.begin)
            self._upload = self._stack.enter_context(begun)
        elif part.name not in _FIELDS:
            raise RequestError(
                f"{part.name:.80}: not supported, allowed file, {', '.join(_FIELDS)}",
                param=part.name, code="unsupported_parameter",
            )  # fmt: skip
        else:
            self._fields[part.name] = bytearray()

    async def _flush(self) -> None:
        assert self._upload is not None, "a file's bytes follow its head"
        if self._upload.num_bytes + len(self._pending) > self._data.most_bytes:
            raise _too_large(self._data.most_bytes)
        data, self._pending = bytes(self._pending), bytearray()
        await asyncio.to_thread(self._upload.write, data)


def _lifetime(values: dict[str, Any]) -> int | None:
    anchor, seconds = (values.get(f"expires_after[{name}]") for name in ("anchor", "seconds"))
    if anchor is None and seconds is None:
        return None
    if seconds is None or not seconds.isdecimal():
        raise RequestError(
            f"expires_after.seconds: got {shorten(seconds)}, allowed a number",
            param="expires_after.seconds",
        )
    return lifetime(anchor, int(seconds[:12]), where="expires_after")


def _too_large(most_bytes: int) -> HttpError:
    # the rest of the body is not read, so the connection cannot go on
    return HttpError(
        413, f"file: got more than the {most_bytes} bytes allowed (--max-file-size)",
        headers={"connection": "close"},
    )  # fmt: skip


def _no_more(error: StoreFull) -> HttpError:
    # not 507, which clients try again
    return HttpError(
        413, str(error), code="storage_limit_exceeded", headers={"connection": "close"}
    )


def no_room(error: OSError) -> HttpError:
    """Of what could not be written."""
    return HttpError(
        507, f"the data folder cannot be written: {error.strerror}; nothing was kept",
        headers={"connection": "close"},
    )  # fmt: skip
