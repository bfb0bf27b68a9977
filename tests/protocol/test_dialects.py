"""`/v1/responses` and `/v1/messages`: what of a chat their bodies are, and what is written of an
answer. However its text is cut into pieces, the same is told, and whole answers say it too."""

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest

from fake_engine import FakeTokenizer, _fake_logprobs
from windlass.engine.outputs import CompletionOutput, RequestOutput
from windlass.engine.request import Delta
from windlass.errors import RequestError
from windlass.params import SamplingParams
from windlass.protocol import anthropic_request, response_request
from windlass.protocol.answers import AnswerParsers
from windlass.protocol.anthropic_writer import MessageWriter
from windlass.protocol.dialect import renamed
from windlass.protocol.kept_responses import KeptResponses
from windlass.protocol.openai import ApiRequest, ServedModel
from windlass.protocol.response_writer import ResponseWriter

PARAMETERS = {"type": "object", "properties": {"city": {"type": "string"}}}
FLAT = {"type": "function", "name": "find", "parameters": PARAMETERS}
NESTED = {"type": "function", "function": {"name": "find", "parameters": PARAMETERS}}
CALL = '<tool_call>\n{"name": "find", "arguments": {"city": "Rome"}}\n</tool_call>'
ANSWER = f"<think>\nHm.\n</think>\n\nI look.\n{CALL}\n{CALL}"


class JsonTokenizer(FakeTokenizer):
    """Its template writes what it was given."""

    def render_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        **more: Any,
    ) -> str:
        return json.dumps({"messages": messages, "tools": tools, "variables": more["variables"]})


MODEL = ServedModel(
    ("m",), JsonTokenizer(), 4000, SamplingParams(temperature=0.5, max_tokens=None),
    parsers=AnswerParsers("hermes", "think"),
)  # fmt: skip


def shown(api: ApiRequest) -> dict[str, Any]:
    """What the template got."""
    found: dict[str, Any] = json.loads(bytes(api.prompts[0].token_ids))
    return found


def response(body: dict[str, Any], kept: KeptResponses | None = None) -> ApiRequest:
    found = response_request.read_response(body, MODEL, "k", kept or KeptResponses())
    return found.api


def message(body: dict[str, Any], **more: Any) -> ApiRequest:
    asked = {"max_tokens": 9, **body} if not more else body
    return anthropic_request.read_messages_body(asked, MODEL, **more)


def test_items_are_the_messages_of_a_chat() -> None:
    items: list[Any] = [
        {"role": "developer", "content": "Short."},
        {"type": "message", "role": "user", "id": None, "status": "completed",
         "content": [{"type": "input_text", "text": "Where?"}]},
        {"type": "reasoning", "id": "rs_1", "summary": [], "encrypted_content": None,
         "content": [{"type": "reasoning_text", "text": "Hm."}]},
        {"type": "message", "role": "assistant", "id": "msg_1", "content": [
            {"type": "output_text", "text": "I look.", "annotations": [], "logprobs": []}]},
        {"type": "function_call", "call_id": "c1", "name": "find", "arguments": '{"a": 1}'},
        {"type": "function_call", "call_id": "c2", "name": "find", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "c1", "output": "Rome"},
        {"type": "function_call_output", "call_id": "c2",
         "output": [{"type": "input_text", "text": "Oslo"}]},
        {"role": "user", "content": "So?"},
    ]  # fmt: skip
    api = response({"input": items, "instructions": "Kind.", "tools": [FLAT], "user": None})
    calls = [
        {"id": f"c{i}", "type": "function", "function": {"name": "find", "arguments": text}}
        for i, text in ((1, '{"a": 1}'), (2, "{}"))
    ]
    assert shown(api)["messages"] == [
        {"role": "system", "content": "Kind.\n\nShort."},
        {"role": "user", "content": [{"type": "text", "text": "Where?"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "I look."}],
         "reasoning_content": "Hm.", "tool_calls": calls},
        {"role": "tool", "tool_call_id": "c1", "content": "Rome"},
        {"role": "tool", "tool_call_id": "c2", "content": [{"type": "text", "text": "Oslo"}]},
        {"role": "user", "content": "So?"},
    ]  # fmt: skip
    assert shown(api)["tools"] == [NESTED]
    plain = shown(response({"input": "hi", "instructions": "Kind."}))
    assert plain["messages"] == [
        {"role": "system", "content": "Kind."}, {"role": "user", "content": "hi"}
    ]  # fmt: skip


