"""The model that bodies ask, and its tokenizer as they need it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from windlass.errors import RequestError
from windlass.params import SamplingParams
from windlass.protocol.answers import AnswerParsers


class ChatTokenizer(Protocol):
    """What the protocol needs of a tokenizer."""

    def encode(
        self, text: str, *, add_special_tokens: bool = True, at_most: int | None = None
    ) -> list[int]: ...

    def render_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        *,
        add_generation_prompt: bool = True,
        variables: Mapping[str, Any] | None = None,
        now: int | None = None,
    ) -> str: ...

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str: ...


@dataclass(frozen=True, slots=True)
class ServedModel:
    """What a body may ask for. `names[0]` is written into responses, all of them are accepted.
    `default_params.max_tokens`: of bodies that name none, None for the endpoint's own default.
    `now`: the seconds since 1970 that chat templates see, None for the clock's. `limited_by`: why
    `max_model_len` is no more, where that is special. `parsers`: how its answers are read."""

    names: tuple[str, ...]
    tokenizer: ChatTokenizer
    max_model_len: int
    default_params: SamplingParams
    now: int | None = None
    limited_by: str = ""
    parsers: AnswerParsers = AnswerParsers()


def encoded(
    text: str, model: ServedModel, field: str, *, special: bool, is_cut: bool = False
) -> list[int]:
    """Its ids, unless there are sure to be more than fit; all of them if it `is_cut` then."""
    most = None if is_cut else model.max_model_len - 1
    try:
        return model.tokenizer.encode(text, add_special_tokens=special, at_most=most)
    except RequestError as error:
        raise RequestError(str(error), param=field, code=error.code) from error


def num_tokens(model: ServedModel, text: str) -> int:
    """Of a text that is a part of an answer."""
    return len(model.tokenizer.encode(text, add_special_tokens=False))
