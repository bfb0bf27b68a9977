"""OpenAI's `/v1/responses`, and those that are kept."""

import asyncio
from collections.abc import Mapping
from functools import partial
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from windlass.errors import RequestError
from windlass.protocol.dialect import Asked, Dialect, renamed
from windlass.protocol.fields import shorten
from windlass.protocol.kept_responses import Kept, KeptResponses
from windlass.protocol.response_request import NAMES, kept_response, read_response
from windlass.protocol.response_writer import ResponseWriter
from windlass.protocol.served import ServedModel, num_tokens
from windlass.server.bodies import read_object
from windlass.server.errors import HttpError, refusal
from windlass.server.openai_routes import answer
from windlass.server.state import ServerState

_MOST_LISTED = 100  # items of one answer


async def create(state: ServerState, request: Request) -> Response:
    return await answer(state, Dialect(partial(_read, state.responses), NAMES), request)


def _read(kept: KeptResponses, body: Mapping[str, Any], model: ServedModel, key: str) -> Asked:
    asked = read_response(body, model, key, kept)
    count = partial(num_tokens, model)
    return Asked(asked.api, ResponseWriter(asked, key=key, count=count, keep=kept.keep))


async def input_tokens(state: ServerState, request: Request) -> Response:
    """How many tokens a body's input is."""
    loaded = state.require()
    body = await read_object(request, state.limits.body_bytes)
    try:
        asked = await asyncio.to_thread(read_response, body, loaded.model, "", state.responses)
    except RequestError as error:
        return refusal(renamed(error, NAMES), request.url.path)
    count = len(asked.api.prompts[0].token_ids)
    return JSONResponse({"object": "response.input_tokens", "input_tokens": count})


async def kept(state: ServerState, request: Request) -> Response:
    """One that was answered, whole; with DELETE it is forgotten."""
    found = await _found(state, request)
    if request.method == "DELETE":
        ident = found.response["id"]
        state.responses.forget(ident)
        return JSONResponse({"id": ident, "object": "response", "deleted": True})
    if request.query_params.get("stream", "false").lower() != "false":
        raise HttpError(400, "stream: allowed only false: one that has ended is told whole")
    return JSONResponse(found.response)


async def input_items(state: ServerState, request: Request) -> Response:
    """What was asked, with the conversation before it: the last first, unless `order` is asc."""
    found, query = await _found(state, request), request.query_params
    limit, order = query.get("limit", "20"), query.get("order", "desc")
    if not limit.isdecimal() or not 1 <= int(limit) <= _MOST_LISTED:
        raise HttpError(400, f"limit: got {shorten(limit)}, allowed 1 to {_MOST_LISTED}")
    if order not in ("asc", "desc"):
        raise HttpError(400, f"order: got {shorten(order)}, allowed asc, desc")
    items = found.items if order == "asc" else found.items[::-1]
    if (after := query.get("after")) is not None:
        place = next((i for i, item in enumerate(items) if item["id"] == after), None)
        if place is None:
            raise HttpError(400, f"after: got {shorten(after)}, allowed the id of an item")
        items = items[place + 1 :]
    shown = [_as_listed(item) for item in items[: int(limit)]]
    return JSONResponse(
        {
            "object": "list",
            "data": shown,
            "first_id": shown[0]["id"] if shown else "",
            "last_id": shown[-1]["id"] if shown else "",
            "has_more": len(shown) < len(items),
        }
    )


def _as_listed(item: dict[str, Any]) -> dict[str, Any]:
    """Texts are parts in lists."""
    if item["type"] != "message" or not isinstance(item["content"], str):
        return item
    kind = "output_text" if item["role"] == "assistant" else "input_text"
    part: dict[str, Any] = {"type": kind, "text": item["content"]}
    if kind == "output_text":
        part["annotations"] = []
    return {**item, "content": [part]}


async def cancel(state: ServerState, request: Request) -> Response:
    ident = (await _found(state, request)).response["id"]
    raise HttpError(400, f"response {ident}: has ended; only one in the background is cancelled")


async def _found(state: ServerState, request: Request) -> Kept:
    try:
        ident = request.path_params["id"]
        return await asyncio.to_thread(kept_response, state.responses, ident, "response_id")
    except RequestError as error:
        raise HttpError(404, str(error), code=error.code) from error
