"""Chat messages and tools of a request body, checked and brought into the shape that chat
templates expect. Knows no tokens."""

import json
from collections.abc import Mapping
from typing import Any

from windlass.errors import RequestError
from windlass.protocol.fields import optional, refuse_unknown, required, shorten

_ROLES = ("system", "developer", "user", "assistant", "tool")
_FIELDS = ("role", "content", "name", "tool_calls", "tool_call_id", "reasoning_content")


def read_messages(body: Mapping[str, Any]) -> list[dict[str, Any]]:
    """`body["messages"]` for a template: content is always a string, arguments of tool calls are
    objects. Raises RequestError naming the message."""
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
    refuse_unknown(message, _FIELDS, where=where)
    result: dict[str, Any] = {"role": role}
    for name in ("name", "tool_call_id", "reasoning_content"):
        if (value := optional(message, name, str, where=where)) is not None:
            result[name] = value
    calls = optional(message, "tool_calls", list, where=where)
    if calls:
        result["tool_calls"] = [
            _tool_call(call, f"{where}tool_calls[{i}]") for i, call in enumerate(calls)
        ]
    content = message.get("content")
    if content is None and not calls:
        raise RequestError(
            f"{where}content: missing, allowed a string or an array of text parts",
            param=where + "content",
        )
    result["content"] = "" if content is None else _content(content, where + "content")
    return result


def _content(content: object, place: str) -> str:
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise RequestError(
            f"{place}: got {shorten(content)}, allowed a string or an array of text parts",
            param=place,
        )
    # parts are joined as vLLM joins them for templates that take a string
    return "\n".join(_text_part(part, f"{place}[{i}]") for i, part in enumerate(content))


def _text_part(part: object, place: str) -> str:
    if not isinstance(part, dict):
        raise RequestError(f"{place}: got {shorten(part)}, allowed an object", param=place)
    if part.get("type") != "text":
        raise RequestError(
            f"{place}.type: got {part.get('type')!r}, allowed 'text': images, audio and files are "
            "not supported",
            param=place + ".type",
            code="unsupported_parameter",
        )
    refuse_unknown(part, ("type", "text"), where=place + ".")
    return required(part, "text", str, where=place + ".")


def _tool_call(call: object, place: str) -> dict[str, Any]:
    if not isinstance(call, dict):
        raise RequestError(f"{place}: got {shorten(call)}, allowed an object", param=place)
    function = required(call, "function", dict, where=place + ".")
    name = required(function, "name", str, where=place + ".function.")
    arguments = function.get("arguments", "{}")
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments or "{}")
        except ValueError:
            arguments = None
    if not isinstance(arguments, dict):
        raise RequestError(
            f"{place}.function.arguments: got {shorten(function.get('arguments'))}, "
            "allowed a JSON object, as a string",
            param=place + ".function.arguments",
        )
    shaped = {"type": "function", "function": {"name": name, "arguments": arguments}}
    if (ident := optional(call, "id", str, where=place + ".")) is not None:
        shaped["id"] = ident
    return shaped


def read_tools(body: Mapping[str, Any]) -> list[dict[str, Any]] | None:
    """The tools that the template shall show, None for none."""
    tools = optional(body, "tools", list)
    for i, tool in enumerate(tools or ()):
        place = f"tools[{i}]"
        if not isinstance(tool, dict) or tool.get("type") != "function":
            raise RequestError(
                f"{place}: got {shorten(tool)}, allowed an object of type 'function'", param=place
            )
        function = required(tool, "function", dict, where=place + ".")
        required(function, "name", str, where=place + ".function.")
    choice = body.get("tool_choice")
    if choice not in (None, "none", "auto") or (choice == "auto" and not tools):
        raise RequestError(
            f"tool_choice: got {shorten(choice)}, allowed 'none', or 'auto' with tools: forcing a "
            "call needs constrained decoding, which is not supported",
            param="tool_choice",
            code="unsupported_parameter",
        )
    return None if choice == "none" or not tools else tools
