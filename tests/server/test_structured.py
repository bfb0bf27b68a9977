"""Structured output and tools through the openai client, `run-batch` and `LLM`: one code, the same
answers. The model is the demo with a template that takes tools."""

import asyncio
import json
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import httpx2 as httpx
import openai
import pytest
from pydantic import BaseModel

from windlass import LLM
from windlass.build.open import open_engine
from windlass.cli import main
from windlass.engine.service import Service
from windlass.errors import RequestError
from windlass.options import EngineOptions, resolve_model
from windlass.protocol.answers import AnswerParsers, choose_parsers
from windlass.protocol.openai import ServedModel
from windlass.server.app import make_app
from windlass.server.state import Loaded, ServerLimits, make_state

TEMPLATE = """\
{% if tools %}<|im_start|>system
{% for tool in tools %}{{ tool | tojson }}
{% endfor %}Call as <tool_call>{"name": NAME, "arguments": ARGUMENTS}</tool_call>.<|im_end|>
{% endif %}{% for message in messages %}<|im_start|>{{ message.role }}
{{ message.content or '' }}{% for call in message.tool_calls or [] %}<tool_call>
{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}
</tool_call>{% endfor %}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% if think %}<think>
{% endif %}{% endif %}{# </think> #}"""

ASK: Any = [{"role": "user", "content": "What of the sea?"}]
WEATHER: Any = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather of a place.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "maxLength": 12},
                           "day": {"$ref": "#/$defs/Day"}},
            "required": ["city", "day"],
            "additionalProperties": False,
            "$defs": {"Day": {"type": "integer", "minimum": 1, "maximum": 31}},
        },
    },
}  # fmt: skip
NOW: Any = {"type": "function", "function": {"name": "now"}}
CALL = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Rome", "day": 3}}\n</tool_call>'


class Animal(BaseModel, extra="forbid"):
    kind: Literal["cat", "dog"]
    lives: int


class Zoo(BaseModel, extra="forbid"):
    animals: tuple[Animal, Animal]
    is_open: bool


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    for file in resolve_model("demo").iterdir():
        (path / file.name).symlink_to(file)
    (path / "chat_template.jinja").write_text(TEMPLATE)
    return path


class Client:
    """The openai client over the application, without a socket."""

    def __init__(self, service: Service, model: ServedModel, tokenizer: Any) -> None:
        state = make_state(model.names, ServerLimits())
        state.loaded = Loaded(service, model, tokenizer, {})
        self._app = make_app(state)

    def run(self, ask: Callable[[openai.AsyncOpenAI], Awaitable[Any]]) -> Any:
        async def work() -> Any:
            transport = httpx.ASGITransport(app=self._app)
            async with httpx.AsyncClient(transport=transport) as http:
                client = openai.AsyncOpenAI(
                    api_key="none", base_url="http://localhost/v1", http_client=http, max_retries=0
                )
                return await ask(client)

        return asyncio.run(work())

    def chat(self, **body: Any) -> Any:
        settings = {"model": "m", "messages": ASK, "max_tokens": 150, "seed": 5, **body}
        return self.run(lambda client: client.chat.completions.create(**settings))

    def streamed(self, **body: Any) -> list[Any]:
        settings = {"model": "m", "messages": ASK, "max_tokens": 150, "seed": 5, **body}

        async def ask(client: openai.AsyncOpenAI) -> list[Any]:
            stream = await client.chat.completions.create(**settings, stream=True)
            return [chunk async for chunk in stream]

        chunks: list[Any] = self.run(ask)
        return chunks


@pytest.fixture(scope="module")
def client(folder: Path) -> Iterator[Client]:
    options = EngineOptions(
        model=str(folder), host_memory=4 << 30, threads=1, max_num_seqs=8, max_model_len=512
    )
    engine = open_engine(options)
    parsers = choose_parsers(engine.tokenizer)
    assert parsers == AnswerParsers("hermes", "think")
    model = ServedModel(
        ("m",), engine.tokenizer, engine.max_model_len, engine.default_params, parsers=parsers
    )
    with Service(engine) as service:
        yield Client(service, model, engine.tokenizer)


