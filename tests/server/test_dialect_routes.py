"""`/v1/responses` and `/v1/messages` over the application, without a network and without a model:
streams, kept responses, refusals, failures."""

import json
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from amounts import some
from asgi import Answered
from fake_engine import FakeEngine
from fake_server import JSON, BrokenEngine, Server, error_of
from windlass.server.app import make_app

RESPONSES, MESSAGES = "/v1/responses", "/v1/messages"
COUNT, COUNT_INPUT = "/v1/messages/count_tokens", "/v1/responses/input_tokens"
ASK: dict[str, Any] = {"input": "hello", "max_output_tokens": 9, "seed": 4}
HELLO = [{"role": "user", "content": "hello"}]
TALK: dict[str, Any] = {"messages": HELLO, "max_tokens": 9, "seed": 4}


@pytest.fixture
def server() -> Iterator[Server]:
    server = Server(FakeEngine())
    with server.load():
        yield server


def anthropic_error_of(answered: Answered, status: int) -> dict[str, Any]:
    assert answered.status == status, (answered.status, answered.pieces)
    assert set(answered.json) == {"type", "error"} and answered.json["type"] == "error"
    error: dict[str, Any] = answered.json["error"]
    assert set(error) == {"type", "message"} and error["message"]
    assert answered.headers["request-id"] == answered.headers["x-request-id"]
    return error


def events_of(answered: Answered) -> list[Any]:
    assert answered.headers["content-type"].startswith("text/event-stream")
    return [json.loads(event) for event in answered.events]


def test_a_response_is_the_answer_of_a_chat(server: Server) -> None:
    whole = server.post(RESPONSES, ASK).json
    chat = {"messages": HELLO, "max_completion_tokens": 9, "seed": 4}
    choice = server.post("/v1/chat/completions", chat).json["choices"][0]
    assert whole["output"][0]["content"][0]["text"] == choice["message"]["content"]
    is_cut = choice["finish_reason"] == "length"
    assert whole["status"] == ("incomplete" if is_cut else "completed")
    events = events_of(server.post(RESPONSES, {**ASK, "stream": True}))
    assert events[0]["type"] == "response.created" and events[0]["response"]["output"] == []
    last = events[-1]["response"]
    assert events[-1]["type"] == f"response.{whole['status']}"
    for name in ("output", "usage", "status", "model", "temperature", "incomplete_details"):
        told = [{**one, "id": 0} for one in (*last["output"], *whole["output"])]
        assert last[name] == whole[name] or (name == "output" and told[0] == told[1])
    assert server.post(COUNT_INPUT, ASK).json == {
        "object": "response.input_tokens", "input_tokens": whole["usage"]["input_tokens"]
    }  # fmt: skip


def test_a_message_is_the_answer_of_a_chat(server: Server) -> None:
    headers = {"anthropic-version": "2023-06-01", "anthropic-beta": "x"}
    whole = server.post(MESSAGES, TALK, headers=headers).json
    choice = server.post("/v1/chat/completions", TALK).json["choices"][0]
    assert whole["content"] == [{"type": "text", "text": choice["message"]["content"]}]
    events = events_of(server.post(MESSAGES, {**TALK, "stream": True}))
    text = "".join(e["delta"]["text"] for e in events if e["type"] == "content_block_delta")
    assert [{"type": "text", "text": text}] == whole["content"]
    assert events[-2]["delta"]["stop_reason"] == whole["stop_reason"]
    assert events[-2]["usage"] == whole["usage"]
    count = server.post(COUNT, {"messages": HELLO}).json
    assert count == {"input_tokens": whole["usage"]["input_tokens"]}


def test_a_conversation_goes_on_from_a_kept_response(server: Server) -> None:
    first = server.post(RESPONSES, ASK).json
    text = first["output"][0]["content"][0]["text"]
    second = server.post(RESPONSES, {**ASK, "previous_response_id": first["id"]}).json
    prompt = bytes(server.engine.added[-1].prompt_token_ids).decode()
    parts = [{"type": "text", "text": text}]
    assert prompt == f"<user>hello\n<assistant>{parts}\n<user>hello\n<assistant>"
    path = f"{RESPONSES}/{second['id']}"
    assert server.ask("GET", path).json == second
    items = server.ask("GET", path + "/input_items").json
    assert [item["role"] for item in items["data"]] == ["user", "assistant", "user"]
    assert items["data"][-1]["content"] == [{"type": "input_text", "text": "hello"}]
    assert items["first_id"] == items["data"][0]["id"] and not items["has_more"]
    reference = {"type": "item_reference", "id": first["output"][0]["id"]}
    again = server.post(RESPONSES, {**ASK, "input": [*HELLO, reference, *HELLO]})
    assert again.status == 200
    assert bytes(server.engine.added[-1].prompt_token_ids).decode() == prompt
    assert "has ended" in error_of(server.post(path + "/cancel", None), 400)["message"]
    assert server.ask("DELETE", path).json["deleted"] is True
    assert error_of(server.ask("GET", path), 404)["code"] == "response_not_found"
    body = {**ASK, "previous_response_id": second["id"]}
    assert error_of(server.post(RESPONSES, body), 404)["param"] == "previous_response_id"
    hidden = server.post(RESPONSES, {**ASK, "store": False}).json
    error_of(server.ask("GET", f"{RESPONSES}/{hidden['id']}"), 404)
    streamed = events_of(server.post(RESPONSES, {**ASK, "stream": True}))[-1]["response"]
    assert server.ask("GET", f"{RESPONSES}/{streamed['id']}").json == streamed


