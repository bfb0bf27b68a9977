"""Tool calls as models write them, one reader for each way. Their names are vLLM's."""

import json
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from windlass.protocol.markup import (
    BLANKS,
    Arguments,
    Call,
    Content,
    Part,
    Reader,
    Reasoning,
    Source,
    begins_with,
    json_call,
    skip,
    until,
    whole,
)

Tools = Mapping[str, Mapping[str, Any]]  # the schema of the arguments of each
_CALL, _CALL_END = "<tool_call>", "</tool_call>"


def hermes(source: Source, tools: Tools) -> Reader:
    """`<tool_call>{"name": ..., "arguments": {...}}</tool_call>`: Hermes, Qwen 2.5 and 3, and
    templates like theirs."""
    while True:
        if (yield from until(source, (_CALL,), Content, trim=BLANKS)) is None:
            return
        is_call = yield from json_call(source)
        if is_call:
            yield from _leave(source, (_CALL_END, _CALL))
        elif is_call is None:
            return
        else:
            yield Content(_CALL)


def qwen3_coder(source: Source, tools: Tools) -> Reader:
    """`<tool_call><function=NAME><parameter=KEY>VALUE</parameter></function></tool_call>`, the
    outer tags perhaps left out."""
    begin = "<function="
    while True:
        mark = yield from until(source, (_CALL, begin), Content, trim=BLANKS)
        if mark is None:
            return
        if mark == _CALL:
            yield from skip(source, BLANKS)
            if not (yield from begins_with(source, begin)):
                if _is_cut(source, begin):
                    return
                yield Content(_CALL)
                continue
            source.take(len(begin))
        name, end = yield from whole(source, (">",))
        if end is None:
            return
        yield Call(name.strip())
        if not (yield from _parameters(source, _QWEN, tools.get(name.strip(), {}))):
            return
        yield from skip(source, BLANKS)
        if (yield from begins_with(source, _CALL_END)):
            source.take(len(_CALL_END))
        elif _is_cut(source, _CALL_END):
            return
        yield from skip(source, BLANKS)


def glm45(source: Source, tools: Tools) -> Reader:
    """`<tool_call>NAME<arg_key>KEY</arg_key><arg_value>VALUE</arg_value></tool_call>`."""
    while True:
        if (yield from until(source, (_CALL,), Content, trim=BLANKS)) is None:
            return
        name, mark = yield from whole(source, (_GLM.key, _CALL_END))
        if mark is None:
            return
        source.text = mark + source.text
        yield Call(name.strip())
        if not (yield from _parameters(source, _GLM, tools.get(name.strip(), {}))):
            return
        yield from skip(source, BLANKS)


def deepseek(source: Source, tools: Tools) -> Reader:
    """DeepSeek's tokens: V3 and R1 write `function`, the name and a block of JSON, V3.1 the name
    and the bare JSON."""
    while True:
        marks = (_DS_BEGIN, _DS_CALLS, _DS_CALLS_END)
        mark = yield from until(source, marks, Content, trim=BLANKS)
        if mark is None:
            return
        if mark != _DS_BEGIN:
            yield from skip(source, BLANKS)
            continue
        name, mark = yield from whole(source, (_DS_MIDDLE,))
        if mark is None:
            return
        ends: tuple[str, ...] = (_DS_END,)
        if name.strip() == "function":
            name, mark = yield from whole(source, ("\n",))
            if mark is None:
                return
            yield from skip(source, BLANKS)
            if (yield from begins_with(source, _FENCE)):
                yield from whole(source, ("\n",))
            ends = ("\n" + _FENCE, _DS_END)
        yield Call(name.strip())
        yield from skip(source, BLANKS)
        mark = yield from until(source, ends, Arguments, trim=BLANKS)
        if mark is None:
            return
        if mark != _DS_END:
            yield from whole(source, (_DS_END,))
        yield from skip(source, BLANKS)


def harmony(source: Source) -> Reader:
    """gpt-oss: a header and a body for each message, `<|channel|>CHANNEL<|message|>TEXT<|end|>`.
    The channel `analysis` is reasoning; a header that names a recipient is a call. A text without
    headers is content."""
    while True:
        header, mark = yield from whole(source, ("<|message|>",))
        if mark is None:
            if "<|" not in header and header:
                yield Content(header)
            return
        recipient = re.search(r"to=(?:functions\.)?([^\s<]+)", header)
        make: Callable[[str], Any] = Content
        if recipient:
            yield Call(recipient[1])
            make = Arguments
        elif "<|channel|>analysis" in header:
            make = Reasoning
        if (yield from until(source, ("<|end|>", "<|return|>", "<|call|>"), make)) is None:
            return


def forced(source: Source, name: str | None) -> Reader:
    """An answer that was made to be the arguments of `name`, or (None) calls as JSON objects, one
    or a list of them."""
    if name is not None:
        yield Call(name)
        yield from until(source, (), Arguments)
        return
    while True:
        yield from skip(source, BLANKS + "[,]")
        if not (yield from json_call(source)):
            return