def told(chunks: list[Any]) -> tuple[str, str, list[tuple[str, str]], str]:
    """Content, reasoning, calls and reason of a stream, as a client puts them together."""
    content = reasoning = ""
    calls: list[list[str]] = []
    reasons = [chunk.choices[0].finish_reason for chunk in chunks]
    assert reasons[:-1] == [None] * (len(chunks) - 1)
    for delta in (chunk.choices[0].delta for chunk in chunks):
        content += delta.content or ""
        more = delta.model_extra or {}
        assert more.get("reasoning") == more.get("reasoning_content")
        reasoning += more.get("reasoning") or ""
        for call in delta.tool_calls or ():
            if call.id is not None:  # the name comes first, and whole
                assert call.index == len(calls) and call.type == "function"
                calls.append([call.function.name, ""])
            else:
                assert call.function.name is None
            calls[call.index][1] += call.function.arguments
    return content, reasoning, [(name, text) for name, text in calls], reasons[-1]


def said(choice: Any) -> tuple[str, str, list[tuple[str, str]], str]:
    """The same of a whole answer."""
    message = choice.message
    calls = [(call.function.name, call.function.arguments) for call in message.tool_calls or ()]
    reasoning = (message.model_extra or {}).get("reasoning") or ""
    return message.content or "", reasoning, calls, choice.finish_reason


def test_parse_gives_the_users_own_model(client: Client) -> None:
    parsed = client.run(
        lambda c: c.chat.completions.parse(
            model="m", messages=ASK, response_format=Zoo, max_tokens=200, temperature=1.5, seed=1
        )
    ).choices[0]
    assert isinstance(parsed.message.parsed, Zoo) and parsed.finish_reason == "stop"
    body = {"type": "json_schema", "json_schema": {"name": "x", "schema": Zoo.model_json_schema()}}
    loose = client.chat(response_format=body, n=2, logprobs=True)
    for choice in loose.choices:
        Zoo.model_validate_json(choice.message.content)
    text = client.chat(response_format={"type": "text"}, max_tokens=9).choices[0].message.content
    assert text == client.chat(max_tokens=9).choices[0].message.content
    some = client.chat(response_format={"type": "json_object"}, max_tokens=40).choices[0]
    assert some.message.content.startswith("{")


@pytest.mark.parametrize("stream", [False, True])
def test_forced_calls_are_always_valid(client: Client, stream: bool) -> None:
    for choice, count in (
        ({"type": "function", "function": {"name": "get_weather"}}, 1),
        ("required", 1),
        ({"type": "function", "function": {"name": "now"}}, 1),
    ):
        for seed in range(2):
            body: dict[str, Any] = {
                "tools": [WEATHER, NOW], "tool_choice": choice, "parallel_tool_calls": False,
                "temperature": 1.3, "seed": seed,
            }  # fmt: skip
            found = said(client.chat(**body).choices[0])
            if stream:
                assert told(client.streamed(**body)) == found
            content, _, calls, reason = found
            assert reason == "tool_calls" and content == "" and len(calls) == count
            for name, text in calls:
                arguments = json.loads(text)
                if name == "get_weather":
                    assert set(arguments) == {"city", "day"} and 1 <= arguments["day"] <= 31
                else:
                    assert (name, arguments) == ("now", {})


def test_several_calls_may_be_required(client: Client) -> None:
    body: dict[str, Any] = {"tools": [NOW], "tool_choice": "required", "temperature": 0}
    answer = client.chat(**body, max_tokens=400).choices[0]
    assert answer.finish_reason == "tool_calls"
    calls = answer.message.tool_calls
    assert 1 <= len(calls) <= 16 and len({call.id for call in calls}) == len(calls)
    assert all(json.loads(call.function.arguments) == {} for call in calls)