def test_errors_of_messages_have_their_own_shape(server: Server) -> None:
    missing = {"messages": HELLO}
    assert "max_tokens" in anthropic_error_of(server.post(MESSAGES, missing), 400)["message"]
    wrong = server.post(MESSAGES, {**TALK, "model": "gpt-4"})
    assert anthropic_error_of(wrong, 404)["type"] == "not_found_error"
    anthropic_error_of(server.ask("GET", MESSAGES), 405)
    anthropic_error_of(server.ask("POST", COUNT, pieces=[b"{"]), 400)
    server.state.is_draining = True
    assert anthropic_error_of(server.post(MESSAGES, TALK), 503)["type"] == "overloaded_error"
    small = Server(FakeEngine(), body_bytes=10)
    with small.load():
        error = anthropic_error_of(small.post(MESSAGES, TALK), 413)
    assert error["type"] == "request_too_large"


def test_keys_come_under_several_names() -> None:
    server = Server(FakeEngine())
    server.app = make_app(server.state, keys=("secret",))
    with server.load():
        for name, value in (("x-api-key", "secret"), ("api-key", "secret"),
                            ("authorization", "Bearer secret")):  # fmt: skip
            assert server.post(MESSAGES, TALK, headers={name: value}).status == 200
        refused = server.post(MESSAGES, TALK, headers={"api-key": "other"})
        assert anthropic_error_of(refused, 401)["type"] == "authentication_error"


def test_silence_of_a_message_is_filled_with_pings() -> None:
    server = Server(FakeEngine(step_s=0.1), ping_s=0.02)
    with server.load():
        events = events_of(server.post(MESSAGES, {**TALK, "stream": True}))
        text = b"".join(server.post(RESPONSES, {**ASK, "stream": True}).pieces).decode()
    assert sum(event == {"type": "ping"} for event in events) >= 2
    assert events[0]["type"] == "message_start" and events[-1]["type"] == "message_stop"
    assert text.count(": ping\n\n") >= 2


def test_an_engine_that_fails_is_told_as_each_endpoint_tells_it() -> None:
    for path, body in ((RESPONSES, ASK), (MESSAGES, TALK)):
        server = Server(BrokenEngine())
        with server.load():
            last = events_of(server.post(path, {**body, "stream": True}))[-1]
        if path == RESPONSES:
            assert (last["type"], last["response"]["status"]) == ("response.failed", "failed")
            error = last["response"]["error"]
        else:
            error = last["error"]
            assert (last["type"], error["type"]) == ("error", "api_error")
        assert "the disk is gone" in error["message"]
    server = Server(FakeEngine(fail_prompts={"<user>hello\n<assistant>": 2}))
    with server.load():
        assert anthropic_error_of(server.post(MESSAGES, TALK), 500)["type"] == "api_error"
        failed = server.post(RESPONSES, ASK)
        assert "on purpose" in error_of(failed, 500)["message"]
        text = server.ask("GET", "/metrics").pieces[0].decode()
    assert 'request_success_total{finished_reason="error",model_name="fake"} 2.0' in text


NAMES = st.sampled_from(
    ["input", "messages", "system", "instructions", "max_tokens", "max_output_tokens", "stream",
     "tools", "tool_choice", "text", "reasoning", "include", "thinking", "stop_sequences", "store",
     "previous_response_id", "metadata", "top_logprobs", "output_config", "truncation", "strange"]
)  # fmt: skip
ITEM = st.fixed_dictionaries(
    {"type": st.sampled_from(
        ["message", "reasoning", "function_call", "function_call_output", "text", "tool_use",
         "tool_result", "thinking", "item_reference", "function", "json_schema", "allowed_tools"])},
    optional={name: JSON for name in ("role", "content", "call_id", "output", "summary", "name")},
)  # fmt: skip
VALUE = JSON | ITEM | st.lists(ITEM, max_size=2)
VALUE |= st.lists(st.fixed_dictionaries({"role": st.just("user"), "content": VALUE}), max_size=2)


@settings(max_examples=some(30, of=80), deadline=None)
@given(st.sampled_from([RESPONSES, MESSAGES, COUNT, COUNT_INPUT]), st.booleans(),
       st.dictionaries(NAMES, VALUE, max_size=4))  # fmt: skip
def test_no_body_is_an_internal_error(path: str, is_near: bool, changes: dict[str, Any]) -> None:
    base = (ASK if path.startswith(RESPONSES) else TALK) if is_near else {}
    answered = FUZZED.post(path, {**base, **changes})
    assert answered.status in (200, 400, 404), answered.pieces
    if answered.status != 200:
        check = anthropic_error_of if path.startswith(MESSAGES) else error_of
        check(answered, answered.status)


FUZZED = Server(FakeEngine())
FUZZED.load()
