"""Fields of bodies that clients send, and what an answer to them has: over an engine without a
model. What needs a model's own numbers is in `test_serve.py`."""

import asyncio
import json
import time
from collections.abc import Iterator
from typing import Any

import pytest

from asgi import Answered, ask
from fake_engine import FakeEngine
from fake_server import Server, error_of
from windlass.server.bodies import read_object
from windlass.server.errors import HttpError

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
HELLO = {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 9}
USER = {"role": "user", "content": "hi"}
CALL = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": "{}"}}


@pytest.fixture
def server() -> Iterator[Server]:
    server = Server(FakeEngine())
    with server.load():
        yield server


# What clients send and leave empty, by name.
NULLS = (
    "temperature", "top_p", "n", "stop", "seed", "presence_penalty", "frequency_penalty",
    "repetition_penalty", "logit_bias", "top_k", "min_p", "min_tokens", "stop_token_ids",
    "ignore_eos", "logprobs", "top_logprobs", "user", "metadata", "store", "stream",
    "stream_options", "prompt_logprobs", "priority", "return_token_ids", "structured_outputs",
    "response_format", "best_of", "service_tier", "safety_identifier", "prompt_cache_key",
    "allowed_token_ids", "suffix", "echo", "tools", "tool_choice", "parallel_tool_calls",
    "functions", "function_call", "modalities", "audio", "prediction", "reasoning_effort",
    "verbosity", "web_search_options", "chat_template_kwargs", "add_generation_prompt",
    "continue_final_message", "truncate_prompt_tokens", "max_completion_tokens", "anything",
)  # fmt: skip


def test_a_null_is_a_field_that_is_not_there(server: Server) -> None:
    body = {**HELLO, "seed": 1}
    empty = {**dict.fromkeys(NULLS), **body}
    assert server.post(CHAT, empty).json["choices"] == server.post(CHAT, body).json["choices"]
    plain = {"prompt": "ab", "max_tokens": 5, "seed": 1}
    found = server.post(COMPLETIONS, {**dict.fromkeys(NULLS), **plain}).json["choices"]
    assert found == server.post(COMPLETIONS, plain).json["choices"]


@pytest.mark.parametrize(
    "fields",
    [
        {"user": "u", "metadata": {"a": "b"}, "store": True, "service_tier": "auto"},
        {"safety_identifier": "s", "prompt_cache_key": "k", "request_id": "r", "cache_salt": "c"},
        {"best_of": 1, "priority": 0, "use_beam_search": False, "length_penalty": 1.0},
        {"stop": [], "stop_token_ids": [], "logit_bias": {}, "bad_words": [], "seed": -1},
        {"stop": ["x"] * 20, "top_k": -1, "min_p": 0, "temperature": 2, "top_p": 1},
        {"min_tokens": 2, "ignore_eos": True, "include_stop_str_in_output": True, "stop": "a"},
        {"modalities": ["text"], "prediction": {"type": "content", "content": "hi"}},
        {"reasoning_effort": "low", "verbosity": "high", "include_reasoning": False},
        {"tools": [], "tool_choice": "none", "parallel_tool_calls": False, "functions": []},
        {"top_logprobs": 0, "logprobs": False, "echo": False, "add_special_tokens": False},
        {"max_tokens": None, "max_completion_tokens": 3, "stream_options": None},
    ],
)
def test_fields_that_clients_send(server: Server, fields: dict[str, Any]) -> None:
    assert server.post(CHAT, {**HELLO, **fields}).status == 200


