"""Reading answers: calls in the ways models write them, reasoning, content. However the text is
cut into pieces, the same is found, and content never shows a call's markup."""

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from windlass.protocol.answers import (
    AnswerForm,
    AnswerParsers,
    AnswerReader,
    Message,
    choose_parsers,
)
from windlass.protocol.markup import Content

TOOLS: dict[str, dict[str, Any]] = {
    "get_weather": {
        "type": "object",
        "properties": {
            "city": {"type": "string"},
            "days": {"type": "integer"},
            "unit": {"anyOf": [{"type": "string"}, {"type": "null"}]},
            "where": {"type": "object"},
        },
    },
    "now": {"type": "object", "properties": {}},
}
PARIS = {"city": 'Par"is\n{', "days": 3}


def form(tools: str | None = None, reasoning: str | None = None, **more: Any) -> AnswerForm:
    return AnswerForm(AnswerParsers(tools, reasoning), TOOLS, **more)


def hermes(name: str, arguments: Any) -> str:
    call = json.dumps({"name": name, "arguments": arguments})
    return f"<tool_call>\n{call}\n</tool_call>"


def qwen3_coder(name: str, arguments: dict[str, Any]) -> str:
    shown = {
        key: value if isinstance(value, str) else json.dumps(value)
        for key, value in arguments.items()
    }
    inner = "".join(f"<parameter={k}>\n{v}\n</parameter>\n" for k, v in shown.items())
    return f"<tool_call>\n<function={name}>\n{inner}</function>\n</tool_call>"


def glm45(name: str, arguments: dict[str, Any]) -> str:
    shown = {
        key: value if isinstance(value, str) else json.dumps(value)
        for key, value in arguments.items()
    }
    inner = "".join(
        f"<arg_key>{k}</arg_key>\n<arg_value>{v}</arg_value>\n" for k, v in shown.items()
    )
    return f"<tool_call>{name}\n{inner}</tool_call>"


def deepseek_v3(name: str, arguments: Any) -> str:
    return (
        f"<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>{name}\n```json\n"
        f"{json.dumps(arguments)}\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜>"
    )


def deepseek_v31(name: str, arguments: Any) -> str:
    return (
        f"<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>{name}<｜tool▁sep｜>{json.dumps(arguments)}"
        "<｜tool▁call▁end｜><｜tool▁calls▁end｜>"
    )


def openai(name: str, arguments: Any) -> str:
    return (
        f"<|start|>assistant<|channel|>commentary to=functions.{name} <|constrain|>json<|message|>"
        f"{json.dumps(arguments)}<|call|>"
    )


MARKS = ("<tool_call>", "<function=", "<｜tool▁calls▁begin｜>", "<｜tool▁call▁begin｜>",
         "<｜tool▁calls▁end｜>")  # fmt: skip
WAYS = [hermes, qwen3_coder, glm45, deepseek_v3, deepseek_v31, openai]


def pieces(form: AnswerForm, parts: list[str]) -> Message:
    reader, message = AnswerReader(form), Message()
    for part in parts:
        for found in reader.push(part):
            if isinstance(found, Content):
                assert "<tool_c" not in found.text and "<|" not in found.text
            message.add(found)
    for found in reader.finish():
        message.add(found)
    return message


def cut(text: str, places: list[int]) -> list[str]:
    ends = sorted({place % (len(text) + 1) for place in places} | {0, len(text)})
    return [text[a:b] for a, b in zip(ends, ends[1:], strict=False)]


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
@settings(max_examples=40)
@given(places=st.lists(st.integers(0, 10**6), max_size=12), has_text=st.booleans())
def test_calls_are_found_however_they_are_cut(way, places, has_text):
    before = "I shall look.\n\n" if has_text and way is not openai else ""
    text = before + way("get_weather", PARIS) + "\n" * (way is not openai) + way("now", {})
    reading = form(way.__name__)
    whole = reading.read(text)
    assert whole.content == before.strip()
    assert [name for name, _ in whole.calls] == ["get_weather", "now"]
    assert [json.loads(arguments) for _, arguments in whole.calls] == [PARIS, {}]
    assert pieces(reading, cut(text, places)) == whole
    assert pieces(reading, list(text)) == whole


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
@settings(max_examples=60)
@given(end=st.integers(0, 400), places=st.lists(st.integers(0, 10**6), max_size=8))
def test_a_text_that_is_cut_off_shows_no_markup_and_no_whole_arguments(way, end, places):
    text = way("get_weather", PARIS) + way("now", {})
    reading = form(way.__name__)
    whole = reading.read(text)
    part = text[: end % len(text)]
    found = reading.read(part)
    assert pieces(reading, cut(part, places)) == found
    assert any(mark.startswith(found.content) for mark in MARKS)
    for (name, arguments), (own, all_of_it) in zip(found.calls, whole.calls, strict=False):
        assert own.startswith(name) and all_of_it.startswith(arguments)


