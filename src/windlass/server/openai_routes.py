"""`/v1/chat/completions` and `/v1/completions`: a body in, an answer out, whole or in pieces."""

import asyncio
import json
import time
import uuid
from collections.abc import AsyncIterator
from contextlib import ExitStack
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse

from windlass.engine.outputs import GRAMMAR_FAILED, NOTHING_ALLOWED, RequestOutput
from windlass.engine.request import Request as EngineRequest
from windlass.errors import RequestError, UsageError
from windlass.protocol.chunks import ChunkWriter
from windlass.protocol.openai import ApiRequest, Endpoint, parse_body
from windlass.protocol.responses import error_body, response_body
from windlass.server.answering import Answer
from windlass.server.bodies import read_object
from windlass.server.errors import HttpError, refusal
from windlass.server.state import Loaded, ServerState

_PING = ": ping\n\n"
_DONE = "data: [DONE]\n\n"


async def answer(state: ServerState, endpoint: Endpoint, request: Request) -> Response:
    """Of a body of this endpoint."""
    loaded = state.require()
    body = await read_object(request, state.limits.body_bytes)
    with ExitStack() as stack:
        stack.enter_context(state.answering())
        try:
            # templates, long texts, grammars: off the loop
            api = await asyncio.to_thread(_read, endpoint, body, loaded)
            key = uuid.uuid4().hex
            found = Answer(state.require().service, api, key)
        except RequestError as error:
            return refusal(error)
        stack.callback(found.close)
        observed = state.metrics.begin(api)
        stack.callback(observed.end, found.outputs)
        if api.delivery.stream:
            kept = stack.pop_all()  # closed when the stream ends, however it does
            writer = ChunkWriter(api, key=key, created=int(time.time()))
            return StreamingResponse(
                _events(found, writer, api, state.limits.ping_s, kept),
                media_type="text/event-stream",
                headers={"cache-control": "no-cache", "x-accel-buffering": "no"},
            )
        outputs = await _unless_left(request, found)
        for output in outputs:
            if output.error is not None:
                return _failure(output)
        return JSONResponse(response_body(api, outputs, key=key, created=int(time.time())))


def _read(endpoint: Endpoint, body: dict[str, Any], loaded: Loaded) -> ApiRequest:
    """The body as a request that the engine takes; a grammar is compiled here. Raises
    RequestError."""
    api = parse_body(endpoint, body, loaded.model, may_stream=True)
    for prompt in api.prompts:
        if prompt.params.structure is not None:
            loaded.service.validate(EngineRequest("", prompt.token_ids, prompt.params, ""))
    return api


async def _unless_left(request: Request, found: Answer) -> list[RequestOutput]:
    """The outputs; raises HttpError when the client leaves, so that nothing is computed on."""
    whole = asyncio.ensure_future(found.whole())
    left = asyncio.ensure_future(_disconnected(request))
    try:
        await asyncio.wait((whole, left), return_when=asyncio.FIRST_COMPLETED)
        if not whole.done():
            raise HttpError(499, "the client has left")
        return await whole
    except HttpError:
        raise
    except UsageError as error:
        raise HttpError(503, str(error)) from error
    except Exception as error:
        raise HttpError(500, f"the engine has ended: {error}") from error
    finally:
        for task in (whole, left):
            task.cancel()


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _events(
    found: Answer, writer: ChunkWriter, api: ApiRequest, ping_s: float | None, kept: ExitStack
) -> AsyncIterator[str]:
    """Server-sent events; a comment when nothing has come for a while."""
    with kept:
        try:
            for chunk in writer.begin():
                yield f"data: {chunk}\n\n"
            async for piece in found.deltas(ping_s):
                yield _PING if piece is None else f"data: {writer.chunk(*piece)}\n\n"
        except Exception as error:  # noqa: BLE001  the status is sent: an event is all that is left
            yield _error_event(str(error))
            return
        for output in found.outputs.values():
            if output.error is not None:
                yield _error_event(output.error)
                return
        if api.delivery.include_usage:
            yield f"data: {writer.usage()}\n\n"
        yield _DONE


def _error_event(message: str) -> str:
    return f"data: {json.dumps(error_body(message, kind='server_error'))}\n\n"


def _failure(output: RequestOutput) -> JSONResponse:
    # what the request itself asked for
    is_own = output.error_code in (NOTHING_ALLOWED, GRAMMAR_FAILED)
    kind = "invalid_request_error" if is_own else "server_error"
    body = error_body(str(output.error), kind=kind, code=output.error_code)
    return JSONResponse(body, 400 if is_own else 500)
