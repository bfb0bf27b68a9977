"""Chat templates of checkpoints, rendered as transformers renders them, without importing it."""

import json
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.ext import loopcontrols as LoopControls
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from windlass.engine.template_wants import TemplateWants
from windlass.errors import RequestError

_REASONING = ("reasoning_content", "thinking", "reasoning")  # names of one field, best first

_TEMPLATE_ERRORS = (
    jinja2.TemplateError, TypeError, ValueError, LookupError, ArithmeticError, AttributeError,
    RecursionError,
)  # fmt: skip


class ChatTemplate:
    """One or several named Jinja templates. Untrusted: they run in a sandbox on plain JSON data.

    `variables` are the special tokens (`bos_token`, ...) that templates may write.
    """

    def __init__(self, sources: Mapping[str, str], variables: Mapping[str, str]) -> None:
        self._sources = dict(sources)
        self._variables = dict(variables)
        self._environment = _environment()
        self._compiled: dict[str, tuple[jinja2.Template, TemplateWants]] = {}

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        source: str | None = None,
        extra: Mapping[str, Any] | None = None,
        now: int | None = None,
    ) -> str:
        """The prompt. `source`: a template's text or name instead of the checkpoint's choice;
        `extra`: variables of the template; `now`: seconds since 1970 that `strftime_now` shall tell
        in UTC, instead of the clock in local time. Messages are given as the template wants them:
        content as parts or as text, arguments of tool calls as objects or as text. Raises
        RequestError with the template's own message."""
        plain = [_with_reasoning(message) for message in _plain(messages, "messages")]
        fixed = {} if now is None else {"strftime_now": datetime.fromtimestamp(now, UTC).strftime}
        variables = {
            **self._variables,
            **fixed,
            "documents": None,
            **_plain(extra or {}, "chat_template_kwargs"),
            "tools": None if tools is None else _plain(tools, "tools"),
            "add_generation_prompt": add_generation_prompt,
        }
        try:
            template, wants = self._template(source, has_tools=bool(tools))
            shaped = [wants.shaped(message) for message in plain]
            return template.render(variables, messages=shaped)
        except _TEMPLATE_ERRORS as error:
            raise RequestError(f"chat template: {error}", param="messages") from error

    def _template(
        self, source: str | None, *, has_tools: bool
    ) -> tuple[jinja2.Template, TemplateWants]:
        text = self._source(source, has_tools=has_tools)
        if text not in self._compiled:
            template = self._environment.from_string(text)

            def render(messages: list[dict[str, Any]], tools: list[dict[str, Any]]) -> str | None:
                try:
                    return template.render(
                        self._variables,
                        messages=messages,
                        tools=tools,
                        documents=None,
                        add_generation_prompt=False,
                    )
                except _TEMPLATE_ERRORS:
                    return None

            self._compiled[text] = template, TemplateWants(render)
        return self._compiled[text]

    def _source(self, source: str | None, *, has_tools: bool) -> str:
        if source is not None:
            return self._sources.get(source, source)
        for name in ("tool_use", "default") if has_tools else ("default",):
            if name in self._sources:
                return self._sources[name]
        names = f"only templates named {', '.join(self._sources)}" if self._sources else "none"
        raise RequestError(
            f"chat template: the checkpoint has {names}; use completions or give a chat template",
            param="messages",
        )


class _Generation(Extension):
    """`{% generation %}` marks the assistant's words for training; here only its body counts."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> nodes.Node | list[nodes.Node]:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_body"), [], [], body).set_lineno(line)

    def _body(self, caller: Any) -> str:
        return str(caller())


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, LoopControls]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _strftime_now(pattern: str) -> str:
    return datetime.now().strftime(pattern)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Plain JSON: Jinja's own filter escapes for HTML."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _plain(value: Any, name: str) -> Any:
    """A copy made of JSON's types alone: the sandbox cannot know what other objects can do. Texts
    are shared, since they may be large."""
    try:
        return _copied(value)
    except (TypeError, RecursionError) as error:
        raise RequestError(f"{name}: {error}, allowed JSON values", param=name) from error


def _copied(value: Any) -> Any:
    if value is None or type(value) in (str, int, float, bool):
        return value
    if isinstance(value, Mapping):
        return {key if type(key) is str else str(key): _copied(v) for key, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_copied(item) for item in value]
    for kind in (str, int, float):  # an enumeration's value, say
        if isinstance(value, kind):
            return kind(value)
    raise TypeError(f"got {type(value).__name__}")


def _with_reasoning(message: Any) -> dict[str, Any]:
    """Reasoning under all three names that templates read."""
    if not isinstance(message, dict) or "role" not in message:
        raise RequestError(
            f"messages: got {message!r}, allowed objects with a role", param="messages"
        )
    found = [message[name] for name in _REASONING if message.get(name) is not None]
    if not found:
        return message
    named = {"thinking": found[0], **message, "reasoning_content": found[0]}
    return {**named, "reasoning": message.get("reasoning", found[0])}