def test_calls_of_free_will_are_read(client: Client) -> None:
    """A grammar stands for a model that calls by itself."""
    for text, content, calls in (
        (f"I look.\n{CALL}", "I look.", 1),
        (f"{CALL}\n{CALL}", "", 2),
        ("No need <of> it.", "No need <of> it.", 0),
    ):
        extra = {"structured_outputs": {"choice": [text]}}
        body: dict[str, Any] = {"tools": [WEATHER], "tool_choice": "auto", "extra_body": extra}
        found = said(client.chat(**body).choices[0])
        arguments = '{"city": "Rome", "day": 3}'
        expected = [("get_weather", arguments)] * calls
        assert found == (content, "", expected, "tool_calls" if calls else "stop")
        assert told(client.streamed(**body)) == found
        none = said(client.chat(**{**body, "tool_choice": "none"}).choices[0])
        assert none == (text, "", [], "stop")  # no tools, no calls
    extra = {"structured_outputs": {"choice": [f"{CALL}\n{CALL}"]}}
    one = said(client.chat(tools=[WEATHER], parallel_tool_calls=False, extra_body=extra).choices[0])
    assert len(one[2]) == 1 and one[0] == ""


def test_reasoning_is_told_apart_and_may_come_back(client: Client) -> None:
    for start, variables in (("<think>\n", {}), ("", {"think": True})):
        # what is asked of the answer begins behind the reasoning where the prompt has begun it
        extra: dict[str, Any] = {
            "structured_outputs": {"choice": [f"{start}Hm.\n</think>\n\nYes."]},
            "chat_template_kwargs": variables,
        }
        found = client.chat(extra_body=extra, max_tokens=60).choices[0]
        if not variables:
            assert said(found) == ("Yes.", "Hm.", [], "stop")
            message = found.message.model_dump(exclude_none=True)
            assert message["reasoning_content"] == "Hm."
            again = client.chat(messages=[*ASK, message, *ASK], max_tokens=3)
            assert again.choices[0].finish_reason in ("stop", "length")
            hidden = client.chat(extra_body={**extra, "include_reasoning": False})
            assert said(hidden.choices[0]) == ("Yes.", "", [], "stop")
        else:  # a model that never ends its reasoning never begins its answer
            assert found.finish_reason == "length" and not found.message.content
        assert told(client.streamed(extra_body=extra, max_tokens=60)) == said(found)


FLAT: Any = {"type": "function", **WEATHER["function"], "strict": True}


def responded(client: Client, *, stream: bool, **body: Any) -> Any:
    """An answer of `/v1/responses`: whole, or as the client's helper puts it together."""
    settings = {"model": "m", "input": "What of the sea?", "max_output_tokens": 150, **body}
    settings["extra_body"] = {"seed": 5, **body.get("extra_body", {})}

    async def ask(openai_client: openai.AsyncOpenAI) -> Any:
        if not stream:
            return await openai_client.responses.create(**settings)
        async with openai_client.responses.stream(**settings) as stream_of:
            events: list[Any] = [event async for event in stream_of]
        assert [event.sequence_number for event in events] == list(range(len(events)))
        return events[-1].response

    return client.run(ask)