@given(text=st.text(alphabet="<tol_ca>{}\"':na /think\n,[]1\\", max_size=60),
       places=st.lists(st.integers(0, 60), max_size=8),
       tools=st.sampled_from([way.__name__ for way in WAYS]),
       reasoning=st.sampled_from([None, "think"]), thinks=st.booleans())  # fmt: skip
def test_no_text_is_read_differently_in_pieces(text, places, tools, reasoning, thinks):
    text = text.replace("tc", "<tool_call>").replace("/k", "</think>").replace("na", '{"name": "')
    reading = form(tools, reasoning, is_thinking=thinks)
    reader, message = AnswerReader(reading), Message()
    for part in cut(text, places):
        for found in reader.push(part):
            message.add(found)
    for found in reader.finish():
        message.add(found)
    assert message == reading.read(text)


@given(places=st.lists(st.integers(0, 100), max_size=8))
def test_reasoning_is_what_stands_before(places):
    for text, thinks, expected in (
        ("<think>\nHm.\n</think>\n\nYes </think>.", False, ("Yes </think>.", "Hm.")),
        ("Hm <think>.</think>Yes", True, ("Yes", "Hm <think>.")),
        ("\n<think>never ends\n", False, ("", "never ends\n")),
        ("<thinking>", False, ("<thinking>", "")),
        (" plain ", False, (" plain ", "")),
        ("<think></think>", False, ("", "")),
    ):
        message = pieces(form(None, "think", is_thinking=thinks), cut(text, places))
        assert (message.content, message.reasoning) == expected
        hidden = form(None, "think", is_thinking=thinks, shows_reasoning=False).read(text)
        assert (hidden.content, hidden.reasoning) == (expected[0], "")


def test_reasoning_goes_before_calls():
    text = "<think>I look <tool_call></think>\n\n" + hermes("now", {})
    message = form("hermes", "think").read(text)
    assert message.reasoning == "I look <tool_call>" and message.calls == [("now", "{}")]
    both = "<|channel|>analysis<|message|>Hm.<|end|>" + openai("now", {"a": 1})
    message = form("openai", "openai").read(both)
    assert message == Message("", "Hm.", [("now", '{"a": 1}')])
    final = "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|channel|>final<|message|>A"
    assert form(None, "openai").read(final) == Message("A", "Hm.", [])


def test_what_is_asked_of_an_answer_begins_behind_reasoning():
    assert form("hermes", "think", is_thinking=True).free_until == "</think>"
    assert form("hermes", "think").free_until == form("hermes", is_thinking=True).free_until == ""
    assert form(None, "openai").free_until == "<|channel|>final<|message|>"
    forced = form("openai", "openai", is_forced=True, named="now")
    text = "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|channel|>final<|message|>{}"
    assert forced.read(text) == Message("", "Hm.", [("now", "{}")])


def test_without_parallel_calls_the_first_is_told():
    text = "Hm. " + hermes("now", {}) + hermes("get_weather", PARIS) + " Done."
    message = form("hermes", is_parallel=False).read(text)
    assert message.calls == [("now", "{}")] and message.content == "Hm.Done."


