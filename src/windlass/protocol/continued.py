"""`continue_final_message`: a prompt that ends within its last message, for an answer that goes on
with it, as transformers has it."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from windlass.errors import RequestError

# Behind the text that is to be continued; a blank that is gone was cut by the template.
_MARK, _BLANK = "WL_TO_BE_CONTINUED", " "


def continued(
    messages: Sequence[Mapping[str, Any]],
    render: Callable[[Sequence[Mapping[str, Any]]], str],
) -> str:
    """What `render` makes of the messages, up to the end of the last one's text. A template that
    cuts blanks of a message cuts them here too. Raises RequestError."""
    text, mark, after = render([*messages[:-1], _marked(messages[-1])]).rpartition(_MARK)
    if not mark:
        raise RequestError(
            "continue_final_message: this model's chat template does not show the last message",
            param="messages",
        )
    return text if after.startswith(_BLANK) else text.rstrip()


def _marked(message: Mapping[str, Any]) -> dict[str, Any]:
    content: Any = message.get("content")
    if message.get("role") != "assistant" or not content:
        raise RequestError(
            "continue_final_message: allowed only where the last message is an assistant's text",
            param="messages",
        )
    if isinstance(content, str):
        return {**message, "content": content + _MARK + _BLANK}
    *parts, last = content
    last = {"type": "text", "text": last} if isinstance(last, str) else last
    return {**message, "content": [*parts, {**last, "text": last["text"] + _MARK + _BLANK}]}
