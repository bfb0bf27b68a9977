"""Prompts as the Python API takes them, made into tokens. Knows no engine."""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from windlass.errors import RequestError
from windlass.protocol.continued import continued


class PromptTokenizer(Protocol):
    """What prompts need of a tokenizer."""

    def encode(
        self, text: str, *, add_special_tokens: bool = True, at_most: int | None = None
    ) -> list[int]: ...

    def render_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        *,
        add_generation_prompt: bool = True,
        chat_template: str | None = None,
        variables: Mapping[str, Any] | None = None,
    ) -> str: ...


class Encoder(Protocol):
    """Makes tokens of what a caller gives."""

    def encode(self, row: Any) -> tuple[str | None, list[int]]:
        """Its text, if any, and its ids. Raises RequestError."""
        ...


class PromptEncoder:
    """Of a string, {"prompt": string} or {"prompt_token_ids": ids}. A text that is sure to have
    more than `at_most` tokens is refused before it is encoded."""

    def __init__(self, tokenizer: PromptTokenizer, at_most: int) -> None:
        self._tokenizer = tokenizer
        self._at_most = at_most

    def encode(self, row: Any) -> tuple[str | None, list[int]]:
        if isinstance(row, str):
            return row, self._tokenizer.encode(row, at_most=self._at_most)
        if isinstance(row, Mapping) and set(row) == {"prompt"}:
            return self.encode(row["prompt"])
        if isinstance(row, Mapping) and set(row) == {"prompt_token_ids"}:
            ids = row["prompt_token_ids"]
            if isinstance(ids, Sequence) and all(type(i) is int and i >= 0 for i in ids):
                return None, list(ids)
        raise RequestError(
            f"prompt: got {row!r:.80}, allowed a string, {{'prompt': string}} or "
            "{'prompt_token_ids': [ids]}",
            param="prompt",
        )


class ChatEncoder:
    """Of a conversation, by the chat template; `options` are those of `render_chat`. `at_most`: as
    above. `goes_on`: the answer goes on with the last message."""

    def __init__(
        self, tokenizer: PromptTokenizer, at_most: int, *, goes_on: bool = False, **options: Any
    ) -> None:
        self._tokenizer = tokenizer
        self._at_most = at_most
        self._goes_on = goes_on
        self._options = {**options, "add_generation_prompt": False} if goes_on else options

    def encode(self, row: Any) -> tuple[str | None, list[int]]:
        def render(messages: Sequence[Mapping[str, Any]]) -> str:
            return self._tokenizer.render_chat(messages, **self._options)

        text = continued(row, render) if self._goes_on else render(row)
        return text, self._tokenizer.encode(text, add_special_tokens=False, at_most=self._at_most)