@pytest.mark.parametrize(
    ("path", "fields", "param"),
    [
        (COMPLETIONS, {"suffix": "x"}, "suffix"), (COMPLETIONS, {"best_of": 3}, "best_of"),
        (CHAT, {"audio": {"voice": "x"}}, "audio"), (CHAT, {"store": "yes"}, "store"),
        (CHAT, {"modalities": ["audio"]}, "modalities"), (CHAT, {"priority": 1}, "priority"),
        (CHAT, {"logit_bias": {"5": 101}}, "logit_bias"), (CHAT, {"max_tokens": 0}, "max_tokens"),
        (CHAT, {"guided_json": {}}, "guided_json"), (CHAT, {"user": 5}, "user"),
        (CHAT, {"truncate_prompt_tokens": -2}, "truncate_prompt_tokens"),
        (COMPLETIONS, {"echo": True, "logprobs": 1, "n": 2, "stream": True}, "n"),
        (COMPLETIONS, {"prompt": [[]]}, "prompt"), (COMPLETIONS, {"prompt": [5.5]}, "prompt"),
    ],
)  # fmt: skip
def test_what_is_not_done_is_refused_by_name(
    server: Server, path: str, fields: dict[str, Any], param: str
) -> None:
    own = HELLO if path == CHAT else {"prompt": "ab"}
    assert error_of(server.post(path, {**own, **fields}), 400)["param"] == param


@pytest.mark.parametrize(
    "messages",
    [
        [USER, {"role": "assistant", "content": "yo", "refusal": None, "annotations": [],
                "audio": None, "function_call": None, "tool_calls": None}, USER],
        [USER, {"role": "assistant", "content": "yo", "reasoning": "why", "tool_calls": []}, USER],
        [USER, {"role": "assistant", "content": "yo", "reasoning_content": "why"}, USER],
        [{"role": "developer", "content": "be kind"}, USER],
        [USER, {"role": "assistant", "content": None, "tool_calls": [{"index": 0, **CALL}]},
         {"role": "tool", "tool_call_id": "c1", "content": [{"type": "text", "text": "5"}]}],
        [USER, {"role": "assistant", "tool_calls": [CALL]},
         {"role": "tool", "tool_call_id": "c1", "content": "5"}],
        [USER, {"role": "assistant", "content": None, "function_call": CALL["function"]},
         {"role": "function", "name": "f", "content": "5"}],
        [{"role": "user", "content": [{"type": "text", "text": "a",
                                       "cache_control": {"type": "ephemeral"}}]}],
    ],
)  # fmt: skip
def test_histories_that_clients_send(server: Server, messages: list[Any]) -> None:
    assert server.post(CHAT, {"messages": messages, "max_tokens": 3}).status == 200


def test_an_answer_can_be_sent_back(server: Server) -> None:
    message = server.post(CHAT, HELLO).json["choices"][0]["message"]
    assert set(message) == {"role", "content", "refusal"}
    again = {"messages": [USER, message, USER], "max_tokens": 3}
    assert server.post(CHAT, again).status == 200


def test_an_answer_goes_on_with_the_last_message(server: Server) -> None:
    def text_of(**more: Any) -> str:
        messages = [USER, {"role": "assistant", "content": "Once  "}]
        found = server.post("/tokenize", {"messages": messages, **more})
        return bytes(found.json["tokens"]).decode()

    assert text_of() == "<user>hi\n<assistant>Once  \n<assistant>"
    assert text_of(continue_final_message=True) == "<user>hi\n<assistant>Once  "
    parts = [USER, {"role": "assistant", "content": [{"type": "text", "text": "Once"}]}]
    body = {"messages": parts, "continue_final_message": True, "max_tokens": 3}
    assert server.post(CHAT, body).status == 200
    assert "assistant's text" in error_of(
        server.post(CHAT, {**HELLO, "continue_final_message": True}), 400
    )["message"]  # fmt: skip


def test_a_prompt_keeps_its_last_tokens(server: Server) -> None:
    body = {"prompt": list(range(60, 80)), "max_tokens": 3, "return_token_ids": True}

    def kept(most: int, **more: Any) -> list[int]:
        answered = server.post(COMPLETIONS, {**body, "truncate_prompt_tokens": most, **more})
        return list(answered.json["choices"][0]["prompt_token_ids"])

    assert kept(2) == [78, 79] and kept(500) == body["prompt"]
    assert len(kept(-1, prompt="a" * 1000)) == 256 - 3  # what the answer leaves of the context
    cut = server.post(CHAT, {**HELLO, "truncate_prompt_tokens": 4}).json
    assert cut["usage"]["prompt_tokens"] == 4


