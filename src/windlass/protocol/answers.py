"""How the text of a chat answer is read: reasoning, content, calls of tools. Whole answers and
streams go through the same readers, so they say the same."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

from windlass.protocol.markup import (
    BLANKS,
    Arguments,
    Call,
    Content,
    Found,
    Incremental,
    Reader,
    Reasoning,
    Source,
    skip,
    until,
)
from windlass.protocol.tool_parsers import TOOL_MARKS, TOOL_PARSERS, forced, harmony

_THINK, _THINK_END = "<think>", "</think>"
_HARMONY = "openai"  # gpt-oss: reasoning and calls are marked alike
_FINAL = "<|channel|>final<|message|>"
_REASONING = {
    "think": "think", "qwen3": "think", "deepseek_r1": "think", "deepseek_v3": "think",
    "glm45": "think", _HARMONY: _HARMONY, "openai_gptoss": _HARMONY,
}  # fmt: skip
AUTO, NONE = "auto", "none"
TOOL_PARSER_NAMES = (AUTO, NONE, *TOOL_PARSERS, _HARMONY)
REASONING_PARSER_NAMES = (AUTO, NONE, *_REASONING)


class ParserTokenizer(Protocol):
    """What the choice of parsers needs of a tokenizer."""

    def encode(
        self, text: str, *, add_special_tokens: bool = True, at_most: int | None = None
    ) -> list[int]: ...
    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str: ...
    def facts(self) -> dict[str, Any]: ...


@dataclass(frozen=True, slots=True)
class AnswerParsers:
    """How a model marks calls and reasoning, None where it does not. `shows_special`: its marks are
    tokens that texts leave out unless told otherwise."""

    tools: str | None = None
    reasoning: str | None = None
    shows_special: bool = False

    @property
    def is_harmony(self) -> bool:
        return _HARMONY in (self.tools, self.reasoning)


def choose_parsers(
    tokenizer: ParserTokenizer, tools: str = AUTO, reasoning: str = AUTO
) -> AnswerParsers:
    """By the chat template, where a name of those below is `auto`."""
    template = str(tokenizer.facts().get("chat_template") or "")
    is_harmony = "<|channel|>" in template
    found = next((name for mark, name in TOOL_MARKS.items() if mark in template), None)
    if tools != AUTO:
        found = None if tools == NONE else tools
    elif is_harmony:
        found = _HARMONY
    thinks = "think" if _THINK_END in template else None
    if reasoning != AUTO:
        thinks = _REASONING.get(reasoning)
    elif is_harmony or found == _HARMONY:
        thinks = _HARMONY
    marks = [mark for mark, name in TOOL_MARKS.items() if name == found]
    marks += [_THINK, _THINK_END] if thinks == "think" else []
    marks += ["<|message|>"] if _HARMONY in (found, thinks) else []
    return AnswerParsers(found, thinks, any(_is_special(mark, tokenizer) for mark in marks))


def _is_special(mark: str, tokenizer: ParserTokenizer) -> bool:
    ids = tokenizer.encode(mark, add_special_tokens=False)
    return len(ids) == 1 and not tokenizer.decode(ids, skip_special_tokens=True)


@dataclass(frozen=True, slots=True)
class AnswerForm:
    """How the answers to one body are read. `tools`: the arguments' schema of each, where the model
    may call any. `is_thinking`: the prompt ends within its reasoning. `is_forced`: the text was
    made to be calls, of `named` alone where that is set. `is_parallel`: there may be more than one
    call. `shows_reasoning`: else it is left out."""

    parsers: AnswerParsers = AnswerParsers()
    tools: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    is_thinking: bool = False
    is_forced: bool = False
    named: str | None = None
    is_parallel: bool = True
    shows_reasoning: bool = True

    @property
    def free_until(self) -> str:
        """Where what is asked of the answer begins; "" for at once."""
        if self.parsers.is_harmony:
            return _FINAL
        return _THINK_END if self.parsers.reasoning == "think" and self.is_thinking else ""

    @property
    def shows_special(self) -> bool:
        """Whether marks must be in the text that is read."""
        needs = self.parsers.reasoning is not None or bool(self.tools)
        return needs and self.parsers.shows_special

    def read(self, text: str) -> "Message":
        """Of a whole answer."""
        reader, message = AnswerReader(self), Message()
        for one in (*reader.push(text), *reader.finish()):
            message.add(one)
        return message


class AnswerReader:
    """Reads one answer, piece by piece."""

    def __init__(self, form: AnswerForm) -> None:
        self._form = form
        self._outer = Incremental(_outer(form))
        self._inner = Incremental(_inner(form))
        self.num_calls = 0  # that are told
        self._is_over = False  # of the calls that may be

    def push(self, text: str) -> list[Found]:
        """What is new."""
        return self._through(self._outer.push(text))

    def finish(self) -> list[Found]:
        """What was held back."""
        last = self._through(self._outer.finish())
        return last + self._kept(self._inner.finish())

    def _through(self, found: list[Found]) -> list[Found]:
        result: list[Found] = []
        for one in found:
            result += self._inner.push(one.text) if isinstance(one, Content) else [one]
        return self._kept(result)

    def _kept(self, found: list[Found]) -> list[Found]:
        kept: list[Found] = []
        for one in found:
            if isinstance(one, Call):
                self._is_over = self.num_calls > 0 and not self._form.is_parallel
                self.num_calls += not self._is_over
            is_too_many = isinstance(one, (Call, Arguments)) and self._is_over
            is_hidden = isinstance(one, Reasoning) and not self._form.shows_reasoning
            if not (is_too_many or is_hidden):
                kept.append(one)
        return kept


def _outer(form: AnswerForm) -> Callable[[Source], Reader]:
    if form.parsers.is_harmony:
        return harmony
    if form.parsers.reasoning == "think":
        return partial(_think, is_open=form.is_thinking)
    return _plain


def _inner(form: AnswerForm) -> Callable[[Source], Reader]:
    if form.is_forced:
        return partial(forced, name=form.named)
    read = TOOL_PARSERS.get(form.parsers.tools or "")
    return (lambda source: read(source, form.tools)) if form.tools and read else _plain


def _plain(source: Source) -> Reader:
    yield from until(source, (), Content)


def _think(source: Source, is_open: bool) -> Reader:
    """Reasoning stands at the beginning: what comes behind is content, whatever it says."""
    while not is_open:
        bare = source.text.lstrip(BLANKS)
        if bare.startswith(_THINK):
            source.text = bare.removeprefix(_THINK)
            break
        if source.is_over or not _THINK.startswith(bare):
            yield from until(source, (), Content)
            return
        yield None
    yield from skip(source, BLANKS)
    if (yield from until(source, (_THINK_END,), Reasoning, trim=BLANKS)) is not None:
        yield from skip(source, BLANKS)
        yield from until(source, (), Content)


@dataclass(slots=True)
class Message:
    """What was read. `calls`: names and arguments as JSON text."""

    content: str = ""
    reasoning: str = ""
    calls: list[tuple[str, str]] = field(default_factory=list)

    def add(self, found: Found) -> None:
        if isinstance(found, Content):
            self.content += found.text
        elif isinstance(found, Reasoning):
            self.reasoning += found.text
        elif isinstance(found, Call):
            self.calls.append((found.name, ""))
        else:
            name, text = self.calls[-1]
            self.calls[-1] = name, text + found.text
