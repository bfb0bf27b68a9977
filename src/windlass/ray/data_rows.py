"""Rows of a data set as requests of a batch, and their results as columns. Knows no ray."""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from windlass.errors import RequestError
from windlass.protocol.fields import shorten
from windlass.protocol.openai import Endpoint

REQUEST = "__windlass_request"  # the column that a request travels in, as a line of a job file
ERROR = "__inference_error__"  # as in ray.data.llm: why a row has no answer, empty where it has one
CUSTOM_ID = "custom_id"
_ENDPOINTS = {
    "messages": Endpoint.CHAT, "prompt": Endpoint.COMPLETIONS, "input": Endpoint.RESPONSES,
}  # fmt: skip
# fields of a body that may be columns of their own; `body` and `sampling_params` take all others
_FIELDS = (*_ENDPOINTS, "tools", "tool_choice", "response_format", "chat_template_kwargs")
_NOTHING: dict[str, Any] = {
    "generated_text": "", "finish_reason": "", "num_input_tokens": 0, "num_generated_tokens": 0,
    "response": "",
}  # fmt: skip


def with_request(row: Mapping[str, Any], id_column: str | None) -> dict[str, Any]:
    """The row with its request beside it, or with the reason why it has none. As text: columns of
    objects would be given each other's fields."""
    try:
        line, error = _line(row, id_column), ""
    except RequestError as problem:
        line, error = "", _told(problem.code or "invalid_request", str(problem))
    return {**row, REQUEST: line, ERROR: error}


def answered(line: bytes) -> dict[str, Any]:
    """The columns of a result line: of `response`, the answer's body as text, what most ask for.
    `generated_text` and `finish_reason` are the first choice's."""
    result = json.loads(line)
    if result["error"] is not None:
        return failed(_told(result["error"]["code"], result["error"]["message"]))
    body = result["response"]["body"]
    if result["response"]["status_code"] != 200:
        error = body["error"]
        return failed(_told(error["code"] or error["type"], error["message"]))
    usage, (text, reason) = body["usage"], _first(body)
    return {
        "generated_text": text,
        "finish_reason": reason,
        "num_input_tokens": usage.get("prompt_tokens", usage.get("input_tokens")),
        "num_generated_tokens": usage.get("completion_tokens", usage.get("output_tokens")),
        "response": json.dumps(body, ensure_ascii=False, separators=(",", ":")),
        ERROR: "",
    }


def failed(error: str) -> dict[str, Any]:
    """The columns of a row without an answer."""
    return {**_NOTHING, ERROR: error}


def _line(row: Mapping[str, Any], id_column: str | None) -> str:
    """Raises RequestError where nothing is asked, twice, or what JSON does not have."""
    body = _body(row)
    found = [endpoint for field, endpoint in _ENDPOINTS.items() if body.get(field) is not None]
    if len(found) != 1:
        names = ", ".join(_ENDPOINTS)
        columns = shorten(sorted(row))
        raise RequestError(f"row: got the columns {columns}, allowed one of {names}, or body")
    try:
        # parts of a row that JSON has no word for are numpy's
        text = json.dumps(body, default=_plain, allow_nan=False, sort_keys=True)
        body = _given(json.loads(text))
    except (TypeError, ValueError) as error:
        raise RequestError(f"row: {error}") from error
    name = row.get(id_column or CUSTOM_ID)
    if name is None:
        if id_column is not None:
            raise RequestError(f"{id_column}: missing, the column that names a row")
        name = hashlib.blake2b(text.encode(), digest_size=12).hexdigest()
    request = {"custom_id": str(name), "method": "POST", "url": found[0], "body": body}
    return json.dumps(request)


def _body(row: Mapping[str, Any]) -> dict[str, Any]:
    """All that the row asks for; a column of its own counts before what `body` says."""
    body: dict[str, Any] = {}
    for name in ("body", "sampling_params"):
        part = row.get(name)
        if part is None:
            continue
        if not isinstance(part, Mapping):
            raise RequestError(f"{name}: got {shorten(part)}, allowed an object")
        body |= part
    return body | {name: row[name] for name in _FIELDS if row.get(name) is not None}


def _given(value: Any) -> Any:
    """Without fields that are null: a table gives each object the fields of all others."""
    if isinstance(value, dict):
        return {name: _given(own) for name, own in value.items() if own is not None}
    return [_given(own) for own in value] if isinstance(value, list) else value


def _plain(value: Any) -> Any:
    """numpy's numbers and arrays as Python's."""
    if hasattr(value, "tolist"):
        return value.tolist()
    raise TypeError(f"got {shorten(value)}, allowed what JSON has")


def _first(body: Mapping[str, Any]) -> tuple[str, str]:
    """Text and end of an answer's first choice."""
    if "output" in body:  # /v1/responses
        parts = [
            part.get("text") or ""
            for item in body["output"] if item["type"] == "message"
            for part in item["content"]
        ]  # fmt: skip
        return "".join(parts), body["status"]
    choice = body["choices"][0]
    message = choice.get("message")
    text = choice["text"] if message is None else message.get("content")
    return text or "", choice["finish_reason"] or ""


def _told(code: str, message: str) -> str:
    return f"{code}: {message}"
