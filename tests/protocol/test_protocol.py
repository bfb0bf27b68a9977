"""Bodies of the two endpoints: what is accepted, what is refused and how, what comes back."""

import json
from pathlib import Path
from typing import Any

import pytest
from openai.types import Completion
from openai.types.chat import ChatCompletion

from fake_engine import FakeEngine, FakeTokenizer, _fake_logprobs
from tokenizers_for_tests import byte_level
from windlass.engine.outputs import CompletionOutput, Logprob, RequestOutput
from windlass.engine.request import Request
from windlass.engine.tokenizer import load as load_tokenizer
from windlass.errors import RequestError
from windlass.params import SamplingParams
from windlass.protocol.openai import (
    MAX_SEQUENCES,
    ApiRequest,
    Endpoint,
    ServedModel,
    parse_body,
)
from windlass.protocol.responses import error_response, response_body

HELLO = [{"role": "user", "content": "hello"}]
CALL_ME = {"type": "function", "function": {"name": "find_it", "parameters": {}}}


def served(**changes: Any) -> ServedModel:
    fields: dict[str, Any] = {
        "names": ("m", "path/m"),
        "tokenizer": FakeTokenizer(),
        "max_model_len": 100,
        "default_params": SamplingParams(temperature=0.5, top_k=7, max_tokens=None),
    }
    return ServedModel(**{**fields, **changes})


def chat(on: ServedModel | None = None, /, **fields: Any) -> ApiRequest:
    return parse_body(Endpoint.CHAT, {"messages": HELLO, **fields}, on or served())


def complete(on: ServedModel | None = None, /, **fields: Any) -> ApiRequest:
    return parse_body(Endpoint.COMPLETIONS, {"prompt": "hello", **fields}, on or served())


def answer(request: ApiRequest) -> dict[str, Any]:
    engine = FakeEngine(capacity=100)
    outputs = {}
    for i, prompt in enumerate(request.prompts):
        engine.add(Request(str(i), prompt.token_ids, prompt.params, "key"))
    while engine.has_work:
        outputs.update({output.request_id: output for output in engine.step().finished})
    ordered = [outputs[str(i)] for i in range(len(outputs))]
    return response_body(request, ordered, key="k1", created=1790000000)


def test_chat_renders_the_template_and_takes_the_rest_of_the_context() -> None:
    request = chat()
    assert bytes(request.prompts[0].token_ids) == b"<user>hello\n<assistant>"
    assert request.prompts[0].params.max_tokens == 100 - 23
    assert len(request.prompts) == 1


def test_completion_defaults_to_16_tokens_but_never_more_than_fit() -> None:
    assert complete().prompts[0].params.max_tokens == 16
    assert complete(prompt="x" * 90).prompts[0].params.max_tokens == 9
    assert complete().prompts[0].token_ids[0] == 256  # BOS
    assert complete(add_special_tokens=False).prompts[0].token_ids[0] == ord("h")


def test_sampling_fields_reach_the_parameters_and_null_means_default() -> None:
    params = chat(
        temperature=0, top_p=0.9, top_k=None, min_p=0.1, seed=5, n=3, stop="END",
        logit_bias={"4": -7},
        presence_penalty=1, frequency_penalty=-1, repetition_penalty=1.5, min_tokens=2,
        stop_token_ids=[9], ignore_eos=True, include_stop_str_in_output=True,
        skip_special_tokens=False, max_tokens=40,
    ).prompts[0].params  # fmt: skip
    assert (params.temperature, params.top_p, params.top_k, params.min_p) == (0, 0.9, 7, 0.1)
    assert (params.seed, params.n, params.stop, params.logit_bias) == (5, 3, ("END",), {4: -7})
    assert (params.presence_penalty, params.frequency_penalty) == (1, -1)
    assert (params.repetition_penalty, params.min_tokens, params.stop_token_ids) == (1.5, 2, (9,))
    assert params.ignore_eos and params.include_stop_str_in_output
    assert not params.skip_special_tokens
    assert params.max_tokens == 40
    assert chat().prompts[0].params.temperature == 0.5


