"""What messages look like when templates get them: as each template wants them, found by trying."""

from typing import Any

import pytest

from windlass.engine.chat_template import ChatTemplate
from windlass.errors import RequestError

PARTS = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
USER = {"role": "user", "content": "hi"}
ANSWER = {"role": "tool", "content": "22", "tool_call_id": "call00001"}
# whether a template takes parts: by a macro, as GLM and MiniMax do; by a loop; not at all
MACRO = """{% macro text(content) %}{% if content is string %}{{ content }}{% else %}
{%- for item in content %}{{ item.text if item is mapping else item }}{% endfor %}
{%- endif %}{% endmacro %}{% for m in messages %}[{{ m.role }}]{{ text(m.content) }}{% endfor %}"""
LOOP = """{% for m in messages %}[{{ m.role }}]{% if m.role == 'user' and m.content is not string %}
{%- for part in m.content %}<{{ part['text'] }}>{% endfor %}
{%- else %}{{ m.content }}{% endif %}{% endfor %}"""
PLAIN = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
FIRST = "{% for m in messages %}{{ m.content if m.content is string else m.content[0].text }}" \
        "{% endfor %}"  # fmt: skip


def render(template: str, *messages: dict[str, Any], **options: Any) -> str:
    return ChatTemplate({"default": template}, {}).render(messages, **options)


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (MACRO, "[system]onetwo[user]onetwo"),
        (LOOP, "[system]one\ntwo[user]<one><two>"),
        (PLAIN, "[system]one\ntwo[user]one\ntwo"),
        (FIRST, "one\ntwoone\ntwo"),
        ("{% for m in messages %}{{ m.content | tojson }}{% endfor %}", r'"one\ntwo""one\ntwo"'),
    ],
)
def test_parts_reach_templates_that_walk_over_them(template: str, expected: str) -> None:
    roles = [{"role": role, "content": PARTS} for role in ("system", "user")]
    assert render(template, *roles) == expected
    given = ["one", {**PARTS[1], "cache_control": {"type": "ephemeral"}}]
    assert render(template, *({**one, "content": given} for one in roles)) == expected


def test_answers_of_tools_may_have_parts() -> None:
    call = {"role": "assistant", "content": "", "tool_calls": [called({})]}
    answer = {**ANSWER, "content": PARTS}
    assert render(MACRO, USER, call, answer).endswith("[tool]onetwo")
    assert render(PLAIN, USER, call, answer).endswith("[tool]one\ntwo")


def test_a_part_that_is_no_text_is_refused() -> None:
    for part in ({"type": "image_url", "image_url": {}}, 3, {"type": "text"}, {}):
        with pytest.raises(RequestError, match="content: got the part") as caught:
            render(MACRO, {"role": "user", "content": [part]})
        assert caught.value.param == "messages"
    assert render(PLAIN, {"role": "user", "content": []}) == "[user]"


def called(arguments: Any) -> dict[str, Any]:
    function = {"name": "find", "arguments": arguments}
    return {"id": "call00001", "type": "function", "function": function}


CALLS = (
    "{%% for m in messages %%}%s{%% for call in m.tool_calls or [] %%}%s"
    "{%% endfor %%}{%% endfor %%}"
)
ARGUMENTS = "call.function.arguments"
# how templates write the arguments: DeepSeek-R1, Qwen, GLM, Llama, gpt-oss
TEXT = "{{ '```json\\n' + " + ARGUMENTS + " }}"
JSON = "{{ " + ARGUMENTS + " | tojson }}"
WALK = "{% for key, value in " + ARGUMENTS + ".items() %}<{{ key }}>{{ value }}{% endfor %}"
EITHER = (
    f"{{% if {ARGUMENTS} is string %}}text{{% else %}}{{{{ {ARGUMENTS} | tojson }}}}{{% endif %}}"
)
BARE = "{{ " + ARGUMENTS + " }}"


@pytest.mark.parametrize(
    ("call", "expected"),
    [
        (TEXT, '```json\n{"city":"Köln"}'),
        (JSON, '{"city": "Köln"}'),
        (WALK, "<city>Köln"),
        (EITHER, '{"city": "Köln"}'),
        (BARE, '{"city":"Köln"}'),
    ],
)
def test_arguments_reach_templates_as_they_want_them(call: str, expected: str) -> None:
    template = CALLS % ("", call)
    as_text, as_object = '{"city":"Köln"}', {"city": "Köln"}
    for given in (as_text, as_object):
        message = {"role": "assistant", "content": None, "tool_calls": [called(given)]}
        # what was given as an object has JSON's usual spaces
        wanted = expected.replace('":"', '": "') if given is as_object else expected
        assert render(template, USER, message, ANSWER) == wanted
    with pytest.raises(RequestError, match="arguments: got '{', allowed a JSON object"):
        render(template, {"role": "assistant", "content": None, "tool_calls": [called("{")]})
    empty = {"role": "assistant", "content": None, "tool_calls": [called(None)]}
    assert render(template, USER, empty, ANSWER) in ("", "{}", "```json\n{}")


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        # DeepSeek-R1 shows calls only where there is no content
        ("{% if m.role == 'assistant' and m.content is none %}none{% endif %}", "none{}"),
        # Qwen3 looks into it, GLM would write Python's word, LFM2 JSON's
        ("{{ 'yes' if '</think>' in m.content else 'no' }}", "nono{}no"),
        ("{{ m.content }}", "hi{}22"),
        ("{{ m.content | tojson }}", '"hi"""{}"22"'),
        ("{{ '[%s]' % m.content if m.content is defined else '' }}", "[hi][]{}[22]"),
    ],
)
def test_no_content_is_none_unless_the_template_would_write_it(content: str, expected: str) -> None:
    template = CALLS % (content, JSON)
    message = {"role": "assistant", "content": None, "tool_calls": [called("{}")]}
    assert render(template, USER, message, ANSWER) == expected


def test_reasoning_has_all_three_names() -> None:
    template = (
        "{% for m in messages %}{{ m.reasoning_content }}{{ m.reasoning }}{{ m.thinking }}"
        "{% endfor %}"
    )
    for name in ("reasoning", "reasoning_content", "thinking"):
        assert render(template, {"role": "assistant", "content": "x", name: "hm"}) == "hmhmhm"


def test_documents_are_variables() -> None:
    template = "{{ documents is none }}{{ documents[0].text if documents }}"
    assert render(template, USER) == "True"
    assert render(template, USER, extra={"documents": [{"text": "x"}]}) == "Falsex"
