"""`/v1/responses`: bodies to those of a chat, on whose path they are answered."""

import time
from collections.abc import Mapping
from typing import Any, NamedTuple

from windlass.errors import RequestError
from windlass.protocol.dialect import item_id
from windlass.protocol.fields import only, optional, refuse_unknown, required, shorten
from windlass.protocol.kept_responses import Kept, KeptResponses
from windlass.protocol.openai import SAMPLING, ApiRequest, Endpoint, parse_body
from windlass.protocol.response_items import Messages, messages_of, read_items
from windlass.protocol.served import ServedModel

# Names of chat's fields where they differ, for errors.
NAMES = {
    "messages": "input", "max_completion_tokens": "max_output_tokens",
    "response_format": "text.format", "reasoning_effort": "reasoning.effort",
}  # fmt: skip
# Handed to chat as they are.
_SAME = (
    *(name for name in SAMPLING if name not in ("n", "prompt_logprobs")),
    "model", "stream", "stream_options", "parallel_tool_calls", "chat_template_kwargs",
    "include_reasoning", "user", "safety_identifier", "prompt_cache_key", "prompt_cache_retention",
    "cache_salt", "request_id", "service_tier",
)  # fmt: skip
_OWN = (
    "input", "instructions", "max_output_tokens", "max_tool_calls", "metadata", "store", "include",
    "previous_response_id", "reasoning", "text", "tools", "tool_choice", "top_logprobs",
    "truncation", "prompt_cache_options",
)  # fmt: skip
_NOTHING: dict[str, tuple[tuple[object, ...], str]] = {
    "background": ((False,), "allowed only false: an answer ends with its connection"),
    "conversation": ((), "not supported, allowed previous_response_id"),
    "prompt": ((), "not supported: no prompts are kept"),
    "context_management": (([],), "not supported"),
    "moderation": ((), "not supported"),
}
_FIELDS = frozenset((*_SAME, *_OWN, *_NOTHING))
_LOGPROBS = "message.output_text.logprobs"
# What may be included: the others are of tools that are not here, and reasoning is told as text.
_INCLUDABLE = (
    _LOGPROBS, "reasoning.encrypted_content", "file_search_call.results", "web_search_call.results",
    "web_search_call.action.sources", "message.input_image.image_url",
    "computer_call_output.output.image_url", "code_interpreter_call.outputs",
)  # fmt: skip
_TOOL = ("name", "description", "parameters", "strict")
_NAMED_ONLY = "allowed 'function': no tools run here"


class ResponseRequest(NamedTuple):
    """A checked body. `head`: the fields of the response that repeat it. `items`: what was asked,
    with the conversation before it; empty where nothing is kept."""

    api: ApiRequest
    head: dict[str, Any]
    items: list[dict[str, Any]]


def read_response(
    body: Mapping[str, Any], model: ServedModel, key: str, kept: KeptResponses
) -> ResponseRequest:
    """Raises RequestError, with chat's names of fields where a value is wrong there (`NAMES`)."""
    refuse_unknown(body, _FIELDS)
    for name, (nothing, why) in _NOTHING.items():
        only(body, name, nothing, why)
    only(body, "truncation", ("disabled", "auto"), "allowed 'disabled' or 'auto'")
    _check_metadata(body)
    earlier = _earlier(body, kept)
    items = earlier + [
        {"id": item_id("msg", key + "/in", i)} | item
        for i, item in enumerate(read_items(body.get("input"), kept.find_item))
    ]
    messages = _instructed(optional(body, "instructions", str), messages_of(items, len(earlier)))
    chat = {name: body[name] for name in _SAME if body.get(name) is not None}
    chat["messages"] = messages
    chat["max_completion_tokens"] = _at_least(body, "max_output_tokens")
    _at_least(body, "max_tool_calls")
    chat |= _logprobs(body) | _tools(body) | _text(body) | _reasoning(body)
    api = parse_body(Endpoint.CHAT, chat, model, may_stream=True)
    stores = optional(body, "store", bool) is not False
    return ResponseRequest(api, _head(body, api, key), items if stores else [])