def test_fields_without_effect_are_accepted() -> None:
    chat(user="u", metadata={"a": "b"}, store=True, service_tier="auto", stream=False, tools=None)
    complete(user="u", echo=False, suffix=None, best_of=2, n=2, response_format={"type": "text"})


@pytest.mark.parametrize(
    ("fields", "param", "text"),
    [
        ({"stream": True}, "stream", "allowed only false"),
        ({"stream_options": {}}, "stream_options", "only with stream"),
        ({"temprature": 1}, "temprature", "did you mean temperature?"),
        ({"audio": {}}, "audio", "not supported"),
        ({"echo": True}, "echo", "not supported"),
        ({"temperature": "hot"}, "temperature", "allowed a number"),
        ({"temperature": -1}, "temperature", "from 0"),
        ({"temperature": True}, "temperature", "allowed a number"),
        ({"top_p": 0}, "top_p", "above 0"),
        ({"n": 0}, "n", "integer"),
        ({"n": 1.0}, "n", "integer"),
        ({"max_tokens": 0}, "max_tokens", "at least 1"),
        ({"max_tokens": "9"}, "max_tokens", "an integer"),
        ({"max_completion_tokens": True}, "max_completion_tokens", "an integer"),
        ({"max_tokens": 3, "max_completion_tokens": 4}, "max_tokens", "differs"),
        ({"min_tokens": 9, "max_tokens": 3}, "min_tokens", "at most max_tokens"),
        ({"stop": [1]}, "stop", "list of strings"),
        ({"logit_bias": {"x": 1}}, "logit_bias", "token id"),
        ({"logprobs": 3}, "logprobs", "true or false"),
        ({"top_logprobs": 3}, "top_logprobs", "only with logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "0 to 20"),
        ({"structured_outputs": {"regex": 1}}, "structured_outputs.regex", "a text"),
        ({"tools": [{"type": "x"}]}, "tools[0]", "type 'function'"),
        ({"tool_choice": "required"}, "tool_choice", "with tools"),
        ({"tool_choice": "auto"}, "tool_choice", "with tools"),
        ({"use_beam_search": True}, "use_beam_search", "allowed only false"),
        ({"priority": 3}, "priority", "allowed only 0"),
        ({"best_of": 2}, "best_of", "allowed only the value of n"),
        ({"functions": [{"name": "f"}]}, "functions", "allowed tools"),
        ({"continue_final_message": True}, "messages", "an assistant's text"),
        ({"continue_final_message": True, "add_generation_prompt": True}, "continue_final_message",
         "only without"),
        ({"truncate_prompt_tokens": 0}, "truncate_prompt_tokens", "allowed -1"),
        ({"user": 5}, "user", "a string"), ({"metadata": "x"}, "metadata", "an object"),
        ({"reasoning_effort": 3}, "reasoning_effort", "a string"),
        ({"model": 3}, "model", "a string"),
        ({"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs", "not a template"),
        ({"chat_template_kwargs": {"raise": True}}, "messages", "asked to"),
        ({"messages": None}, "messages", "missing"),
        ({"messages": []}, "messages", "at least one"),
        ({"messages": "hi"}, "messages", "an array"),
        ({"messages": ["hi"]}, "messages[0]", "an object"),
        ({"messages": [{"role": "user"}]}, "messages[0].content", "missing"),
        ({"messages": [{"role": "boss", "content": "x"}]}, "messages[0].role", "allowed system"),
        ({"messages": [{"content": "x"}]}, "messages[0].role", "missing"),
        ({"messages": [{"role": "user", "content": 3}]}, "messages[0].content", "a string"),
        ({"messages": [{"role": "user", "content": "x", "nmae": "y"}]}, "messages[0].nmae", "name"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
            "messages[0].content[0].type",
            "images",
        ),
        (
            {"messages": [*HELLO, {"role": "assistant", "tool_calls": [
                {"function": {"name": "f", "arguments": "{"}}]}]},
            "messages[1].tool_calls[0].function.arguments",
            "JSON object",
        ),
        ({"temperature": 10**400}, "temperature", "a number"),
    ],
)  # fmt: skip
def test_chat_refuses_and_names_the_field(
    fields: dict[str, Any], param: str | None, text: str
) -> None:
    with pytest.raises(RequestError, match=text) as caught:
        chat(**fields)
    assert caught.value.param == param
    assert error_response(caught.value)[0] == 400


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"prompt": None}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": {}}, "prompt"),
        ({"prompt": [""], "add_special_tokens": False}, "prompt"),
        ({"prompt": ["a", 3]}, "prompt"),
        ({"prompt": [True]}, "prompt"),
        ({"prompt": [[]]}, "prompt"),
        ({"echo": "yes"}, "echo"),
        ({"suffix": "x"}, "suffix"),
        ({"best_of": 2}, "best_of"),
        ({"logprobs": True}, "logprobs"),
        ({"logprobs": 21}, "logprobs"),
        ({"messages": HELLO}, "messages"),
        ({"max_completion_tokens": 3}, "max_completion_tokens"),
    ],
)
def test_completions_refuse_and_name_the_field(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(RequestError) as caught:
        complete(**fields)
    assert caught.value.param == param


def test_an_echo_asks_for_as_many_alternatives_of_the_prompt_and_for_no_ranks() -> None:
    def asked(**fields: Any) -> tuple[int | None, bool, int | None]:
        found = complete(**fields)
        params = found.prompts[0].params
        told = found.delivery.prompt_logprobs
        return params.prompt_logprobs, params.prompt_logprob_ranks, told

    assert asked(echo=True, logprobs=5) == (5, False, None)
    assert asked(echo=True, logprobs=0, max_tokens=0) == (0, False, None)
    assert asked(echo=True, logprobs=2, prompt_logprobs=4) == (4, True, 4)
    assert asked(prompt_logprobs=20, max_tokens=0) == (20, True, 20)
    for wrong in (21, -1, True):
        with pytest.raises(RequestError, match="prompt_logprobs: got .*, allowed .* from 0 to 20"):
            complete(prompt_logprobs=wrong)
    with pytest.raises(RequestError, match="max_tokens: got 0, allowed at least 1"):
        chat(prompt_logprobs=1, max_tokens=0)


def test_too_long_is_a_400_with_openais_code() -> None:
    for call, field in (
        (lambda: complete(prompt="x" * 99), "prompt"),
        (lambda: complete(prompt="x" * 50, max_tokens=50), "prompt"),
        (lambda: chat(max_completion_tokens=78), "messages"),
    ):
        with pytest.raises(RequestError, match="limit 100") as caught:
            call()
        status, body = error_response(caught.value)
        assert status == 400
        assert body["error"]["code"] == "context_length_exceeded"
        assert body["error"]["param"] == field
        assert body["error"]["type"] == "invalid_request_error"
    with pytest.raises(RequestError, match="limit 100, because$"):
        complete(served(limited_by="because"), prompt="x" * 99)
    assert complete(prompt="x" * 98).prompts[0].params.max_tokens == 1
    assert chat(max_tokens=77).prompts[0].params.max_tokens == 77


def test_the_sequences_of_one_body_are_limited() -> None:
    assert chat(n=MAX_SEQUENCES).prompts[0].params.n == 128
    assert len(complete(prompt=["a"] * 64, n=2).prompts) == 64
    for call, param, text in (
        (lambda: chat(n=129), "n", "n: got 129, allowed 128"),
        (lambda: complete(prompt=["a"] * 65, n=2), "prompt", "n: got 2 for each of 65 prompts"),
        (lambda: complete(prompt=[[5]] * 129), "prompt", "n: got 1 for each of 129 prompts"),
    ):
        with pytest.raises(RequestError, match=text) as caught:
            call()
        assert caught.value.param == param
        assert error_response(caught.value)[0] == 400


def test_model_is_any_served_name_or_absent_else_404() -> None:
    for name in ("m", "path/m", None):
        assert chat(model=name).model == "m"
    with pytest.raises(RequestError) as caught:
        chat(model="gpt-4")
    status, body = error_response(caught.value)
    assert (status, body["error"]["code"]) == (404, "model_not_found")


def seen_by_templates(*messages: dict[str, Any], **fields: Any) -> tuple[list[Any], Any]:
    """Messages and variables that reach the tokenizer."""
    seen: list[Any] = []

    class Spy(FakeTokenizer):
        def render_chat(self, messages: Any, *args: Any, **kwargs: Any) -> str:
            seen.extend([messages, kwargs["variables"]])
            return "x"

    chat(served(tokenizer=Spy()), messages=list(messages), **fields)
    return seen[0], seen[1]


def test_messages_are_shaped_for_templates() -> None:
    call = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    given = (
        {"role": "user", "content": [{**parts[0], "cache_control": {"type": "ephemeral"}}, "b"]},
        {"role": "assistant", "content": None, "reasoning_content": "hm", "tool_calls": [call]},
        {"role": "tool", "content": "2", "tool_call_id": "c1"},
    )
    assert seen_by_templates(*given)[0] == [{"role": "user", "content": parts}, *given[1:]]


def test_messages_as_servers_and_their_programs_write_them() -> None:
    """An answer sent back as it came, with all that servers and SDKs put beside its text."""
    answer = {
        "role": "assistant", "content": "4", "refusal": None, "annotations": [], "audio": None,
        "function_call": None, "tool_calls": None, "id": "msg_1", "cache_control": {"type": "x"},
        "reasoning": "r", "reasoning_details": [{"text": "r"}], "provider_specific_fields": {},
    }  # fmt: skip
    (shaped,), _ = seen_by_templates(answer)
    assert shaped["reasoning"] == "r" and "function_call" not in shaped and "audio" not in shaped
    old = {"role": "assistant", "content": None,
           "function_call": {"name": "f", "arguments": "{}"}}  # fmt: skip
    (shaped,), _ = seen_by_templates(old)
    function = {"name": "f", "arguments": "{}"}
    assert shaped["tool_calls"] == [{"type": "function", "function": function}]
    silent = {"role": "assistant", "content": None, "thinking": "hm", "refusal": "no"}
    assert seen_by_templates(silent)[0] == [silent]
    told = {"role": "assistant", "content": [{"type": "refusal", "refusal": "no"}]}
    assert seen_by_templates(told)[0][0]["content"] == [{"type": "text", "text": "no"}]
    # what only some templates read reaches them
    planned = {"role": "assistant", "content": "x", "tool_plan": "look"}
    assert seen_by_templates(planned)[0] == [planned]


def test_reasoning_effort_is_a_variable_of_the_template() -> None:
    hello = HELLO[0]
    assert seen_by_templates(hello, reasoning_effort="low")[1] == {"reasoning_effort": "low"}
    given = {"reasoning_effort": "high", "x": 1}
    _, variables = seen_by_templates(hello, reasoning_effort="low", chat_template_kwargs=given)
    assert variables == given


def test_fields_that_ask_for_nothing_are_accepted() -> None:
    for fields in (
        {"top_logprobs": 0, "logprobs": False}, {"top_logprobs": 0}, {"echo": False},
        {"best_of": 1}, {"best_of": 2, "n": 2}, {"use_beam_search": False}, {"priority": 0},
        {"parallel_tool_calls": True}, {"parallel_tool_calls": False}, {"stream": False},
        {"tools": [], "tool_choice": "auto"}, {"tools": [], "parallel_tool_calls": False},
        {"functions": [], "function_call": "auto"}, {"length_penalty": 1.0},
        {"modalities": ["text"]}, {"stream_options": None}, {"reasoning_effort": None},
        {"return_token_ids": False, "include_reasoning": True, "add_special_tokens": False},
    ):  # fmt: skip
        assert chat(**fields).prompts == chat(n=fields.get("n")).prompts, fields
    assert complete(use_beam_search=False, priority=0, echo=False, best_of=1).prompts
    tools = FakeTokenizer()
    tools.takes_tools = True
    model = served(tokenizer=tools, max_model_len=400)
    assert chat(model, tools=[CALL_ME], parallel_tool_calls=True).prompts


def test_a_checkpoints_own_length_is_a_default_and_no_ceiling() -> None:
    model = served(default_params=SamplingParams(max_tokens=30))
    assert chat(model).prompts[0].params.max_tokens == 30
    assert complete(model).prompts[0].params.max_tokens == 30
    assert chat(model, max_tokens=70).prompts[0].params.max_tokens == 70
    assert complete(model, prompt="x" * 90).prompts[0].params.max_tokens == 9


def test_tools_need_a_template_that_takes_them() -> None:
    tools = [CALL_ME]
    with pytest.raises(RequestError, match="does not take tools") as caught:
        chat(tools=tools)
    assert caught.value.param == "tools"
    able = FakeTokenizer()
    able.takes_tools = True
    model = served(tokenizer=able, max_model_len=400)
    assert b"find_it" in bytes(chat(model, tools=tools, tool_choice="auto").prompts[0].token_ids)
    none = chat(model, tools=tools, tool_choice="none").prompts[0].token_ids
    assert b"find_it" not in bytes(none)


def test_template_variables_and_generation_prompt_reach_the_template() -> None:
    ids = chat(chat_template_kwargs={"think": False}, add_generation_prompt=False).prompts[0]
    assert bytes(ids.token_ids).decode() == "<user>hello\n{'think': False}"


def test_no_name_of_a_template_variable_is_an_internal_error(tmp_path: Path) -> None:
    byte_level().save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "chat_template.jinja").write_text("{{ messages[0].content }}")
    model = served(tokenizer=load_tokenizer(tmp_path))
    for name in ("self", "cls", "variables", "text", "source", "extra", "args", ""):
        assert chat(model, chat_template_kwargs={name: 1}).prompts


