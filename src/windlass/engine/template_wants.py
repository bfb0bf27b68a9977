"""What a chat template wants of messages, found by trying it: whether it walks over the parts of a
content, whether the arguments of tool calls are objects or text, whether there can be no content.
Templates do not say it, and one that gets the other form fails, or writes it as Python does."""

import json
from collections.abc import Callable
from functools import cached_property
from typing import Any, NamedTuple

from windlass.errors import RequestError

_FIRST, _SECOND, _KEY = "wlfirst", "wlsecond", "wlkey"  # told apart from whatever a template writes
_CALL_ID = "wlcall001"  # Mistral's have nine letters and digits
_PARAMETER = {"wlname": {"type": "string", "description": "wltext"}}
_TOOL = {
    "type": "function",
    "function": {
        "name": "wltool",
        "description": "wltext",
        "parameters": {"type": "object", "properties": _PARAMETER, "required": ["wlname"]},
    },
}
_USER = {"role": "user", "content": "wluser"}
# Parts of a content that are text, by the name of the field that holds it.
TEXT_PARTS = {
    "text": "text", "input_text": "text", "output_text": "text", "refusal": "refusal",
}  # fmt: skip


class _CallForm(NamedTuple):
    """How a message of tool calls is given."""

    content: str | None  # where there is none
    is_text: bool  # the arguments


# in the order of preference: what transformers documents, then older ways
_CALL_FORMS = (
    _CallForm(None, False), _CallForm(None, True), _CallForm("", False), _CallForm("", True),
)  # fmt: skip


class TemplateWants:
    """`render`: of messages and tools, None where the template fails."""

    def __init__(
        self, render: Callable[[list[dict[str, Any]], list[dict[str, Any]]], str | None]
    ) -> None:
        self._render = render
        self._walks: dict[str, bool] = {}

    def shaped(self, message: dict[str, Any]) -> dict[str, Any]:
        """The message as the template wants it. RequestError for parts that are no text, and for
        arguments that are no JSON object."""
        content = message.get("content")
        if isinstance(content, list):
            texts = [_text(part) for part in content]
            if len(texts) and self._walks_over(message["role"]):
                content = [{"type": "text", "text": text} for text in texts]
            else:
                content = "\n".join(texts)
            message = message | {"content": content}
        elif content is None and "content" in message:
            message = message | {"content": self._calls.content}
        calls = message.get("tool_calls")
        if calls:
            message = message | {"tool_calls": [self._call(call) for call in calls]}
        return message

    def _call(self, call: Any) -> Any:
        function = call.get("function", call)
        given = function.get("arguments") or {}
        arguments: Any = arguments_of(given)
        if arguments is None:
            raise RequestError(
                f"tool call: arguments: got {given!r:.80}, allowed a JSON object", param="messages"
            )
        if self._calls.is_text:
            arguments = given if isinstance(given, str) else json.dumps(given, ensure_ascii=False)
        function = function | {"arguments": arguments}
        return call | {"function": function} if "function" in call else function

    def _walks_over(self, role: str) -> bool:
        """Whether both of two parts are written, and not as a list's own text."""
        if role not in self._walks:
            parts = [{"type": "text", "text": text} for text in (_FIRST, _SECOND)]
            written = self._render(self._talk(role, parts), [_TOOL]) or ""
            _, first, rest = written.partition(_FIRST)
            between, second, _ = rest.partition(_SECOND)
            self._walks[role] = bool(first and second) and "text" not in between
        return self._walks[role]

    def _talk(self, role: str, content: Any) -> list[dict[str, Any]]:
        """A conversation with a message of that role."""
        one = {"role": role, "content": content}
        if role == "tool":
            return _called(self._calls, content)
        if role == "user":
            return [one]
        return [_USER, one, _USER] if role == "assistant" else [one, _USER]

    @cached_property
    def _calls(self) -> _CallForm:
        """The first form that is written well; where none is, no call is shown, and the first that
        can be written."""
        written = {form: self._render(_called(form, "wlanswer"), [_TOOL]) for form in _CALL_FORMS}
        empty = [text for form, text in written.items() if form.content == "" and text is not None]
        most_nones = min((_nones(text) for text in empty), default=None)
        able = [
            form
            for form, text in written.items()
            if text is not None and (most_nones is None or _nones(text) <= most_nones)
        ]
        for form in able:
            text = written[form] or ""
            # 'key': is Python's own form of an object, \"key is JSON within a JSON text
            if _KEY in text.replace(f"'{_KEY}':", "").replace(f'\\"{_KEY}', ""):
                return form
        return (*able, *_CALL_FORMS)[0]


def arguments_of(given: Any) -> dict[str, Any] | None:
    """Of a tool call: an object, or JSON text of one; None for anything else."""
    if isinstance(given, str):
        try:
            given = json.loads(given)
        except ValueError:
            return None
    return given if isinstance(given, dict) else None


def _nones(text: str) -> int:
    """How often nothing at all is written, as Python or JSON has it."""
    return text.count("None") + text.count("null")


def _called(form: _CallForm, answer: Any) -> list[dict[str, Any]]:
    """A conversation with a call of the tool and its answer."""
    arguments: Any = {_KEY: "wlvalue"}
    function = {"name": "wltool", "arguments": json.dumps(arguments) if form.is_text else arguments}
    call = {"type": "function", "id": _CALL_ID, "function": function}
    return [
        _USER,
        {"role": "assistant", "content": form.content, "tool_calls": [call]},
        {"role": "tool", "content": answer, "tool_call_id": _CALL_ID, "name": "wltool"},
    ]


def _text(part: Any) -> str:
    """Of a part of a content."""
    if isinstance(part, str):
        return part
    kind = part.get("type") if isinstance(part, dict) else None
    text = part.get(TEXT_PARTS[kind]) if isinstance(kind, str) and kind in TEXT_PARTS else None
    if not isinstance(text, str):
        raise RequestError(
            f"messages: content: got the part {part!r:.80}, allowed strings and parts of type"
            f" {', '.join(TEXT_PARTS)}",
            param="messages",
        )
    return text
