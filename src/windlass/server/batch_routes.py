"""`/v1/batches`: files of rows that run behind all other requests."""

import asyncio

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from windlass.errors import RequestError, UsageError
from windlass.protocol.fields import shorten
from windlass.server.batch_record import Batch, read_wish
from windlass.server.bodies import read_object
from windlass.server.data_folder import DataFolder
from windlass.server.errors import HttpError, refusal
from windlass.server.file_routes import no_room
from windlass.server.paging import paged
from windlass.server.state import ServerState


async def batches(state: ServerState, request: Request) -> Response:
    data = state.data_folder()
    try:
        if request.method != "POST":
            found = await asyncio.to_thread(data.book.all)
            return JSONResponse(
                paged(found, request.query_params, limits=(20, 100),
                      show=lambda one: _shown(state, data, one))
            )  # fmt: skip
        if state.is_draining:
            raise HttpError(503, "the server is shutting down", headers={"retry-after": "30"})
        wish = read_wish(await read_object(request, state.limits.body_bytes))
        batch = await asyncio.to_thread(data.book.create, wish)
    except RequestError as error:
        return refusal(error, request.url.path)
    except UsageError as error:
        raise HttpError(400, str(error)) from error
    except OSError as error:
        raise no_room(error) from error
    return JSONResponse(_shown(state, data, batch))


async def batch(state: ServerState, request: Request) -> Response:
    data = state.data_folder()
    return JSONResponse(_shown(state, data, _found(data, request)))


async def cancel(state: ServerState, request: Request) -> Response:
    data = state.data_folder()
    try:
        found = await asyncio.to_thread(data.book.cancel, _found(data, request).id)
    except RequestError as error:
        return refusal(error, request.url.path)
    except OSError as error:
        raise no_room(error) from error
    return JSONResponse(_shown(state, data, found))


def _found(data: DataFolder, request: Request) -> Batch:
    name = request.path_params["name"]
    found = data.book.get(name)
    if found is None:
        raise HttpError(404, f"No batch found with id {shorten(name)}")
    return found


def _shown(state: ServerState, data: DataFolder, batch: Batch) -> dict[str, object]:
    return batch.shown(state.names[0], data.worker.held(batch.id) if batch.is_open else None)