def test_chat_body_is_openais() -> None:
    body = answer(chat(n=2, max_tokens=5))
    parsed = ChatCompletion.model_validate(json.loads(json.dumps(body)), strict=True)
    assert [choice.index for choice in parsed.choices] == [0, 1]
    assert parsed.choices[0].message.content != parsed.choices[1].message.content
    assert parsed.usage is not None
    assert parsed.usage.prompt_tokens == 23
    assert parsed.usage.total_tokens == 23 + parsed.usage.completion_tokens
    assert body["id"] == "chatcmpl-k1"
    assert body["choices"][0]["logprobs"] is None


def test_chat_logprobs() -> None:
    parsed = ChatCompletion.model_validate(
        answer(chat(logprobs=True, top_logprobs=2, max_tokens=4))
    )
    logprobs = parsed.choices[0].logprobs
    assert logprobs is not None and logprobs.content is not None
    assert len(logprobs.content) == parsed.usage.completion_tokens  # type: ignore[union-attr]
    step = logprobs.content[0]
    assert step.token == parsed.choices[0].message.content[0]  # type: ignore[index]
    assert (step.logprob, step.bytes) == (-3.0, [ord(step.token)])
    assert [(top.token, top.logprob) for top in step.top_logprobs] == [("t1", -1.0), ("t2", -2.0)]
    bare = ChatCompletion.model_validate(answer(chat(logprobs=True, max_tokens=4)))
    assert bare.choices[0].logprobs.content[0].top_logprobs == []  # type: ignore[union-attr,index]