def test_what_else_a_response_asks_is_what_a_chat_asks() -> None:
    schema = {"type": "json_schema", "name": "x", "schema": PARAMETERS, "strict": True}
    api = response(
        {"input": "hi", "max_output_tokens": 7, "temperature": 0.2, "top_p": 0.5, "seed": 3,
         "include": ["message.output_text.logprobs"], "top_logprobs": 4, "stream": True,
         "stream_options": {"include_obfuscation": False}, "text": {"format": schema},
         "reasoning": {"effort": "low", "summary": "auto"}, "truncation": "auto",
         "tool_choice": "auto", "background": False, "conversation": None}
    )  # fmt: skip
    params = api.prompts[0].params
    assert (params.max_tokens, params.temperature, params.top_p) == (7, 0.2, 0.5)
    assert (params.seed, params.logprobs, api.delivery.stream) == (3, 4, True)
    assert params.structure is not None and json.loads(params.structure.text) == PARAMETERS
    assert shown(api)["variables"] == {"reasoning_effort": "low"}
    other = {**FLAT, "name": "other"}
    choice = {
        "type": "allowed_tools", "mode": "required", "tools": [{"type": "function", "name": "find"}]
    }  # fmt: skip
    for given, named in ((choice, None), ({"type": "function", "name": "find"}, "find")):
        body = {"input": "hi", "tools": [FLAT, other], "tool_choice": given}
        form = response({**body, "parallel_tool_calls": False}).form
        assert form.is_forced and form.named == named and not form.is_parallel
        assert set(form.tools) == ({"find"} if named is None else {"find", "other"})


