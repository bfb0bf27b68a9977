"""Rows of a batch: a body of any of its endpoints in, the whole answer out."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

from windlass.engine.outputs import RequestOutput
from windlass.errors import RequestError
from windlass.protocol.dialect import renamed
from windlass.protocol.fields import only
from windlass.protocol.kept_responses import KeptResponses
from windlass.protocol.openai import ApiRequest, Endpoint, parse_body
from windlass.protocol.response_request import NAMES, read_response
from windlass.protocol.response_writer import ResponseWriter
from windlass.protocol.responses import response_body
from windlass.protocol.served import ServedModel, num_tokens


class RowRequest(NamedTuple):
    """A body that was read. `answer`: its body, of the outputs of all prompts."""

    api: ApiRequest
    answer: Callable[[Sequence[RequestOutput]], dict[str, Any]]


def read_row(
    endpoint: Endpoint, body: Mapping[str, Any], model: ServedModel, *, key: str, created: int
) -> RowRequest:
    """`key`: ends the answer's id. `created`: seconds since 1970, all moments of the answer, which
    is then the same in every run. Raises RequestError."""
    if endpoint is not Endpoint.RESPONSES:
        api = parse_body(endpoint, body, model)
        return RowRequest(
            api, lambda outputs: response_body(api, outputs, key=key, created=created)
        )
    only(body, "stream", (False,), "allowed only false in a batch")
    try:
        asked = read_response(body, model, key, KeptResponses())
    except RequestError as error:
        raise renamed(error, NAMES) from error
    writer = ResponseWriter(asked, key=key, count=partial(num_tokens, model), keep=_forget)

    def answer(outputs: Sequence[RequestOutput]) -> dict[str, Any]:
        found = writer.body(outputs)
        ended = None if found["completed_at"] is None else created
        return {**found, "created_at": created, "completed_at": ended, "store": False}

    return RowRequest(asked.api, answer)


def _forget(response: Mapping[str, Any], items: Sequence[Mapping[str, Any]]) -> None:
    """Nobody can ask for a row's response."""