def _is_cut(source: Source, mark: str) -> bool:
    """Whether the text ends within the mark that was expected."""
    return source.is_over and mark.startswith(source.text)


def _leave(source: Source, marks: tuple[str, str]) -> Part:
    """After a call: drops all up to the first of `marks`, which ends it, or the second, which
    begins the next and stays."""
    _, mark = yield from whole(source, marks)
    if mark == marks[1]:
        source.text = mark + source.text
    yield from skip(source, BLANKS)


class _Tags(NamedTuple):
    """How keys and values are marked. `ends`: of a value. `is_line`: values stand on lines of their
    own. `closing`: ends the call."""

    key: str
    key_end: str
    value: str
    ends: tuple[str, ...]
    is_line: bool
    closing: tuple[str, ...]


_QWEN = _Tags("<parameter=", ">", "", ("\n</parameter>", "</parameter>"), True,
              ("</function>", _CALL_END))  # fmt: skip
_GLM = _Tags("<arg_key>", "</arg_key>", "<arg_value>", ("</arg_value>",), False, (_CALL_END,))
_DS_CALLS, _DS_CALLS_END = "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"
_DS_BEGIN, _DS_MIDDLE = "<｜tool▁call▁begin｜>", "<｜tool▁sep｜>"
_DS_END, _FENCE = "<｜tool▁call▁end｜>", "```"


def _parameters(source: Source, tags: _Tags, schema: Mapping[str, Any]) -> Part:
    """Tells keys and values as one JSON object. Returns whether it has ended: JSON that was cut is
    left open, so that nobody takes it for whole."""
    is_first = True
    properties = schema.get("properties")
    known = properties if isinstance(properties, Mapping) else {}
    while True:
        _, mark = yield from whole(source, (tags.key, *tags.closing))
        if mark is None:
            return False
        if mark != tags.key:
            yield Arguments("{}" if is_first else "}")
            return True
        key, mark = yield from whole(source, (tags.key_end,))
        if mark is None:
            return False
        key = key.strip()
        yield Arguments(("{" if is_first else ", ") + json.dumps(key, ensure_ascii=False) + ": ")
        is_first = False
        if tags.value and (yield from whole(source, (tags.value,)))[1] is None:
            return False
        if tags.is_line and (yield from begins_with(source, "\n")):
            source.take(1)
        kinds = _kinds(known.get(key))
        if kinds == {"string"}:
            yield Arguments('"')
            mark = yield from until(source, tags.ends, lambda text: Arguments(_escaped(text)))
            if mark is None:
                return False
            yield Arguments('"')
            continue
        text, mark = yield from whole(source, tags.ends)
        if mark is None:
            return False
        yield Arguments(_as_json(text, kinds))


def _escaped(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)[1:-1]


def _kinds(schema: Any) -> set[str]:
    """Types that a schema names; of one that is not there, a string's."""
    if not isinstance(schema, Mapping):
        return {"string"}
    own = schema.get("type")
    kinds = {own} if isinstance(own, str) else set(own) if isinstance(own, list) else set()
    for name in ("anyOf", "oneOf"):
        for one in schema.get(name) or ():
            kinds |= _kinds(one)
    values = [*(schema.get("enum") or ()), *([schema["const"]] if "const" in schema else ())]
    if not own:
        kinds |= {_TYPES[type(value)] for value in values if type(value) in _TYPES}
    return kinds or {"any"}


_TYPES: dict[type, str] = {
    str: "string", bool: "boolean", int: "integer", float: "number", dict: "object", list: "array",
    type(None): "null",
}  # fmt: skip
_PYTHON = {"True": "true", "False": "false", "None": "null"}


def _as_json(text: str, kinds: set[str]) -> str:
    """A value that is written without quotes, as JSON of one of `kinds`."""
    bare = _PYTHON.get(text.strip(), text.strip())
    try:
        kind = _TYPES[type(json.loads(bare))]
    except ValueError:
        return json.dumps(text, ensure_ascii=False)
    fits = "any" in kinds or kind in kinds or (kind == "integer" and "number" in kinds)
    return bare if fits or "string" not in kinds else json.dumps(text, ensure_ascii=False)


TOOL_PARSERS: dict[str, Callable[[Source, Tools], Reader]] = {
    "hermes": hermes,
    "qwen3_coder": qwen3_coder,
    "glm45": glm45,
    "deepseek_v3": deepseek,
    "deepseek_v31": deepseek,
}
# What a chat template has in it whose model writes calls so; the first that is found.
TOOL_MARKS = {
    "<function=": "qwen3_coder",
    "<arg_key>": "glm45",
    _DS_BEGIN: "deepseek_v3",
    _CALL: "hermes",
}
