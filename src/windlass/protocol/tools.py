"""Tools of a body and which of them the answer shall call."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from windlass.errors import RequestError
from windlass.protocol.fields import optional, required, shorten
from windlass.protocol.response_format import structured
from windlass.structured import MAX_BYTES, StructuredOutputs

_MOST_BYTES = 8 * MAX_BYTES  # of the schemas of all tools together
_MOST_CALLS = 16  # of one answer: a weak model would go on for ever
_NO_ARGUMENTS = {"type": "object", "properties": {}, "additionalProperties": False}
_WORDS = ("none", "auto", "required")


@dataclass(frozen=True, slots=True)
class ToolUse:
    """`shown`: what the template gets, empty for no tools. `is_forced`: the answer is calls, of
    `named` alone where that is set. `is_parallel`: it may be several."""

    shown: tuple[dict[str, Any], ...] = ()
    is_forced: bool = False
    named: str | None = None
    is_parallel: bool = True

    def schemas(self) -> dict[str, dict[str, Any]]:
        """Of the arguments of each tool, by its name."""
        functions = [tool["function"] for tool in self.shown]
        return {one["name"]: one.get("parameters") or _NO_ARGUMENTS for one in functions}

    def constraint(self, after: str) -> StructuredOutputs | None:
        """What makes the answer calls, from the end of `after` on; None where it is free."""
        if not self.is_forced:
            return None
        if self.named is not None:
            schema = self.schemas()[self.named]
            is_lenient = not self._is_strict(self.named)
            return structured("tools", json=schema, is_lenient=is_lenient, after=after)
        rules = [
            self._rules(place, name, schema)
            for place, (name, schema) in enumerate(self.schemas().items())
        ]
        calls = " | ".join(f"call_{place}" for place in range(len(rules)))
        more = f'"[" call ("," call){{0,{_MOST_CALLS - 1}}} "]"'
        start = more if self.is_parallel else "call"
        text = "\n".join([f"start: {start}", f"call: {calls}", *rules])
        return structured("tools", grammar=text, after=after, most_bytes=_MOST_BYTES)

    def _rules(self, place: int, name: str, schema: Mapping[str, Any]) -> str:
        """A call of one tool. Each schema is one of its own: references stay within it."""
        checked = structured("tools", json=schema)  # its size and depth
        options = {
            "coerce_one_of": True, "whitespace_flexible": False,
            "lenient": not self._is_strict(name),
        }  # fmt: skip
        own = json.dumps({**json.loads(checked.text), "x-guidance": options})
        head = json.dumps(f'{{"name":{json.dumps(name)},"arguments":')
        return f'call_{place}: {head} arguments_{place} "}}"\narguments_{place}: %json {own}'

    def _is_strict(self, name: str) -> bool:
        functions = [tool["function"] for tool in self.shown]
        return any(one.get("strict") is True for one in functions if one["name"] == name)


def read_tools(body: Mapping[str, Any]) -> ToolUse:
    """`tools`, `tool_choice` and `parallel_tool_calls`. Raises RequestError naming the field."""
    tools = optional(body, "tools", list)
    for i, tool in enumerate(tools or ()):
        _check(tool, f"tools[{i}]")
    is_parallel = optional(body, "parallel_tool_calls", bool) is not False
    choice = body.get("tool_choice")
    if isinstance(choice, dict):
        named = _named(choice)
    elif choice is None or choice in _WORDS:
        named = None
    else:
        raise RequestError(
            f"tool_choice: got {shorten(choice)}, allowed {', '.join(_WORDS)} or a function",
            param="tool_choice",
        )
    is_forced = named is not None or choice == "required"
    if (is_forced and not tools) or (choice == "auto" and tools is None):
        raise RequestError(
            f"tool_choice: got {shorten(choice)}, allowed with tools", param="tool_choice"
        )
    if choice == "none" or not tools:
        return ToolUse()
    names = [tool["function"]["name"] for tool in tools]
    if named is not None and named not in names:
        raise RequestError(
            f"tool_choice: got the function {shorten(named)}, allowed {', '.join(names)}",
            param="tool_choice",
        )
    return ToolUse(tuple(tools), is_forced, named, is_parallel)


def _check(tool: object, place: str) -> None:
    if not isinstance(tool, dict) or tool.get("type") != "function":
        raise RequestError(
            f"{place}: got {shorten(tool)}, allowed an object of type 'function'", param=place
        )
    function = required(tool, "function", dict, where=place + ".")
    name = required(function, "name", str, where=place + ".function.")
    if not name:
        raise RequestError(f"{place}.function.name: got '', allowed a name", param=place)
    optional(function, "parameters", dict, where=place + ".function.")
    optional(function, "strict", bool, where=place + ".function.")


def _named(choice: dict[str, Any]) -> str:
    if choice.get("type") != "function":
        raise RequestError(
            f"tool_choice: got {shorten(choice)}, allowed {', '.join(_WORDS)} or an object of type"
            " 'function'",
            param="tool_choice",
        )
    function = required(choice, "function", dict, where="tool_choice.")
    return required(function, "name", str, where="tool_choice.function.")
