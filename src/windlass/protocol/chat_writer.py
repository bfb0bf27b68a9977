"""Answers of `/v1/chat/completions` and `/v1/completions`, as text of events or whole."""

import json
import time
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from windlass.engine.outputs import RequestOutput
from windlass.engine.request import Delta
from windlass.protocol.chunks import ChunkWriter
from windlass.protocol.dialect import PING, Asked, Dialect, Failure
from windlass.protocol.openai import ApiRequest, Endpoint, parse_body
from windlass.protocol.responses import error_body, num_cached, response_body
from windlass.protocol.served import ServedModel

_DONE = "data: [DONE]\n\n"


class ChatWriter:
    """Of one answer."""

    ping = PING

    def __init__(self, api: ApiRequest, key: str) -> None:
        self._api = api
        self._key = key
        self._created = int(time.time())
        self._chunks = ChunkWriter(api, key=key, created=self._created)

    def begin(self) -> str:
        return "".join(f"data: {chunk}\n\n" for chunk in self._chunks.begin())

    def piece(self, prompt: int, delta: Delta) -> str:
        return f"data: {self._chunks.chunk(prompt, delta)}\n\n"

    def end(self, outputs: Sequence[RequestOutput]) -> str:
        wants = self._api.delivery.include_usage
        usage = f"data: {self._chunks.usage(num_cached(outputs))}\n\n" if wants else ""
        return usage + _DONE

    def failed(self, failure: Failure) -> str:
        message, kind, code = failure
        return f"data: {json.dumps(error_body(message, kind=kind, code=code))}\n\n"

    def body(self, outputs: Sequence[RequestOutput]) -> dict[str, Any]:
        return response_body(
            self._api, outputs, key=self._key, created=self._created, tells_cached=True
        )


def chat_dialect(endpoint: Endpoint) -> Dialect:
    """Of both endpoints, whose fields the others are translated to."""
    return Dialect(partial(_read, endpoint))


def _read(endpoint: Endpoint, body: Mapping[str, Any], model: ServedModel, key: str) -> Asked:
    api = parse_body(endpoint, body, model, may_stream=True)
    return Asked(api, ChatWriter(api, key))
