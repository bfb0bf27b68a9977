"""Chat messages of a request body, checked and brought into the shape that chat
templates expect. Knows no tokens."""

from collections.abc import Mapping
from difflib import get_close_matches
from typing import Any

from windlass.engine.template_wants import TEXT_PARTS, arguments_of
from windlass.errors import RequestError
from windlass.protocol.fields import optional, refuse_unknown, required, shorten

_ROLES = ("system", "developer", "user", "assistant", "tool", "function")
# Names that are checked; any other reaches the template, unless it is one of these misspelt.
_FIELDS = ("role", "content", "name", "tool_calls", "tool_call_id", "function_call",
           "reasoning", "reasoning_content", "reasoning_details", "thinking", "refusal",
           "annotations", "audio", "id", "cache_control")  # fmt: skip
_TEXTS = ("name", "tool_call_id", "reasoning", "reasoning_content", "thinking")
_LIKE = 0.75  # a name as near as this to one of ours is that one, misspelt


def read_messages(body: Mapping[str, Any]) -> list[dict[str, Any]]:
    """`body["messages"]` for a template: content is a string, an array of text parts, or none;
    arguments of tool calls are objects, or text that holds one. Raises RequestError naming the
    message."""
    messages = required(body, "messages", list)
    if not messages:
        raise RequestError("messages: got [], allowed at least one message", param="messages")
    return [_message(message, f"messages[{i}]") for i, message in enumerate(messages)]


def _message(message: object, place: str) -> dict[str, Any]:
    if not isinstance(message, dict):
        raise RequestError(f"{place}: got {shorten(message)}, allowed an object", param=place)
    where = place + "."
    role = required(message, "role", str, where=where)
    if role not in _ROLES:
        raise RequestError(
            f"{where}role: got {role!r}, allowed {', '.join(_ROLES)}", param=where + "role"
        )
    others = (name for name in message if name not in _FIELDS)
    strange = [name for name in others if not get_close_matches(name, _FIELDS, 1, _LIKE)]
    refuse_unknown(message, (*_FIELDS, *strange), where=where)
    for name in _TEXTS:
        optional(message, name, str, where=where)
    result = {name: value for name, value in message.items() if value is not None}
    if role == "function":  # the role that tools had first
        result["role"] = "tool"
    calls = optional(message, "tool_calls", list, where=where) or []
    result.pop("tool_calls", None)
    call = result.pop("function_call", None)  # the name that tool calls had first
    if call is not None and not calls:
        calls = [{"function": call}]
    if calls:
        result["tool_calls"] = [
            _tool_call(call, f"{where}tool_calls[{i}]") for i, call in enumerate(calls)
        ]
    content = message.get("content")
    if content is None and role != "assistant":
        raise RequestError(
            f"{where}content: missing, allowed a string or an array of text parts",
            param=where + "content",
        )
    result["content"] = content if content is None else read_content(content, where + "content")
    return result


def read_content(content: object, place: str) -> str | list[dict[str, str]]:
    """A string, or an array of text parts; `place` names it in errors. Raises RequestError."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise RequestError(
            f"{place}: got {shorten(content)}, allowed a string or an array of text parts",
            param=place,
        )
    return [_text_part(part, f"{place}[{i}]") for i, part in enumerate(content)]


def _text_part(part: object, place: str) -> dict[str, str]:
    if isinstance(part, str):
        return {"type": "text", "text": part}
    if not isinstance(part, dict):
        raise RequestError(f"{place}: got {shorten(part)}, allowed an object", param=place)
    kind = part.get("type")
    if not isinstance(kind, str) or kind not in TEXT_PARTS:
        raise RequestError(
            f"{place}.type: got {kind!r}, allowed 'text': images, audio and files are not"
            " supported",
            param=place + ".type",
            code="unsupported_parameter",
        )
    return {"type": "text", "text": required(part, TEXT_PARTS[kind], str, where=place + ".")}


def _tool_call(call: object, place: str) -> dict[str, Any]:
    if not isinstance(call, dict):
        raise RequestError(f"{place}: got {shorten(call)}, allowed an object", param=place)
    function = required(call, "function", dict, where=place + ".")
    name = required(function, "name", str, where=place + ".function.")
    given = function.get("arguments") or {}
    if arguments_of(given) is None:
        raise RequestError(
            f"{place}.function.arguments: got {shorten(given)}, allowed a JSON object, as a string",
            param=place + ".function.arguments",
        )
    # as it was written: a template may want the text
    shaped = {"type": "function", "function": {"name": name, "arguments": given}}
    if (ident := optional(call, "id", str, where=place + ".")) is not None:
        shaped["id"] = ident
    return shaped