@pytest.mark.parametrize("stream", [False, True])
def test_responses_call_tools_and_go_on(client: Client, stream: bool) -> None:
    body: dict[str, Any] = {"tools": [FLAT], "tool_choice": "required", "temperature": 1.3}
    first = responded(client, stream=stream, **body, parallel_tool_calls=False)
    (call,) = first.output
    arguments = json.loads(call.arguments)
    assert (call.name, call.status, first.status) == ("get_weather", "completed", "completed")
    assert set(arguments) == {"city", "day"} and 1 <= arguments["day"] <= 31
    result = {"type": "function_call_output", "call_id": call.call_id, "output": "Rain."}
    text = f"<think>\nHm.\n</think>\n\nI look.\n{CALL}"
    extra = {"structured_outputs": {"choice": [text]}}
    asked: dict[str, Any] = {"input": [result], "tools": [FLAT], "extra_body": extra}
    second = responded(client, stream=stream, previous_response_id=first.id, **asked)
    thought, said, call = second.output
    assert (thought.content[0].text, second.output_text) == ("Hm.", "I look.")
    assert call.arguments == '{"city": "Rome", "day": 3}'
    assert 0 < second.usage.output_tokens_details.reasoning_tokens < second.usage.output_tokens
    # the same conversation, sent whole
    talk = [{"role": "user", "content": "What of the sea?"}, first.output[0].model_dump(), result]
    third = responded(client, stream=stream, **{**asked, "input": talk})
    assert third.usage.input_tokens == second.usage.input_tokens
    kept = client.run(lambda c: c.responses.retrieve(second.id))
    assert kept.output_text == "I look." and kept.usage == second.usage
    assert [one.id for one in kept.output] == [one.id for one in second.output]
    items = client.run(lambda c: c.responses.input_items.list(second.id, order="asc"))
    assert [one.type for one in items.data] == ["message", "function_call", "function_call_output"]
    client.run(lambda c: c.responses.delete(second.id))
    with pytest.raises(openai.NotFoundError, match="is not kept"):
        client.run(lambda c: c.responses.retrieve(second.id))


def test_responses_parse_and_say_why_they_end(client: Client) -> None:
    parsed = client.run(
        lambda c: c.responses.parse(
            model="m",
            input=ASK,
            text_format=Zoo,
            max_output_tokens=200,
            temperature=1.5,
            extra_body={"seed": 1},
        )
    )
    assert isinstance(parsed.output_parsed, Zoo) and parsed.status == "completed"
    body: dict[str, Any] = {
        "instructions": "Short.", "include": ["message.output_text.logprobs"], "top_logprobs": 2,
        "max_output_tokens": 6, "extra_body": {"ignore_eos": True},
    }  # fmt: skip
    whole, streamed = (responded(client, stream=stream, **body) for stream in (False, True))
    assert whole.incomplete_details.reason == "max_output_tokens" and whole.status == "incomplete"
    assert whole.output[0].content[0].text == streamed.output[0].content[0].text
    assert len(whole.output[0].content[0].logprobs) == 6
    with pytest.raises(openai.BadRequestError) as caught:
        responded(client, stream=True, tools=[{"type": "web_search"}])
    assert caught.value.param == "tools[0].type"


def test_history_of_calls_is_accepted(client: Client) -> None:
    body: dict[str, Any] = {"tools": [WEATHER], "tool_choice": "required", "max_tokens": 200}
    first = client.chat(**body).choices[0].message
    told = {"role": "tool", "tool_call_id": first.tool_calls[0].id, "content": "Rain."}
    talk = [*ASK, first.model_dump(exclude_none=True), told]
    assert client.chat(messages=talk, tools=[WEATHER], max_tokens=4).choices[0].message.content


