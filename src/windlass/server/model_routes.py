"""What the server says of itself and its model, and the tokenizer on its own."""

import asyncio
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from windlass.errors import RequestError
from windlass.protocol.fields import shorten
from windlass.protocol.tokenizing import detokenized, tokenized
from windlass.server.bodies import read_object
from windlass.server.errors import HttpError, refusal
from windlass.server.metrics import CONTENT_TYPE
from windlass.server.state import ServerState
from windlass.version import VERSION


async def health(state: ServerState, request: Request) -> Response:
    """200 with where the model runs; 503 with what is being done until it does."""
    try:
        loaded = state.require()
    except HttpError as error:
        status = "failed" if state.failure else "draining" if state.is_draining else "loading"
        body = {"status": status, "message": str(error)}
        return JSONResponse(body, 503, headers=error.headers)
    return JSONResponse({"status": "ok", **loaded.facts})


async def models(state: ServerState, request: Request) -> Response:
    return JSONResponse({"object": "list", "data": [_card(state, name) for name in state.names]})


async def model(state: ServerState, request: Request) -> Response:
    name = request.path_params["name"]
    if name not in state.names:
        raise HttpError(
            404, f"The model {shorten(name)} does not exist, allowed {' or '.join(state.names)}",
            code="model_not_found",
        )  # fmt: skip
    return JSONResponse(_card(state, name))


def _card(state: ServerState, name: str) -> dict[str, Any]:
    longest = state.loaded.model.max_model_len if state.loaded is not None else None
    return {
        "id": name, "object": "model", "created": state.created, "owned_by": "windlass",
        "root": state.names[0], "parent": None, "max_model_len": longest,
    }  # fmt: skip


async def version(state: ServerState, request: Request) -> Response:
    return JSONResponse({"version": VERSION})


async def metrics(state: ServerState, request: Request) -> Response:
    text = await asyncio.to_thread(state.metrics.render)
    return Response(text, headers={"content-type": CONTENT_TYPE})


async def tokenize(state: ServerState, request: Request) -> Response:
    loaded = state.require()
    body = await read_object(request, state.limits.body_bytes)
    try:
        return JSONResponse(await asyncio.to_thread(tokenized, body, loaded.model))
    except RequestError as error:
        return refusal(error, request.url.path)


async def detokenize(state: ServerState, request: Request) -> Response:
    loaded = state.require()
    body = await read_object(request, state.limits.body_bytes)
    try:
        return JSONResponse(
            await asyncio.to_thread(detokenized, body, loaded.model, loaded.tokenizer)
        )
    except RequestError as error:
        return refusal(error, request.url.path)


async def tokenizer_info(state: ServerState, request: Request) -> Response:
    """What lm-eval asks for, so that it needs no tokenizer of its own."""
    return JSONResponse(state.require().tokenizer.facts())