def test_completion_body_numbers_prompts_and_choices() -> None:
    request = complete(prompt=["a", [104, 105], "c"], n=2, max_tokens=5, seed=3)
    assert request.prompts[1].token_ids == (104, 105)
    body = answer(request)
    parsed = Completion.model_validate(json.loads(json.dumps(body)))
    assert [choice.index for choice in parsed.choices] == list(range(6))
    assert parsed.usage is not None and parsed.usage.prompt_tokens == 6
    one = answer(complete(prompt=[104, 105], n=2, max_tokens=5, seed=3))
    assert [c["text"] for c in body["choices"][2:4]] == [c["text"] for c in one["choices"]]


def test_completion_logprobs() -> None:
    body = answer(complete(logprobs=2, max_tokens=4))
    Completion.model_validate(body)
    logprobs = body["choices"][0]["logprobs"]
    text = body["choices"][0]["text"]
    assert "".join(logprobs["tokens"]) == text
    assert logprobs["text_offset"] == list(range(len(text)))
    assert logprobs["token_logprobs"] == [-3.0] * len(text)
    assert logprobs["top_logprobs"][0] == {"t1": -1.0, "t2": -2.0, text[0]: -3.0}


def test_impossible_candidates_are_json_numbers() -> None:
    body = answer(chat(logprobs=True, top_logprobs=6, max_tokens=3))
    text = json.dumps(body, allow_nan=False)
    assert "-9999.0" in text