@pytest.mark.parametrize(
    ("change", "param", "text"),
    [
        ({"inputs": "x"}, "inputs", "did you mean input"),
        ({"input": None}, "input", "missing"),
        ({"input": []}, "input", "not empty"),
        ({"input": [{"type": "web_search_call"}]}, "input[0].type", "allowed message"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "input[0].id", "no such item"),
        ({"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]},
         "input[0].content[0].type", "images"),
        ({"input": [{"type": "reasoning", "summary": [], "encrypted_content": "x"}]},
         "input[0].encrypted_content", "not readable"),
        ({"input": [{"type": "function_call", "call_id": "c", "name": "f", "arguments": "{"}]},
         "input[0].arguments", "JSON object"),
        ({"input": "x" * 5000}, "input", "limit 4000"),
        ({"background": True}, "background", "allowed only false"),
        ({"conversation": "conv_1"}, "conversation", "previous_response_id"),
        ({"previous_response_id": "resp_1"}, "previous_response_id", "is not kept"),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type", "'web_search'"),
        ({"tools": [NESTED]}, "tools[0].function", "not supported"),
        ({"tool_choice": "required"}, "tool_choice", "allowed with tools"),
        ({"tool_choice": {"type": "mcp"}}, "tool_choice.type", "allowed 'function'"),
        ({"max_output_tokens": 0}, "max_output_tokens", "at least 1"),
        ({"max_output_tokens": 9999}, "input", "limit 4000"),
        ({"text": {"format": {"type": "xml"}}}, "text.format.type", "json_object"),
        ({"text": {"form": {}}}, "text.form", "did you mean format"),
        ({"reasoning": {"effort": 3}}, "reasoning.effort", "a string"),
        ({"include": ["everything"]}, "include", "allowed message.output_text.logprobs"),
        ({"top_logprobs": 21}, "top_logprobs", "0 to 20"),
        ({"truncation": "cut"}, "truncation", "allowed 'disabled' or 'auto'"),
        ({"metadata": {"a": 1}}, "metadata", "metadata.a"),
        ({"n": 2}, "n", "not supported"),
    ],
)  # fmt: skip
def test_what_is_wrong_in_a_response(change: dict[str, Any], param: str, text: str) -> None:
    with pytest.raises(RequestError) as caught:
        response({"input": "hi", **change})
    error = renamed(caught.value, response_request.NAMES)
    assert error.param == param and text in str(error), str(error)


def test_blocks_are_the_messages_of_a_chat() -> None:
    result = {"type": "tool_result", "tool_use_id": "t1", "is_error": True}
    talk: list[Any] = [
        {"role": "user", "content": "Where?"},
        {"role": "assistant", "content": [
            {"type": "thinking", "thinking": "Hm.", "signature": "s"},
            {"type": "text", "text": "I look.", "citations": None},
            {"type": "tool_use", "id": "t1", "name": "find", "input": {"a": 1}}]},
        {"role": "user", "content": [
            {**result, "content": [{"type": "text", "text": "none"}]},
            {"type": "tool_result", "tool_use_id": "t2"},
            {"type": "text", "text": "So?", "cache_control": {"type": "ephemeral"}}]},
    ]  # fmt: skip
    system = [{"type": "text", "text": "Kind."}]
    tools = [{"name": "find", "input_schema": PARAMETERS, "type": "custom"}]
    body = {"messages": talk, "system": system, "tools": tools}
    call = {"id": "t1", "type": "function", "function": {"name": "find", "arguments": '{"a": 1}'}}
    found = shown(message(body))
    assert found["messages"] == [
        {"role": "system", "content": system},
        {"role": "user", "content": "Where?"},
        {"role": "assistant", "content": [{"type": "text", "text": "I look."}],
         "reasoning_content": "Hm.", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "t1", "is_error": True,
         "content": [{"type": "text", "text": "none"}]},
        {"role": "tool", "tool_call_id": "t2", "content": ""},
        {"role": "user", "content": [{"type": "text", "text": "So?"}]},
    ]  # fmt: skip
    assert found["tools"] == [NESTED]
    assert shown(message(body, counts=True)) == found


def test_what_else_a_message_asks_is_what_a_chat_asks() -> None:
    ask = {"messages": [{"role": "user", "content": "hi"}]}
    config = {"effort": "high", "format": {"type": "json_schema", "schema": PARAMETERS}}
    api = message(
        {**ask, "stop_sequences": ["a", "b"], "temperature": 1, "top_p": 0.5, "top_k": 3,
         "metadata": {"user_id": "x"}, "thinking": {"type": "enabled", "budget_tokens": 1024},
         "output_config": config, "service_tier": "auto", "context_management": {"edits": []}}
    )  # fmt: skip
    params = api.prompts[0].params
    assert (params.max_tokens, params.temperature, params.top_p, params.top_k) == (9, 1, 0.5, 3)
    assert params.stop == ("a", "b") and params.structure is not None
    assert json.loads(params.structure.text) == PARAMETERS
    variables = {"reasoning_effort": "high", "enable_thinking": True, "thinking": True}
    assert shown(api)["variables"] == variables
    off = message({**ask, "thinking": {"type": "disabled"}})
    assert shown(off)["variables"] == {"enable_thinking": False, "thinking": False}
    tools = [{"name": "find", "input_schema": PARAMETERS}]
    for choice, forced, named in (
        ({"type": "any", "disable_parallel_tool_use": True}, True, None),
        ({"type": "tool", "name": "find"}, True, "find"),
        ({"type": "auto", "disable_parallel_tool_use": True}, False, None),
    ):
        form = message({**ask, "tools": tools, "tool_choice": choice}).form
        assert (form.is_forced, form.named) == (forced, named)
        assert form.is_parallel == ("name" in choice)
    assert not message({**ask, "tools": tools, "tool_choice": {"type": "none"}}).form.tools


def _user(**block: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": [block]}]}


@pytest.mark.parametrize(
    ("change", "param", "text"),
    [
        ({"max_token": 3}, "max_token", "did you mean max_tokens"),
        ({"max_tokens": None}, "max_tokens", "missing"),
        ({"max_tokens": 0}, "max_tokens", "at least 1"),
        ({"messages": None}, "messages", "missing"),
        ({"messages": []}, "messages", "at least one"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].role", "assistant"),
        ({"messages": [{"role": "user"}]}, "messages[0].content", "missing"),
        (_user(type="image", source={}), "messages[0].content[0].type", "got 'image'"),
        (_user(type="tool_use", id="x"), "messages[0].content[0].type", "tool_result"),
        (_user(type="text", text=3), "messages[0].content[0].text", "a string"),
        ({"system": 3}, "system", "blocks"),
        ({"tools": [{"name": "f"}]}, "tools[0].input_schema", "missing"),
        ({"tools": [{"type": "bash_20250124", "name": "bash"}]}, "tools[0].type", "no tools run"),
        ({"tool_choice": {"type": "any"}}, "tool_choice", "allowed with tools"),
        ({"tool_choice": {"type": "all"}}, "tool_choice.type", "auto, any, none, tool"),
        ({"stop_sequences": [1]}, "stop_sequences", "stop_sequences"),
        ({"thinking": {"type": "enabled"}}, "thinking.budget_tokens", "missing"),
        ({"mcp_servers": [{}]}, "mcp_servers", "not supported"),
        ({"output_config": {"format": {"type": "text"}}}, "output_config.format.type",
         "json_schema"),
        ({"logprobs": True}, "logprobs", "not supported"),
    ],
)  # fmt: skip
def test_what_is_wrong_in_a_message(change: dict[str, Any], param: str, text: str) -> None:
    with pytest.raises(RequestError) as caught:
        message({"messages": [{"role": "user", "content": "hi"}], **change})
    error = renamed(caught.value, anthropic_request.NAMES)
    assert error.param == param and text in str(error), str(error)


def events_of(text: str) -> list[dict[str, Any]]:
    """Their data; each says its own name too."""
    found = []
    for one in filter(None, text.split("\n\n")):
        name, data = one.split("\n")
        found.append(json.loads(data.removeprefix("data: ")))
        assert name == f"event: {found[-1]['type']}"
    return found


def output_of(text: str, *, reason: str = "stop", **more: Any) -> RequestOutput:
    tokens = tuple(text.encode())
    choice = CompletionOutput(
        index=0, text=text, token_ids=tokens, finish_reason=reason,
        logprobs=_fake_logprobs(tokens, 1), **more,
    )  # fmt: skip
    return RequestOutput(
        request_id="r", prompt=None, prompt_token_ids=(1, 2), outputs=(choice,), num_cached_tokens=1
    )


def pieces_of(output: RequestOutput, size: int) -> list[Delta]:
    (one,) = output.outputs
    ends = range(0, len(one.text), size)
    deltas = [
        Delta("r", 0, one.text[i : i + size], one.token_ids[i : i + size],
              (one.logprobs or ())[i : i + size])
        for i in ends
    ]  # fmt: skip
    return [*deltas, Delta("r", 0, "", (), (), one.finish_reason, one.stop_reason)]


Make = Callable[[], "ResponseWriter | MessageWriter"]


def told(make: Make, output: RequestOutput, size: int) -> list[dict[str, Any]]:
    writer = make()
    text = writer.begin() + "".join(writer.piece(0, one) for one in pieces_of(output, size))
    return events_of(text + writer.end([output]))


def response_writer(kept: KeptResponses | None = None, **body: Any) -> Make:
    asked = {"input": "hi", "tools": [FLAT], **body}
    store = kept or KeptResponses()

    def make() -> ResponseWriter:
        read = response_request.read_response(asked, MODEL, "k", store)
        return ResponseWriter(read, key="k", count=len, keep=store.keep)

    return make


def message_writer(**body: Any) -> Make:
    tools = [{"name": "find", "input_schema": PARAMETERS}]
    api = message({"messages": [{"role": "user", "content": "hi"}], "tools": tools, **body})
    return lambda: MessageWriter(api, key="k", count=len)


def compact(events: Sequence[Mapping[str, Any]]) -> list[str]:
    """Their names; those of pieces once."""
    names = [event["type"].removeprefix("response.") for event in events]
    return [
        name for i, name in enumerate(names) if "delta" not in name or name not in names[i - 1 : i]
    ]


PART = ["content_part.added", "{0}.delta", "{0}.done", "content_part.done"]
ITEMS = {
    "reasoning": [one.format("reasoning_text") for one in PART],
    "message": [one.format("output_text") for one in PART],
    "function_call": ["function_call_arguments.delta", "function_call_arguments.done"],
}


@pytest.mark.parametrize("size", [1, 7, 1000])
def test_events_of_a_response_come_in_their_order(size: int) -> None:
    make, output = response_writer(), output_of(ANSWER)
    events = told(make, output, size)
    expected = ["created", "in_progress"]
    for kind in ("reasoning", "message", "function_call", "function_call"):
        expected += ["output_item.added", *ITEMS[kind], "output_item.done"]
    assert compact(events) == [*expected, "completed"]
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    final = events[-1]["response"]
    whole = make().body([output])
    for moment in (final, whole):
        assert moment.pop("completed_at") >= moment.pop("created_at")
    assert final == whole
    thought, said, *calls = final["output"]
    assert thought["content"] == [{"type": "reasoning_text", "text": "Hm."}]
    assert said["content"] == [
        {"type": "output_text", "text": "I look.", "annotations": [], "logprobs": []}
    ]
    assert [(call["name"], call["arguments"]) for call in calls] == [
        ("find", '{"city": "Rome"}')
    ] * 2
    assert len({one["id"] for one in final["output"]} | {one["call_id"] for one in calls}) == 6
    for i, item in enumerate(final["output"]):
        own = [event for event in events if event.get("output_index") == i]
        assert own[0]["item"]["status"] == "in_progress" and own[-1]["item"] == item
        assert all(event["item_id"] == item["id"] for event in own[1:-1])
        deltas = [event["delta"] for event in own if event["type"].endswith("delta")]
        assert "".join(deltas) == item.get("arguments", item.get("content", [{}])[0].get("text"))
    assert final["usage"] == {
        "input_tokens": 2, "input_tokens_details": {"cached_tokens": 1, "cache_write_tokens": 0},
        "output_tokens": len(ANSWER), "output_tokens_details": {"reasoning_tokens": 3},
        "total_tokens": len(ANSWER) + 2,
    }  # fmt: skip


def test_a_response_that_is_cut_says_so() -> None:
    for text, kinds in ((CALL[:-30], ["function_call"]), ("", ["message"]), ("Hi", ["message"])):
        *_, done, last = told(response_writer(), output_of(text, reason="length"), 3)
        final = last["response"]
        assert last["type"] == "response.incomplete" and done["item"]["status"] == "incomplete"
        assert final["status"] == "incomplete"
        assert final["incomplete_details"] == {"reason": "max_output_tokens"}
        assert [item["type"] for item in final["output"]] == kinds


def test_log_probabilities_of_a_response() -> None:
    wants = ["message.output_text.logprobs"]
    body: dict[str, Any] = {"include": wants, "top_logprobs": 1, "tools": None}
    output = output_of("Hi you")
    for size in (1, 4):
        events = told(response_writer(**body), output, size)
        steps = events[-1]["response"]["output"][0]["content"][0]["logprobs"]
        assert [step["token"] for step in steps] == list("Hi you")
        assert all(len(step["top_logprobs"]) == 1 for step in steps)
        deltas = [event for event in events if event["type"] == "response.output_text.delta"]
        assert [step for event in deltas for step in event["logprobs"]] == steps
    whole = response_writer(**body)().body([output])
    assert whole["output"][0]["content"][0]["logprobs"] == steps


@pytest.mark.parametrize("size", [1, 7, 1000])
def test_events_of_a_message_come_in_their_order(size: int) -> None:
    make, output = message_writer(), output_of(ANSWER)
    events = told(make, output, size)
    blocks = ["content_block_start", "content_block_delta", "content_block_stop"] * 4
    assert compact(events) == ["message_start", *blocks, "message_delta", "message_stop"]
    start = events[0]["message"]
    assert (start["content"], start["stop_reason"], start["usage"]["output_tokens"]) == (
        [],
        None,
        0,
    )
    assert start["usage"]["input_tokens"] > 2  # of the body: the output's prompt is made up
    whole = make().body([output])
    assert events[-2]["delta"] == {"stop_reason": "tool_use", "stop_sequence": None}
    assert events[-2]["usage"] == whole["usage"]
    assert whole["usage"]["output_tokens"] == len(ANSWER)
    assert whole["usage"]["output_tokens_details"] == {"thinking_tokens": 3}
    thought, said, *calls = whole["content"]
    assert thought["thinking"] == "Hm." and said == {"type": "text", "text": "I look."}
    assert [(call["name"], call["input"]) for call in calls] == [("find", {"city": "Rome"})] * 2
    for i, block in enumerate(whole["content"]):
        begun, *deltas, _ = [event for event in events if event.get("index") == i]
        made = begun["content_block"]
        if block["type"] == "tool_use":
            made["input"] = json.loads("".join(one["delta"]["partial_json"] for one in deltas))
        for one in deltas if block["type"] != "tool_use" else []:
            name = one["delta"]["type"].removesuffix("_delta")
            made[name] += one["delta"][name]
        assert made == block


def test_why_a_message_stops() -> None:
    for text, more, reason, sequence in (
        ("Hi", {}, "end_turn", None),
        ("Hi", {"stop_reason": "\n"}, "stop_sequence", "\n"),
        ("Hi", {"stop_reason": 7}, "end_turn", None),
        ("Hi", {"reason": "length"}, "max_tokens", None),
        (CALL[:-30], {"reason": "length"}, "max_tokens", None),
        ("", {"reason": "length"}, "max_tokens", None),
    ):
        output = output_of(text, **more)  # type: ignore[arg-type]
        whole = message_writer()().body([output])
        assert (whole["stop_reason"], whole["stop_sequence"]) == (reason, sequence)
        assert len(whole["content"]) == 1
        events = told(message_writer(), output, 3)
        assert events[-2]["delta"]["stop_reason"] == reason
    cut = message_writer()().body([output_of(CALL[:-30], reason="length")])
    assert cut["content"][0]["input"] == {}  # nobody takes half of it for whole


def test_responses_are_kept_within_bounds() -> None:
    kept = KeptResponses(most_bytes=5000)
    for number in range(9):
        kept.keep({"id": f"r{number}", "output": [{"id": f"o{number}"}]}, [{"text": "x" * 1000}])
        assert kept.find("r0") is not None  # used again and again
        if number == 5:
            assert kept.find("r1") is None and kept.find("r5") is not None
    kept.keep({"id": "large", "output": []}, [{"text": "x" * 5000}])
    assert kept.find("large") is None and kept.find("r8") is not None
    assert kept.find_item("o8") == {"id": "o8"} and kept.find_item("o") is None
    assert kept.forget("r8") and not kept.forget("r8") and kept.find("r8") is None
    kept.keep({"id": "r9", "output": []}, [{"text": "x" * 1000}])
    assert kept.find("r9") is not None