def test_tokens_named_by_their_ids(server: Server) -> None:
    body: dict[str, Any] = {"max_tokens": 4, "seed": 3, "return_token_ids": True, "logprobs": 2}
    body |= {"prompt": "ab", "return_tokens_as_token_ids": True}
    whole = server.post(COMPLETIONS, body).json["choices"][0]
    wanted = [f"token_id:{i}" for i in whole["token_ids"]]
    assert whole["logprobs"]["tokens"] == wanted
    assert all(name in top for name, top in zip(wanted, whole["logprobs"]["top_logprobs"],
                                                strict=True))  # fmt: skip
    chunks = server.post(COMPLETIONS, {**body, "stream": True}).chunks
    assert [t for c in chunks for t in c["choices"][0]["logprobs"]["tokens"]] == wanted
    chat = {**HELLO, "logprobs": True, "top_logprobs": 1, "return_tokens_as_token_ids": True}
    steps = server.post(CHAT, {**chat, "return_token_ids": True}).json["choices"][0]
    assert [step["token"] for step in steps["logprobs"]["content"]] == [
        f"token_id:{i}" for i in steps["token_ids"]
    ]


def test_what_was_not_computed_again_is_told(server: Server) -> None:
    body = {**HELLO, "seed": 1}
    usage = server.post(CHAT, body).json["usage"]
    assert usage["prompt_tokens_details"] == {"cached_tokens": 0}
    options = {"stream": True, "stream_options": {"include_usage": True}}
    assert server.post(CHAT, {**body, **options}).chunks[-1]["usage"] == usage


def test_thirty_two_streams_interleave() -> None:
    """None waits for another's end; each has its own text."""
    server = Server(FakeEngine(step_s=0.002, capacity=64, max_model_len=512))
    bodies = [{"prompt": "ab", "max_tokens": 60, "seed": i, "stream": True} for i in range(32)]
    order: list[int] = []

    async def one(number: int) -> Answered:
        async def noted(scope: Any, receive: Any, send: Any) -> None:
            async def tell(message: Any) -> None:
                if message.get("body"):
                    order.append(number)
                await send(message)

            await server.app(scope, receive, tell)

        return await ask(noted, "POST", COMPLETIONS, bodies[number])

    async def all_of_them() -> list[Answered]:
        return list(await asyncio.gather(*map(one, range(32))))

    with server.load():
        streamed = asyncio.run(all_of_them())
        alone = [server.post(COMPLETIONS, {**body, "stream": False}) for body in bodies[:4]]
    firsts = {number: order.index(number) for number in range(32)}
    ends = {number: len(order) - order[::-1].index(number) for number in range(32)}
    assert max(firsts.values()) < min(ends.values())
    texts = ["".join(c["choices"][0]["text"] for c in one.chunks) for one in streamed]
    assert texts[:4] == [one.json["choices"][0]["text"] for one in alone]
    assert len(set(texts)) > 16


@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_that_takes_too_long_is_given_up(stream: bool) -> None:
    server = Server(FakeEngine(step_s=0.02, max_model_len=4096), answer_s=0.1)
    with server.load():
        answered = server.post(CHAT, {**HELLO, "max_tokens": 3000, "stream": stream})
        deadline = time.monotonic() + 10
        while server.engine.has_work and time.monotonic() < deadline:
            time.sleep(0.01)
        assert server.engine.aborted and server.state.num_open == 0
    if stream:
        assert "0.1 s" in json.loads(answered.events[-1])["error"]["message"]
    else:
        assert error_of(answered, 504)["code"] == "timeout"


def test_a_body_that_stops_coming() -> None:
    class Silent:
        headers = {"content-type": "application/json"}

        async def stream(self) -> Any:
            yield b"{"
            await asyncio.sleep(60)

    with pytest.raises(HttpError, match=r"0\.05 s") as caught:
        asyncio.run(read_object(Silent(), 1000, patience_s=0.05))  # type: ignore[arg-type]
    assert caught.value.status == 408