def test_text_offset_counts_characters_and_unknown_tokens_have_a_name() -> None:
    tokens = (228, 5)
    steps = _fake_logprobs(tokens, 0)
    assert steps is not None
    nameless = {5: steps[1][5]._replace(decoded_token=None)}
    output = CompletionOutput(
        index=0, text="ä?", token_ids=tokens, logprobs=(steps[0], nameless), finish_reason="stop"
    )
    request = complete(logprobs=0, max_tokens=2)
    body = response_body(
        request,
        [RequestOutput(request_id="0", prompt=None, prompt_token_ids=(1,), outputs=(output,))],
        key="k",
        created=1,
    )
    logprobs = body["choices"][0]["logprobs"]
    assert logprobs["tokens"] == ["ä", "token_id:5"]
    assert logprobs["text_offset"] == [0, 1]


def test_parts_of_characters_keep_their_bytes_and_their_names() -> None:
    pieces = {1: b"\xe4", 2: b"\xbd\xa0", 3: b"\xe5", 4: b"ok", 5: b"\xe6\xb0"}

    def candidate(token: int, logprob: float) -> Logprob:
        data = pieces[token]
        return Logprob(logprob, 1, data.decode(errors="replace"), data)

    steps = tuple(
        {token: candidate(token, -1.0), 3: candidate(3, -2.0), 5: candidate(5, -3.0)}
        for token in (1, 2, 4)
    )
    output = RequestOutput(
        request_id="0",
        prompt=None,
        prompt_token_ids=(1,),
        outputs=(
            CompletionOutput(
                index=0, text="你ok", token_ids=(1, 2, 4), logprobs=steps, finish_reason="stop"
            ),
        ),
    )
    content = response_body(
        chat(logprobs=True, top_logprobs=3, max_tokens=3), [output], key="k", created=1
    )["choices"][0]["logprobs"]["content"]
    assert bytes(byte for step in content for byte in step["bytes"]).decode() == "你ok"
    assert [top["bytes"] for top in content[0]["top_logprobs"]] == [[0xE4], [0xE5], [0xE6, 0xB0]]
    logprobs = response_body(complete(logprobs=3, max_tokens=3), [output], key="k", created=1)[
        "choices"
    ][0]["logprobs"]
    assert logprobs["tokens"] == [r"bytes:\xe4", r"bytes:\xbd\xa0", "ok"]
    assert logprobs["top_logprobs"][0] == {
        r"bytes:\xe4": -1.0, r"bytes:\xe5": -2.0, r"bytes:\xe6\xb0": -3.0,
    }  # fmt: skip
    assert logprobs["text_offset"] == [0, 0, 1]