def test_what_was_made_to_be_calls_is_read_without_markup():
    named = form(None, is_forced=True, named="now").read('{"a": 1}')
    assert named.calls == [("now", '{"a": 1}')]
    text = json.dumps([{"name": "now", "arguments": {}},
                       {"name": "get_weather", "arguments": PARIS}])  # fmt: skip
    message = form(None, "think", is_forced=True).read(text)
    assert [name for name, _ in message.calls] == ["now", "get_weather"]
    assert json.loads(message.calls[1][1]) == PARIS and message.content == ""


@pytest.mark.parametrize(
    ("written", "told"),
    [
        ('{"arguments": {"a": 1}, "name": "now"}', ("now", '{"a": 1}')),
        ('{"name": "now", "parameters": {"a": 1}}', ("now", '{"a": 1}')),
        ('{"name": "now", "arguments": "{\\"a\\": 1}"}', ("now", '{"a": 1}')),
        ('{"id": 7, "name": "now", "arguments": {}, "x": [1, {}]}', ("now", "{}")),
        ('{"name": "now"}', ("now", "")),
    ],
)
def test_json_calls_in_other_words(written, told):
    text = f"<tool_call>{written}</tool_call>"
    assert form("hermes").read(text) == Message("", "", [told])
    assert pieces(form("hermes"), list(text)) == Message("", "", [told])


def test_markup_around_what_is_no_call_is_content():
    for inner in ("hello", "{}", '{"name": 3}', "[1]", '{"nom": "x"}'):
        text = f"Look: <tool_call>{inner}</tool_call>"
        message = form("hermes").read(text)
        assert message.calls == [] and message.content.replace(" ", "") == text.replace(" ", "")


def test_values_without_quotes_become_what_their_schema_says():
    arguments = {"city": "12", "days": 3, "unit": None, "where": {"x": [True]}, "more": "4"}
    for way in (qwen3_coder, glm45):
        _, told = form(way.__name__).read(way("get_weather", arguments)).calls[0]
        assert json.loads(told) == arguments
    text = qwen3_coder("get_weather", {"unit": "12", "days": "None"})
    told = form("qwen3_coder").read(text).calls[0][1]
    assert json.loads(told) == {"unit": "12", "days": None}
    bare = "<function=now>\n</function>"  # the outer tags may be missing
    assert form("qwen3_coder").read(bare).calls == [("now", "{}")]


class Words:
    """A tokenizer of a template; marks among `special` are left out of texts."""

    def __init__(self, template: str | None, special: tuple[str, ...] = ()) -> None:
        self._template = template
        self._special = special

    def facts(self) -> dict[str, Any]:
        return {"chat_template": self._template}

    def encode(self, text, *, add_special_tokens=True, at_most=None):
        return [1] if text in self._special else [2, 3]

    def decode(self, token_ids, *, skip_special_tokens=True):
        return "" if token_ids == [1] and skip_special_tokens else "x"


@pytest.mark.parametrize(
    ("template", "tools", "reasoning"),
    [
        ("{{ '<tool_call>' }}", "hermes", None),
        ("<tool_call> ... '</think>'", "hermes", "think"),
        ("<tool_call>\n<function=", "qwen3_coder", None),
        ("<think></think><tool_call>{{ name }}<arg_key>", "glm45", "think"),
        ("</think> <｜tool▁calls▁begin｜><｜tool▁call▁begin｜>", "deepseek_v3", "think"),
        ("<|channel|>analysis", "openai", "openai"),
        ("{{ messages }}", None, None),
        (None, None, None),
    ],
)
def test_parsers_are_chosen_by_the_template(template, tools, reasoning):
    assert choose_parsers(Words(template)) == AnswerParsers(tools, reasoning)
    assert choose_parsers(Words(template), "none", "none") == AnswerParsers()
    assert choose_parsers(Words(template), "glm45", "qwen3") == AnswerParsers("glm45", "think")


def test_marks_that_texts_leave_out_are_shown_to_the_parser():
    parsers = choose_parsers(Words("<｜tool▁call▁begin｜>", ("<｜tool▁call▁begin｜>",)))
    assert parsers.shows_special
    assert AnswerForm(parsers, TOOLS).shows_special and not AnswerForm(parsers).shows_special
    assert not choose_parsers(Words("<tool_call>")).shows_special