def _check_metadata(body: Mapping[str, Any]) -> None:
    for name, value in (optional(body, "metadata", dict) or {}).items():
        if not isinstance(value, str):
            raise RequestError(
                f"metadata.{name}: got {shorten(value)}, allowed a string", param="metadata"
            )


def _earlier(body: Mapping[str, Any], kept: KeptResponses) -> list[dict[str, Any]]:
    ident = optional(body, "previous_response_id", str)
    if ident is None:
        return []
    found = kept_response(kept, ident, "previous_response_id")
    return [*found.items, *found.response["output"]]


def kept_response(kept: KeptResponses, ident: str, param: str) -> Kept:
    """Raises RequestError where it is not there."""
    found = kept.find(ident)
    if found is None:
        raise RequestError(
            f"{param}: the response {shorten(ident)} is not kept: it was not stored, or others have"
            " taken its place",
            param=param,
            code="response_not_found",
        )
    return found


def _instructed(instructions: str | None, messages: Messages) -> Messages:
    if not instructions:
        return messages
    first = messages[0] if messages else {}
    if first.get("role") in ("system", "developer") and isinstance(first["content"], str):
        # templates that allow one such message, at the beginning, are many
        text = f"{instructions}\n\n{first['content']}"
        return [{"role": "system", "content": text}, *messages[1:]]
    return [{"role": "system", "content": instructions}, *messages]


def _at_least(body: Mapping[str, Any], name: str) -> int | None:
    value = optional(body, name, int)
    if value is not None and value < 1:
        raise RequestError(f"{name}: got {value}, allowed at least 1", param=name)
    return value


def _logprobs(body: Mapping[str, Any]) -> dict[str, Any]:
    wanted: list[Any] = optional(body, "include", list) or []
    for i, name in enumerate(wanted):
        if name not in _INCLUDABLE:
            raise RequestError(
                f"include[{i}]: got {shorten(name)}, allowed {', '.join(_INCLUDABLE)}",
                param="include",
            )
    top = optional(body, "top_logprobs", int)
    return {"logprobs": True, "top_logprobs": top} if _LOGPROBS in wanted or top else {}


def _tools(body: Mapping[str, Any]) -> dict[str, Any]:
    tools: list[Any] = optional(body, "tools", list) or []
    for i, tool in enumerate(tools):
        _check_tool(tool, f"tools[{i}]")
    choice = body.get("tool_choice")
    kind = choice.get("type") if isinstance(choice, dict) else None
    if isinstance(choice, dict) and kind == "function":
        refuse_unknown(choice, ("type", "name"), where="tool_choice.")
        named = {"name": required(choice, "name", str, where="tool_choice.")}
        choice = {"type": "function", "function": named}
    elif isinstance(choice, dict) and kind == "allowed_tools":
        tools, choice = _allowed(choice, tools), choice.get("mode")
        if choice not in ("auto", "required"):
            raise RequestError(
                f"tool_choice.mode: got {shorten(choice)}, allowed auto, required",
                param="tool_choice.mode",
            )
    elif isinstance(choice, dict):
        raise RequestError(
            f"tool_choice.type: got {shorten(kind)}, {_NAMED_ONLY}, or 'allowed_tools'",
            param="tool_choice.type",
            code="unsupported_parameter",
        )
    if choice == "auto":  # as where nothing is said, which needs no tools
        choice = None
    shaped = [
        {"type": "function", "function": {n: v for n, v in tool.items() if n in _TOOL}}
        for tool in tools
    ]
    return {"tools": shaped or None, "tool_choice": choice}


