"""Anthropic's `/v1/messages`: bodies to those of a chat, on whose path they are answered."""

import json
from collections.abc import Mapping
from typing import Any

from windlass.errors import RequestError
from windlass.protocol.fields import only, optional, refuse_unknown, required, shorten
from windlass.protocol.openai import SAMPLING, ApiRequest, Endpoint, parse_body
from windlass.protocol.served import ServedModel

# Names of chat's fields where they differ, for errors.
NAMES = {
    "max_completion_tokens": "max_tokens", "stop": "stop_sequences",
    "response_format": "output_config.format", "reasoning_effort": "output_config.effort",
}  # fmt: skip
# Handed to chat as they are: Anthropic's, and what chat has beside them.
_SAME = (
    *(name for name in SAMPLING if name not in ("n", "stop", "prompt_logprobs")),
    "model", "stream", "chat_template_kwargs", "metadata", "service_tier",
)  # fmt: skip
_OWN = ("messages", "system", "max_tokens", "stop_sequences", "tools", "tool_choice", "thinking",
        "output_config", "output_format", "cache_control")  # fmt: skip
_NOTHING: dict[str, tuple[tuple[object, ...], str]] = {
    "container": ((), "not supported: no tools run here"),
    "mcp_servers": (([],), "not supported: no tools run here"),
    "context_management": (
        ({}, {"edits": []}, {"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]}),
        "not supported: nothing is left out",
    ),
    "inference_geo": ((), "not supported"),
    "speed": (("standard",), "allowed only 'standard'"),
    "diagnostics": ((), "not supported"),
}
_FIELDS = frozenset((*_SAME, *_OWN, *_NOTHING))
_TOOL = ("name", "description", "input_schema", "type", "strict", "cache_control",
         "input_examples", "eager_input_streaming")  # fmt: skip
_BLOCKS = {
    "user": ("text", "tool_result"),
    "assistant": ("text", "thinking", "tool_use"),
    "system": ("text",),
}
_BLOCK = {
    "text": ("text", "citations"),
    "thinking": ("thinking", "signature"),
    "tool_use": ("id", "name", "input", "caller"),
    "tool_result": ("tool_use_id", "content", "is_error"),
}
_CHOICES = {"auto": None, "any": "required", "none": "none"}
Messages = list[dict[str, Any]]


def read_messages_body(
    body: Mapping[str, Any], model: ServedModel, *, counts: bool = False
) -> ApiRequest:
    """Of `/v1/messages`, or where it `counts` of `/v1/messages/count_tokens`. Raises RequestError,
    with chat's names of fields where a value is wrong there (`NAMES`)."""
    refuse_unknown(body, _FIELDS)
    for name, (nothing, why) in _NOTHING.items():
        only(body, name, nothing, why)
    chat = {name: body[name] for name in _SAME if body.get(name) is not None}
    if counts:
        chat["max_completion_tokens"] = 1
    else:
        chat["max_completion_tokens"] = required(body, "max_tokens", int)
    chat["messages"] = _system(body) + [
        one
        for i, message in enumerate(required(body, "messages", list))
        for one in _message(message, f"messages[{i}]")
    ]
    chat |= _prefilled(chat["messages"])
    chat["stop"] = optional(body, "stop_sequences", list)
    chat |= _tools(body) | _output(body)
    chat["chat_template_kwargs"] = _thinking(body)
    return parse_body(Endpoint.CHAT, chat, model, may_stream=True)


def _system(body: Mapping[str, Any]) -> Messages:
    given = body.get("system")
    if given is None or given in ("", []):
        return []
    return [{"role": "system", "content": _texts(given, "system")}]


def _message(message: object, place: str) -> Messages:
    """One message as those of a chat: results of tools are messages of their own there."""
    if not isinstance(message, dict):
        raise RequestError(f"{place}: got {shorten(message)}, allowed an object", param=place)
    where = place + "."
    refuse_unknown(message, ("role", "content"), where=where)
    role = required(message, "role", str, where=where)
    if role not in _BLOCKS:
        raise RequestError(
            f"{where}role: got {role!r}, allowed {', '.join(_BLOCKS)}", param=where + "role"
        )
    content = message.get("content")
    if isinstance(content, str):
        return [{"role": role, "content": content}]
    if not isinstance(content, list):
        raise RequestError(
            f"{where}content: {'missing' if content is None else 'got ' + shorten(content)},"
            " allowed a string or an array of blocks",
            param=where + "content",
        )
    blocks = [_block(one, f"{where}content[{i}]", _BLOCKS[role]) for i, one in enumerate(content)]
    return _assistant(blocks, where) if role == "assistant" else _user(role, blocks, where)


def _block(block: object, place: str, allowed: tuple[str, ...]) -> dict[str, Any]:
    if not isinstance(block, dict):
        raise RequestError(f"{place}: got {shorten(block)}, allowed an object", param=place)
    kind = block.get("type")
    if kind not in allowed:
        raise RequestError(
            f"{place}.type: got {shorten(kind)}, allowed {', '.join(allowed)}",
            param=place + ".type",
            code="unsupported_parameter",
        )
    refuse_unknown(block, ("type", "cache_control", *_BLOCK[kind]), where=place + ".")
    return block


def _texts(given: object, place: str) -> str | list[dict[str, str]]:
    """A string, or blocks of text as parts."""
    if isinstance(given, str):
        return given
    if not isinstance(given, list):
        raise RequestError(
            f"{place}: got {shorten(given)}, allowed a string or an array of blocks", param=place
        )
    blocks = [_block(one, f"{place}[{i}]", ("text",)) for i, one in enumerate(given)]
    return [_text(one, f"{place}[{i}].") for i, one in enumerate(blocks)]


def _text(block: Mapping[str, Any], where: str) -> dict[str, str]:
    return {"type": "text", "text": required(block, "text", str, where=where)}


def _user(role: str, blocks: list[dict[str, Any]], where: str) -> Messages:
    messages: Messages = []
    for i, block in enumerate(blocks):
        place = f"{where}content[{i}]."
        if block["type"] == "text":
            if not messages or messages[-1]["role"] == "tool":
                messages.append({"role": role, "content": []})
            messages[-1]["content"].append(_text(block, place))
            continue
        ident = required(block, "tool_use_id", str, where=place)
        result: dict[str, Any] = {"role": "tool", "tool_call_id": ident}
        content = _texts(block.get("content") or "", place + "content")
        if optional(block, "is_error", bool, where=place):
            result["is_error"] = True  # templates may look at it
        messages.append({**result, "content": content})
    return messages or [{"role": role, "content": ""}]


def _assistant(blocks: list[dict[str, Any]], where: str) -> Messages:
    message: dict[str, Any] = {"role": "assistant", "content": None}
    thoughts = []
    for i, block in enumerate(blocks):
        place = f"{where}content[{i}]."
        if block["type"] == "text":
            message["content"] = [*(message["content"] or ()), _text(block, place)]
        elif block["type"] == "thinking":
            thoughts.append(required(block, "thinking", str, where=place))
        else:
            given = required(block, "input", dict, where=place)
            function = {"name": required(block, "name", str, where=place)}
            call = {
                "id": required(block, "id", str, where=place),
                "type": "function",
                "function": {**function, "arguments": json.dumps(given, ensure_ascii=False)},
            }
            message.setdefault("tool_calls", []).append(call)
    if thoughts:
        message["reasoning_content"] = "\n".join(thoughts)
    return [message]


def _prefilled(messages: Messages) -> dict[str, bool]:
    """An answer goes on with the text of the model's own that the messages end with."""
    last = messages[-1] if messages else {}
    content = last.get("content")
    if last.get("role") != "assistant" or not content or "tool_calls" in last:
        return {}
    if not isinstance(content, str):
        last["content"] = "".join(part["text"] for part in content)
    return {"continue_final_message": True}


def _tools(body: Mapping[str, Any]) -> dict[str, Any]:
    tools: list[Any] = optional(body, "tools", list) or []
    shaped = [_tool(tool, f"tools[{i}]") for i, tool in enumerate(tools)]
    choice: Mapping[str, Any] = optional(body, "tool_choice", dict) or {"type": "auto"}
    where = "tool_choice."
    refuse_unknown(choice, ("type", "name", "disable_parallel_tool_use"), where=where)
    kind = required(choice, "type", str, where=where)
    wanted: Any = None
    if kind == "tool":
        named = {"name": required(choice, "name", str, where=where)}
        wanted = {"type": "function", "function": named}
    elif kind in _CHOICES:
        wanted = _CHOICES[kind]
    else:
        raise RequestError(
            f"tool_choice.type: got {kind!r}, allowed {', '.join(_CHOICES)}, tool",
            param="tool_choice.type",
        )
    is_one = optional(choice, "disable_parallel_tool_use", bool, where=where)
    return {"tools": shaped or None, "tool_choice": wanted, "parallel_tool_calls": not is_one}


def _tool(tool: object, place: str) -> dict[str, Any]:
    if not isinstance(tool, dict):
        raise RequestError(f"{place}: got {shorten(tool)}, allowed an object", param=place)
    if tool.get("type") not in (None, "custom"):
        raise RequestError(
            f"{place}.type: got {shorten(tool['type'])}, allowed 'custom': no tools run here",
            param=place + ".type",
            code="unsupported_parameter",
        )
    where = place + "."
    refuse_unknown(tool, _TOOL, where=where)
    function: dict[str, Any] = {"name": required(tool, "name", str, where=where)}
    if (about := optional(tool, "description", str, where=where)) is not None:
        function["description"] = about
    function["parameters"] = required(tool, "input_schema", dict, where=where)
    if (strict := optional(tool, "strict", bool, where=where)) is not None:
        function["strict"] = strict
    return {"type": "function", "function": function}


def _output(body: Mapping[str, Any]) -> dict[str, Any]:
    """`output_config`, and `output_format`, the older name of its format."""
    config: Mapping[str, Any] = optional(body, "output_config", dict) or {}
    refuse_unknown(config, ("effort", "format"), where="output_config.")
    form = optional(config, "format", dict, where="output_config.")
    form = form if form is not None else optional(body, "output_format", dict)
    found: dict[str, Any] = {
        "reasoning_effort": optional(config, "effort", str, where="output_config.")
    }
    if form is None:
        return found
    where = "output_config.format."
    refuse_unknown(form, ("type", "schema"), where=where)
    if form.get("type") != "json_schema":
        raise RequestError(
            f"{where}type: got {shorten(form.get('type'))}, allowed json_schema",
            param=where + "type",
        )
    schema = {"name": "output", "schema": required(form, "schema", dict, where=where)}
    found["response_format"] = {
        "type": "json_schema", "json_schema": {**schema, "strict": True}
    }  # fmt: skip
    return found


def _thinking(body: Mapping[str, Any]) -> dict[str, Any] | None:
    """Variables of the template: `thinking` under the names that templates have for it."""
    given = optional(body, "thinking", dict)
    variables = optional(body, "chat_template_kwargs", dict)
    if given is None:
        return variables
    where = "thinking."
    refuse_unknown(given, ("type", "budget_tokens", "display"), where=where)
    kind = required(given, "type", str, where=where)
    if kind not in ("enabled", "disabled", "adaptive"):
        raise RequestError(
            f"thinking.type: got {kind!r}, allowed enabled, disabled, adaptive",
            param="thinking.type",
        )
    if kind == "enabled":
        required(given, "budget_tokens", int, where=where)
    if kind == "adaptive":
        return variables
    wants = kind == "enabled"
    return {"enable_thinking": wants, "thinking": wants, **(variables or {})}
