"""A body's conversation, tools and template variables: to a prompt, and to how its answers are
read."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from windlass.errors import RequestError, WindlassError
from windlass.protocol.answers import AnswerForm
from windlass.protocol.fields import optional
from windlass.protocol.messages import read_messages
from windlass.protocol.served import ServedModel, encoded
from windlass.protocol.tools import ToolUse, read_tools
from windlass.structured import StructuredOutputs

_TEMPLATE_OWN = ("messages", "conversation", "tools", "add_generation_prompt", "tokenize",
                 "chat_template", "return_dict", "return_tensors")  # fmt: skip
_THINKS = "<think>"


class Chat(NamedTuple):
    """`calls`: what makes the answer calls of tools, where it must be."""

    token_ids: list[int]
    form: AnswerForm
    calls: StructuredOutputs | None


def read_chat(body: Mapping[str, Any], model: ServedModel) -> Chat:
    """By the chat template. Raises RequestError."""
    tools = read_tools(body)
    text = _rendered(body, tools, model)
    form = AnswerForm(
        parsers=model.parsers,
        tools=tools.schemas(),
        is_thinking=text.rstrip().endswith(_THINKS),
        is_forced=tools.is_forced,
        named=tools.named,
        is_parallel=tools.is_parallel,
        shows_reasoning=optional(body, "include_reasoning", bool) is not False,
    )
    ids = encoded(text, model, "messages", special=False)
    return Chat(ids, form, tools.constraint(form.free_until))


def _rendered(body: Mapping[str, Any], tools: ToolUse, model: ServedModel) -> str:
    messages = read_messages(body)
    variables = optional(body, "chat_template_kwargs", dict)
    effort = optional(body, "reasoning_effort", str)
    if effort is not None:
        variables = {"reasoning_effort": effort, **(variables or {})}
    refused = next((name for name in variables or () if name in _TEMPLATE_OWN), None)
    if refused is not None:
        raise RequestError(
            f"chat_template_kwargs.{refused}: not a template variable",
            param="chat_template_kwargs",
        )
    generate = optional(body, "add_generation_prompt", bool)

    def render(shown: tuple[dict[str, Any], ...]) -> str:
        return model.tokenizer.render_chat(
            messages,
            list(shown) or None,
            add_generation_prompt=generate is not False,
            variables=variables,
            now=model.now,
        )

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
