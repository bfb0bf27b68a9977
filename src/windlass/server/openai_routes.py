"""A body in, an answer out, whole or in pieces: of every endpoint that asks the model."""

import asyncio
import uuid
from collections.abc import AsyncIterator
from contextlib import ExitStack
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse

from windlass.engine.outputs import RequestOutput
from windlass.engine.request import Request as EngineRequest
from windlass.errors import RequestError, UsageError
from windlass.protocol.dialect import Asked, Dialect, Failure, Writer, renamed
from windlass.server.answering import Answer
from windlass.server.bodies import read_object
from windlass.server.errors import HttpError, failure, refusal
from windlass.server.state import Loaded, ServerState


async def answer(state: ServerState, dialect: Dialect, request: Request) -> Response:
    """Of a body of this dialect."""
    loaded, path = state.require(), request.url.path
    body = await read_object(request, state.limits.body_bytes)
    with ExitStack() as stack:
        stack.enter_context(state.answering())
        key = uuid.uuid4().hex
        try:
            # templates, long texts, grammars: off the loop
            api, writer = await asyncio.to_thread(_read, dialect, body, loaded, key)
            if api.delivery.stream and request.scope["http_version"] == "1.0":
                raise HttpError(400, "stream: allowed from HTTP/1.1 on")
            most_s = state.limits.answer_s
            found = Answer(state.require().service, api, key, most_s=most_s)
        except RequestError as error:
            return refusal(renamed(error, dialect.names), path)
        stack.callback(found.close)
        observed = state.metrics.begin(api)
        stack.callback(observed.end, found.outputs)
        if api.delivery.stream:
            kept = stack.pop_all()  # closed when the stream ends, however it does
            return StreamingResponse(
                _events(found, writer, state.limits.ping_s, kept),
                media_type="text/event-stream",
                headers={"cache-control": "no-cache", "x-accel-buffering": "no"},
            )
        outputs = await _unless_left(request, found)
        for output in outputs:
            if output.error is not None:
                return failure(output, path)
        return JSONResponse(await asyncio.to_thread(writer.body, outputs))


def _read(dialect: Dialect, body: dict[str, Any], loaded: Loaded, key: str) -> Asked:
    """The body as a request that the engine takes; a grammar is compiled here. Raises
    RequestError."""
    asked = dialect.read(body, loaded.model, key)
    for prompt in asked.api.prompts:
        if prompt.params.structure is not None:
            loaded.service.validate(EngineRequest("", prompt.token_ids, prompt.params, ""))
    return asked


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
    except TimeoutError as error:
        raise HttpError(504, str(error), code="timeout") from error
    except Exception as error:
        raise HttpError(500, f"the engine has ended: {error}") from error
    finally:
        for task in (whole, left):
            task.cancel()


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _events(
    found: Answer, writer: Writer, ping_s: float | None, kept: ExitStack
) -> AsyncIterator[str]:
    """Server-sent events; something when nothing has come for a while."""
    with kept:
        try:
            if begin := writer.begin():
                yield begin
            async for piece in found.deltas(ping_s):
                if text := writer.ping if piece is None else writer.piece(*piece):
                    yield text
        except Exception as error:  # noqa: BLE001  the status is sent: an event is all that is left
            code = "timeout" if isinstance(error, TimeoutError) else None
            yield writer.failed(Failure(str(error), code=code))
            return
        outputs = [found.outputs[i] for i in range(len(found.outputs))]
        for output in outputs:
            if output.error is not None:
                yield writer.failed(Failure.of(output))
                return
        yield await asyncio.to_thread(writer.end, outputs)