@pytest.mark.parametrize(
    ("body", "param", "text"),
    [
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "x"}}},
         "response_format.json_schema.schema", "missing"),
        ({"response_format": {"type": "json_schema", "json_schema": {
            "name": "x", "strict": True, "schema": {"type": "object", "uniqueItems": True}}}},
         "response_format", "uniqueItems"),
        ({"response_format": {"type": "structural_tag"}}, "response_format.type", "not supported"),
        ({"response_format": {"type": "xml"}}, "response_format.type", "json_object"),
        ({"extra_body": {"structured_outputs": {"regex": "a("}}}, "structured_outputs", "unclosed"),
        ({"extra_body": {"structured_outputs": {"structural_tag": "x"}}},
         "structured_outputs.structural_tag", "not supported"),
        ({"extra_body": {"structured_outputs": {"regex": "a"}},
          "response_format": {"type": "json_object"}}, "structured_outputs", "only without"),
        ({"tools": [NOW], "tool_choice": {"type": "function", "function": {"name": "new"}}},
         "tool_choice", "allowed now"),
        ({"tools": [NOW], "tool_choice": "any"}, "tool_choice", "required"),
        ({"tools": [NOW], "tool_choice": "required", "response_format": {"type": "json_object"}},
         "response_format", "only without tool_choice"),
        ({"tools": [{"type": "function", "function": {"name": "f", "parameters": {
            "type": "objct"}}}], "tool_choice": "required"}, "tools", "Invalid type"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_a_400_that_names_the_field(
    client: Client, body: dict[str, Any], param: str, text: str
) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat(**body)
    assert caught.value.param == param and text in caught.value.message, caught.value.message


def test_a_job_and_the_python_api_say_the_same(
    client: Client, folder: Path, tmp_path: Path
) -> None:
    named = {"name": "x", "schema": Zoo.model_json_schema(), "strict": True}
    schema = {"type": "json_schema", "json_schema": named}
    shared: dict[str, Any] = {"messages": ASK, "max_tokens": 150, "seed": 5, "temperature": 0.9}
    bodies: list[dict[str, Any]] = [
        {**shared, "response_format": schema},
        {**shared, "structured_outputs": {"regex": "[a-z]{4,20} [0-9]+!"}},
        {**shared, "tools": [WEATHER], "tool_choice": "required", "parallel_tool_calls": False},
        {**shared, "structured_outputs": {"choice": [f"I look.\n{CALL}"]}, "tools": [WEATHER]},
        {**shared, "structured_outputs": {"regex": "a("}},
    ]
    rows = [
        {"custom_id": str(i), "method": "POST", "url": "/v1/chat/completions", "body": body}
        for i, body in enumerate(bodies)
    ]
    (tmp_path / "in").write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = ["-i", str(tmp_path / "in"), "-o", str(tmp_path / "out"), "--model", str(folder)]
    code = main(["run-batch", *flags, "--host-memory", "4GiB", "--threads", "1"])
    assert code == 3  # the last row alone is wrong
    results = [json.loads(line)["response"] for line in (tmp_path / "out").read_text().splitlines()]
    assert [result["status_code"] for result in results] == [200] * 4 + [400]
    assert results[4]["body"]["error"]["param"] == "structured_outputs"
    for body, result in zip(bodies[:4], results, strict=False):
        own = {name: body[name] for name in body if name != "structured_outputs"}
        if "structured_outputs" in body:
            own["extra_body"] = {"structured_outputs": body["structured_outputs"]}
        message = client.chat(**own).choices[0].message
        other = result["body"]["choices"][0]["message"]
        assert message.content == other["content"]
        calls = [call["function"] for call in other.get("tool_calls", ())]
        assert [call.function.model_dump() for call in message.tool_calls or ()] == calls
    assert results[3]["body"]["choices"][0]["finish_reason"] == "tool_calls"
    with LLM(str(folder), host_memory="4GiB", threads=1, expert_usage="off") as llm:
        usual: Any = {"max_tokens": 150, "seed": 5, "temperature": 0.9}
        params = [
            replace(llm.get_default_sampling_params(), **usual, structured_outputs=given)
            for given in ({"json": Zoo.model_json_schema()}, {"regex": "[a-z]{4,20} [0-9]+!"})
        ]
        outputs = llm.chat([ASK, ASK], params)
        with pytest.raises(RequestError, match="structured_outputs"):
            llm.generate("x", replace(params[0], structured_outputs={"regex": "a("}))
    for output, result in zip(outputs, results, strict=False):
        assert output.outputs[0].text == result["body"]["choices"][0]["message"]["content"]
