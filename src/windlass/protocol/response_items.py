"""Items of `/v1/responses`: what a conversation is made of there, to the messages of a chat."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from windlass.engine.template_wants import arguments_of
from windlass.errors import RequestError
from windlass.protocol.fields import optional, refuse_unknown, required, shorten
from windlass.protocol.messages import read_content

_ROLES = ("user", "assistant", "system", "developer")
_COMMON = ("type", "id", "status")
_FIELDS = {
    "message": ("role", "content", "phase"),
    "reasoning": ("summary", "content", "encrypted_content"),
    "function_call": ("call_id", "name", "arguments", "parsed_arguments"),  # as openai adds it
    "function_call_output": ("call_id", "output"),
}
Messages = list[dict[str, Any]]


def read_items(
    given: object, find: Callable[[str], Mapping[str, Any] | None]
) -> list[dict[str, Any]]:
    """`input` as a list of items, each with its type. `find`: an item of a kept response, by its
    id. Raises RequestError naming the item."""
    if isinstance(given, str):
        given = [{"role": "user", "content": given}]
    if not isinstance(given, list) or not given:
        raise RequestError(
            f"input: {'missing' if given is None else 'got ' + shorten(given)}, allowed a string or"
            " an array of items, not empty",
            param="input",
            code="missing_required_parameter" if given is None else None,
        )
    return [_item(item, f"input[{i}]", find) for i, item in enumerate(given)]


def _item(
    item: object, place: str, find: Callable[[str], Mapping[str, Any] | None]
) -> dict[str, Any]:
    if not isinstance(item, dict):
        raise RequestError(f"{place}: got {shorten(item)}, allowed an object", param=place)
    where = place + "."
    kind = optional(item, "type", str, where=where) or ("message" if "role" in item else "")
    if kind == "item_reference":
        refuse_unknown(item, ("type", "id"), where=where)
        found = find(required(item, "id", str, where=where))
        if found is None:
            raise RequestError(f"{where}id: no such item is kept", param=where + "id")
        return dict(found)
    if kind not in _FIELDS:
        raise RequestError(
            f"{where}type: got {kind!r}, allowed {', '.join((*_FIELDS, 'item_reference'))}",
            param=where + "type",
            code="unsupported_parameter",
        )  # fmt: skip
    refuse_unknown(item, (*_COMMON, *_FIELDS[kind]), where=where)
    for name in ("id", "status"):
        optional(item, name, str, where=where)
    return {name: value for name, value in item.items() if value is not None} | {"type": kind}


def messages_of(items: Sequence[Mapping[str, Any]], num_earlier: int) -> Messages:
    """The items as messages: reasoning, a text and the calls that follow it are one. The first
    `num_earlier` are not the body's own. Raises RequestError."""
    messages: Messages = []
    for i, item in enumerate(items, -num_earlier):
        place = f"input[{i}]" if i >= 0 else "previous_response_id"
        _ADD[item["type"]](item, messages, place + ".")
    return messages


def _add_message(item: Mapping[str, Any], messages: Messages, where: str) -> None:
    role = required(item, "role", str, where=where)
    if role not in _ROLES:
        raise RequestError(
            f"{where}role: got {role!r}, allowed {', '.join(_ROLES)}", param=where + "role"
        )
    content = read_content(item.get("content"), where + "content")
    last = messages[-1] if messages else {}
    if role == "assistant" and last.get("role") == role and last["content"] is None:
        if "tool_calls" not in last:  # reasoning alone
            last["content"] = content
            return
    messages.append({"role": role, "content": content})


def _add_reasoning(item: Mapping[str, Any], messages: Messages, where: str) -> None:
    if item.get("encrypted_content") is not None:
        raise RequestError(
            f"{where}encrypted_content: not readable here, allowed null",
            param=where + "encrypted_content",
            code="unsupported_parameter",
        )
    parts = optional(item, "content", list, where=where) or []
    parts = parts or optional(item, "summary", list, where=where) or []
    texts = []
    for i, part in enumerate(parts):
        place = f"{where}content[{i}]"
        if not isinstance(part, dict):
            raise RequestError(f"{place}: got {shorten(part)}, allowed an object", param=place)
        texts.append(required(part, "text", str, where=place + "."))
    if texts:
        text = "\n".join(texts)
        messages.append({"role": "assistant", "content": None, "reasoning_content": text})


def _add_call(item: Mapping[str, Any], messages: Messages, where: str) -> None:
    text = required(item, "arguments", str, where=where)
    if arguments_of(text or {}) is None:
        raise RequestError(
            f"{where}arguments: got {shorten(text)}, allowed a JSON object, as a string",
            param=where + "arguments",
        )
    call = {
        "id": required(item, "call_id", str, where=where),
        "type": "function",
        "function": {"name": required(item, "name", str, where=where), "arguments": text},
    }
    if not messages or messages[-1]["role"] != "assistant":
        messages.append({"role": "assistant", "content": None})
    messages[-1].setdefault("tool_calls", []).append(call)


def _add_output(item: Mapping[str, Any], messages: Messages, where: str) -> None:
    message = {"role": "tool", "tool_call_id": required(item, "call_id", str, where=where)}
    messages.append({**message, "content": read_content(item.get("output"), where + "output")})


_ADD = {
    "message": _add_message,
    "reasoning": _add_reasoning,
    "function_call": _add_call,
    "function_call_output": _add_output,
}