def _check_tool(tool: object, place: str) -> None:
    if not isinstance(tool, dict):
        raise RequestError(f"{place}: got {shorten(tool)}, allowed an object", param=place)
    if tool.get("type") != "function":
        raise RequestError(
            f"{place}.type: got {shorten(tool.get('type'))}, {_NAMED_ONLY}", param=place + ".type",
            code="unsupported_parameter",
        )  # fmt: skip
    where = place + "."
    refuse_unknown(tool, ("type", *_TOOL), where=where)
    required(tool, "name", str, where=where)
    optional(tool, "description", str, where=where)
    optional(tool, "parameters", dict, where=where)
    optional(tool, "strict", bool, where=where)


def _allowed(choice: Mapping[str, Any], tools: list[Any]) -> list[Any]:
    refuse_unknown(choice, ("type", "mode", "tools"), where="tool_choice.")
    wanted = required(choice, "tools", list, where="tool_choice.")
    known = {tool["name"]: tool for tool in tools}
    found = []
    for i, one in enumerate(wanted):
        name = one.get("name") if isinstance(one, dict) else None
        if not isinstance(name, str) or name not in known:
            raise RequestError(
                f"tool_choice.tools[{i}]: got {shorten(one)}, allowed {', '.join(known) or 'none'}",
                param="tool_choice.tools",
            )
        found.append(known[name])
    return found


def _text(body: Mapping[str, Any]) -> dict[str, Any]:
    text: Mapping[str, Any] = optional(body, "text", dict) or {}
    refuse_unknown(text, ("format", "verbosity"), where="text.")
    optional(text, "verbosity", str, where="text.")
    form = optional(text, "format", dict, where="text.")
    if form is None or form.get("type") != "json_schema":
        return {"response_format": form}
    schema = {name: value for name, value in form.items() if name != "type"}
    return {"response_format": {"type": "json_schema", "json_schema": schema}}


def _reasoning(body: Mapping[str, Any]) -> dict[str, Any]:
    found: Mapping[str, Any] = optional(body, "reasoning", dict) or {}
    refuse_unknown(found, ("effort", "summary", "generate_summary"), where="reasoning.")
    for name in ("summary", "generate_summary"):
        optional(found, name, str, where="reasoning.")
    return {"reasoning_effort": optional(found, "effort", str, where="reasoning.")}


def _head(body: Mapping[str, Any], api: ApiRequest, key: str) -> dict[str, Any]:
    """The response before anything is answered."""
    params = api.prompts[0].params
    given = {name: value for name, value in body.items() if value is not None}
    text, reasoning = given.get("text", {}), given.get("reasoning", {})
    tools = [
        {"type": "function", **{name: tool.get(name) for name in _TOOL}}
        for tool in given.get("tools", ())
    ]
    return {
        "id": f"resp_{key}",
        "object": "response",
        "created_at": int(time.time()),
        "status": "in_progress",
        "background": False,
        "completed_at": None,
        "error": None,
        "incomplete_details": None,
        "instructions": given.get("instructions"),
        "max_output_tokens": given.get("max_output_tokens"),
        "max_tool_calls": given.get("max_tool_calls"),
        "model": api.model,
        "output": [],
        "parallel_tool_calls": given.get("parallel_tool_calls", True),
        "previous_response_id": given.get("previous_response_id"),
        "prompt_cache_key": given.get("prompt_cache_key"),
        "reasoning": {"effort": reasoning.get("effort"), "summary": reasoning.get("summary")},
        "safety_identifier": given.get("safety_identifier"),
        "service_tier": "default",
        "store": given.get("store", True),
        "temperature": params.temperature,
        "text": {"format": {"type": "text"}, **{n: v for n, v in text.items() if v is not None}},
        "tool_choice": given.get("tool_choice", "auto"),
        "tools": tools,
        "top_logprobs": given.get("top_logprobs", 0),
        "top_p": params.top_p,
        "truncation": given.get("truncation", "disabled"),
        "usage": None,
        "user": given.get("user"),
        "metadata": given.get("metadata", {}),
    }
