"""A body's conversation, tools and template variables: to a prompt, and to how its answers are
read."""

from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple

from windlass.errors import RequestError, WindlassError
from windlass.protocol.answers import AnswerForm
from windlass.protocol.continued import continued
from windlass.protocol.fields import optional
from windlass.protocol.messages import read_messages
from windlass.protocol.served import ServedModel, encoded
from windlass.protocol.tools import ToolUse, read_tools
from windlass.structured import StructuredOutputs

_TEMPLATE_OWN = ("messages", "conversation", "tools", "add_generation_prompt", "tokenize",
                 "chat_template", "return_dict", "return_tensors")  # fmt: skip
_THINKS, _THOUGHT = "<think>", "</think>"
_VARIABLES = ("reasoning_effort", "verbosity")  # fields that some templates read


class Chat(NamedTuple):
    """`calls`: what makes the answer calls of tools, where it must be."""

    token_ids: list[int]
    form: AnswerForm
    calls: StructuredOutputs | None


def read_chat(body: Mapping[str, Any], model: ServedModel, *, is_cut: bool = False) -> Chat:
    """By the chat template. `is_cut`: a prompt may be too long. Raises RequestError."""
    tools = read_tools(body)
    goes_on = bool(optional(body, "continue_final_message", bool))
    text = _rendered(body, tools, model, goes_on=goes_on)
    form = AnswerForm(
        parsers=model.parsers,
        tools=tools.schemas(),
        is_thinking=_is_open(body) if goes_on else text.rstrip().endswith(_THINKS),
        is_forced=tools.is_forced,
        named=tools.named,
        is_parallel=tools.is_parallel,
        shows_reasoning=optional(body, "include_reasoning", bool) is not False,
    )
    ids = encoded(text, model, "messages", special=False, is_cut=is_cut)
    return Chat(ids, form, tools.constraint(form.free_until))


def _is_open(body: Mapping[str, Any]) -> bool:
    """Whether the last message, which the answer goes on with, ends within its reasoning."""
    content = body["messages"][-1].get("content")
    return isinstance(content, str) and content.rfind(_THINKS) > content.rfind(_THOUGHT)


def _rendered(body: Mapping[str, Any], tools: ToolUse, model: ServedModel, *, goes_on: bool) -> str:
    messages = read_messages(body)
    variables = optional(body, "chat_template_kwargs", dict)
    given = {name: optional(body, name, str) for name in _VARIABLES}
    named = {name: value for name, value in given.items() if value is not None}
    variables = {**named, **(variables or {})} or None
    refused = next((name for name in variables or () if name in _TEMPLATE_OWN), None)
    if refused is not None:
        raise RequestError(
            f"chat_template_kwargs.{refused}: not a template variable",
            param="chat_template_kwargs",
        )
    generate = optional(body, "add_generation_prompt", bool)
    if goes_on and generate:
        raise RequestError(
            "continue_final_message: allowed only without add_generation_prompt",
            param="continue_final_message",
        )

    def render(shown: tuple[dict[str, Any], ...]) -> str:
        template = partial(
            model.tokenizer.render_chat,
            tools=list(shown) or None,
            add_generation_prompt=generate is not False and not goes_on,
            variables=variables,
            now=model.now,
        )
        return continued(messages, template) if goes_on else template(messages)

    try:
        text = render(tools.shown)
        # a template that shows no tools renders the same without them; a call that is forced needs
        # no more than the names in its schema
        if tools.shown and not tools.is_forced and text == render(()):
            raise RequestError(
                "tools: this model's chat template does not take tools",
                param="tools",
                code="unsupported_parameter",
            )
    except RequestError:
        raise
    except WindlassError as error:
        raise RequestError(str(error), param="messages") from error
    return text
