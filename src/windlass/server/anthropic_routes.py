"""Anthropic's `/v1/messages`."""

import asyncio
from collections.abc import Mapping
from functools import partial
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from windlass.errors import RequestError
from windlass.protocol.anthropic_request import NAMES, read_messages_body
from windlass.protocol.anthropic_writer import MessageWriter
from windlass.protocol.dialect import Asked, Dialect, renamed
from windlass.protocol.served import ServedModel, num_tokens
from windlass.server.bodies import read_object
from windlass.server.errors import refusal
from windlass.server.openai_routes import answer
from windlass.server.state import ServerState


def _read(body: Mapping[str, Any], model: ServedModel, key: str) -> Asked:
    api = read_messages_body(body, model)
    return Asked(api, MessageWriter(api, key=key, count=partial(num_tokens, model)))


_DIALECT = Dialect(_read, NAMES)


async def messages(state: ServerState, request: Request) -> Response:
    return await answer(state, _DIALECT, request)


async def count_tokens(state: ServerState, request: Request) -> Response:
    loaded = state.require()
    body = await read_object(request, state.limits.body_bytes)
    try:
        api = await asyncio.to_thread(read_messages_body, body, loaded.model, counts=True)
    except RequestError as error:
        return refusal(renamed(error, NAMES), request.url.path)
    return JSONResponse({"input_tokens": len(api.prompts[0].token_ids)})
