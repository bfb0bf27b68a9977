"""The application without a network and without a model: what it answers, refuses and gives up."""

import asyncio
import json
import time
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from amounts import some
from asgi import Answered, ask
from fake_engine import FakeEngine
from fake_server import JSON, BrokenEngine, Server, error_of
from windlass.server.app import make_app

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
HELLO = {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 9}


@pytest.fixture
def server() -> Iterator[Server]:
    server = Server(FakeEngine())
    with server.load():
        yield server


@pytest.mark.parametrize("code", ["grammar_failed", None])
def test_an_error_is_the_same_in_a_stream(code: str | None) -> None:
    server = Server(FakeEngine(fail_prompts={"hello": 9}, error_code=code))
    with server.load():
        body = {"prompt": "hello", "max_tokens": 4}
        whole = server.post(COMPLETIONS, body)
        streamed = server.post(COMPLETIONS, {**body, "stream": True})
    kind = "invalid_request_error" if code else "server_error"
    assert whole.status == (400 if code else 500)
    assert json.loads(streamed.events[-1]) == whole.json
    assert (whole.json["error"]["type"], whole.json["error"]["code"]) == (kind, code)


def test_a_stream_says_what_the_whole_answer_says(server: Server) -> None:
    body = {**HELLO, "n": 2, "seed": 4, "logprobs": True, "top_logprobs": 2}
    whole = server.post(CHAT, body).json
    options = {"include_usage": True}
    streamed = server.post(CHAT, {**body, "stream": True, "stream_options": options})
    assert streamed.headers["content-type"].startswith("text/event-stream")
    *chunks, last = streamed.chunks
    assert last["choices"] == [] and last["usage"] == whole["usage"]
    assert all(chunk["usage"] is None for chunk in chunks)
    assert len({chunk["id"] for chunk in chunks}) == 1
    for choice in whole["choices"]:
        own = [c["choices"][0] for c in chunks if c["choices"][0]["index"] == choice["index"]]
        assert own[0]["delta"] == {"role": "assistant", "content": ""}
        text = "".join(one["delta"].get("content", "") for one in own)
        assert text == choice["message"]["content"]
        reasons = [one["finish_reason"] for one in own]
        assert reasons == [None] * (len(own) - 1) + [choice["finish_reason"]]
        steps = [step for one in own for step in (one["logprobs"] or {}).get("content", [])]
        assert steps == choice["logprobs"]["content"]


def test_completions_in_pieces_have_the_same_lists(server: Server) -> None:
    body = {"prompt": ["ab", [99, 100]], "max_tokens": 7, "n": 2, "seed": 1, "logprobs": 3}
    whole = server.post(COMPLETIONS, body).json
    chunks = server.post(COMPLETIONS, {**body, "stream": True}).chunks
    assert not any("usage" in chunk for chunk in chunks)
    assert [choice["index"] for choice in whole["choices"]] == [0, 1, 2, 3]
    for choice in whole["choices"]:
        own = [c["choices"][0] for c in chunks if c["choices"][0]["index"] == choice["index"]]
        assert "".join(one["text"] for one in own) == choice["text"]
        for name, values in choice["logprobs"].items():
            assert [value for one in own for value in one["logprobs"][name]] == values
        assert own[-1]["finish_reason"] == choice["finish_reason"]


def test_an_echo_begins_the_text_and_may_be_all_of_it(server: Server) -> None:
    body = {"prompt": "ab", "max_tokens": 4, "seed": 1}
    plain = server.post(COMPLETIONS, body).json["choices"][0]["text"]
    echoed = server.post(COMPLETIONS, {**body, "echo": True}).json["choices"][0]["text"]
    assert echoed == "ab" + plain
    alone = server.post(COMPLETIONS, {**body, "echo": True, "max_tokens": 0}).json
    assert alone["choices"][0]["text"] == "ab" and alone["usage"]["completion_tokens"] == 0
    chunks = server.post(COMPLETIONS, {**body, "echo": True, "stream": True}).chunks
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == "ab" + plain
    assert (
        error_of(server.post(COMPLETIONS, {**body, "max_tokens": 0}), 400)["param"] == "max_tokens"
    )


def test_usage_in_every_chunk_and_ids_of_tokens(server: Server) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    body = {**HELLO, "stream": True, "stream_options": options, "return_token_ids": True}
    *chunks, last = server.post(CHAT, body).chunks
    counts = [chunk["usage"]["completion_tokens"] for chunk in chunks]
    assert (
        counts == sorted(counts)
        and counts[0] == 0
        and counts[-1] == last["usage"]["completion_tokens"]
    )
    ids = [i for chunk in chunks for i in chunk["choices"][0].get("token_ids", [])]
    assert len(ids) == counts[-1]
    assert len(chunks[0]["prompt_token_ids"]) == last["usage"]["prompt_tokens"]


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_is_given_up_within_a_pass(stream: bool) -> None:
    server = Server(FakeEngine(step_s=0.02, max_model_len=4096))
    with server.load():
        body = {**HELLO, "max_tokens": 3000, "stream": stream}
        answered = server.post(CHAT, body, leaves_after=3 if stream else 0)
        assert stream or answered.status in (0, 499)
        deadline = time.monotonic() + 60
        while not server.engine.aborted and time.monotonic() < deadline:
            time.sleep(0.01)
        assert server.engine.aborted and not server.engine.has_work
        assert server.state.num_open == 0
        text = server.ask("GET", "/metrics").pieces[0].decode()
        assert 'request_success_total{finished_reason="abort",model_name="fake"} 1.0' in text


@pytest.mark.parametrize("pause_s", [0.001, 0.004, 0.009, 0.02])
def test_a_slow_reader_loses_nothing(pause_s: float) -> None:
    """The engine goes on while a piece is sent."""
    server = Server(FakeEngine(step_s=0.003))
    body = {**HELLO, "max_tokens": 30, "stream": True}

    async def slow() -> Answered:
        return await ask(server.app, "POST", CHAT, body, pause_s=pause_s)

    with server.load():
        for _ in range(3):
            assert asyncio.run(slow()).chunks[-1]["choices"][0]["finish_reason"]


def test_silence_is_filled_with_comments() -> None:
    server = Server(FakeEngine(step_s=0.15), ping_s=0.02)
    with server.load():
        text = b"".join(server.post(CHAT, {**HELLO, "stream": True}).pieces).decode()
    assert text.count(": ping\n\n") >= 3 and text.endswith("data: [DONE]\n\n")


def test_until_the_model_is_there_everything_says_so() -> None:
    server = Server(FakeEngine())
    server.state.loading = "downloading, 1 of 2"
    assert server.ask("GET", "/health").status == 503
    assert "downloading, 1 of 2" in server.ask("GET", "/health").json["message"]
    assert "downloading" in error_of(server.post(CHAT, HELLO), 503)["message"]
    assert server.ask("GET", "/v1/models").json["data"][0]["max_model_len"] is None
    assert server.ask("GET", "/metrics").status == 200
    assert server.ask("GET", "/v1/stats").json is None
    with server.load():
        assert server.ask("GET", "/health").json == {"status": "ok", "max_model_len": 256}
        assert server.ask("GET", "/v1/stats").json["running"] == 0
        server.state.is_draining = True
        refused = server.post(CHAT, HELLO)
        assert error_of(refused, 503)["type"] == "server_error" and refused.headers["retry-after"]


def test_a_request_has_a_seed_by_chance_and_a_home_by_its_body(server: Server) -> None:
    for _ in range(2):
        assert server.post(CHAT, HELLO).status == 200
    one, other = server.engine.added
    assert one.seed_key != other.seed_key and not one.is_named and not other.is_named


def test_too_many_requests_are_told_to_come_again() -> None:
    server = Server(FakeEngine(step_s=0.05), answers=1)

    async def both() -> list[Answered]:
        return list(await asyncio.gather(*(ask(server.app, "POST", CHAT, HELLO) for _ in range(2))))

    with server.load():
        first, second = sorted(asyncio.run(both()), key=lambda one: one.status)
    assert first.status == 200
    assert error_of(second, 429)["code"] == "rate_limit_exceeded" and second.headers["retry-after"]


@pytest.mark.parametrize("stream", [False, True])
def test_an_engine_that_fails_is_said_and_nothing_hangs(stream: bool) -> None:
    server = Server(BrokenEngine())
    with server.load():
        answered = server.post(CHAT, {**HELLO, "stream": stream})
        if stream:
            assert "the disk is gone" in json.loads(answered.events[-1])["error"]["message"]
        else:
            assert "the disk is gone" in error_of(answered, 500)["message"]
        assert "the disk is gone" in error_of(server.post(CHAT, HELLO), 503)["message"]
        assert server.ask("GET", "/health").status == 503


def test_a_row_that_fails_alone() -> None:
    server = Server(FakeEngine(fail_prompts={"ab": 2}))
    with server.load():
        body = {"prompt": "ab", "add_special_tokens": False}
        assert "on purpose" in error_of(server.post(COMPLETIONS, body), 500)["message"]
        events = server.post(COMPLETIONS, {**body, "stream": True}).events
        assert "on purpose" in json.loads(events[-1])["error"]["message"]
        assert server.post(COMPLETIONS, body).status == 200


@pytest.mark.parametrize(
    ("pieces", "headers", "status"),
    [
        ([b"{"], {}, 400),
        ([b"\xff{}"], {}, 400),
        ([b"[1]"], {}, 400),
        ([b'{"prompt": NaN}'], {}, 400),
        ([b'{"a":' * 100_000], {}, 400),
        ([b"[" * 200_000], {}, 400),
        ([b" " * 2000], {}, 413),
        ([b" " * 600, b" " * 600], {}, 413),
        ([b"{}"], {"content-length": "5000"}, 413),
        ([b"prompt=x"], {"content-type": "application/x-www-form-urlencoded"}, 415),
        ([b"{}"], {"content-encoding": "gzip"}, 415),
    ],
)
def test_bodies_that_are_none(pieces: list[bytes], headers: dict[str, str], status: int) -> None:
    limit = 1000 if status == 413 else 1 << 20
    server = Server(FakeEngine(), body_bytes=limit)
    with server.load():
        error_of(server.ask("POST", COMPLETIONS, pieces=pieces, headers=headers), status)


@pytest.mark.parametrize(
    ("method", "path", "status", "said"),
    [("GET", "/v1/nothing", 404, "no such path"), ("GET", CHAT, 405, "allowed POST"),
     ("POST", "/health", 405, "allowed GET"), ("GET", "/v1/models/gpt-4", 404, "does not exist")],
)  # fmt: skip
def test_paths_that_are_none(
    server: Server, method: str, path: str, status: int, said: str
) -> None:
    assert said in error_of(server.ask(method, path, {}), status)["message"]


def test_a_wrong_model_and_a_wrong_field(server: Server) -> None:
    assert (
        error_of(server.post(CHAT, {**HELLO, "model": "gpt-4"}), 404)["code"] == "model_not_found"
    )
    error = error_of(server.post(CHAT, {**HELLO, "temprature": 1}), 400)
    assert error["param"] == "temprature" and "did you mean temperature" in error["message"]
    assert server.post(CHAT, {**HELLO, "model": "other"}).json["model"] == "fake"


def test_the_tokenizer_alone(server: Server) -> None:
    tokens = server.post("/tokenize", {"prompt": "ab", "return_token_strs": True}).json
    assert tokens["tokens"] == [256, 97, 98] and tokens["count"] == 3
    assert tokens["max_model_len"] == 256 and tokens["token_strs"] == ["", "a", "b"]
    chat = server.post("/tokenize", {"messages": HELLO["messages"]}).json
    assert bytes(chat["tokens"]).decode() == "<user>hello\n<assistant>"
    assert server.post("/detokenize", {"tokens": [97, 98]}).json == {"prompt": "ab"}
    assert server.post("/detokenize", {"tokens": []}).json == {"prompt": ""}
    assert "below 257" in error_of(server.post("/detokenize", {"tokens": [999]}), 400)["message"]
    error_of(server.post("/tokenize", {"prompt": "a", "messages": []}), 400)
    assert "eos_token" in server.ask("GET", "/tokenizer_info").json


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 200), ({"host": "127.0.0.1:8000"}, 200), ({"host": "[::1]:8000"}, 200),
        ({"host": "192.168.1.7"}, 200), ({"host": "evil.example"}, 403),
        ({"host": "127.0.0.1.evil.example"}, 403), ({"origin": "http://localhost:3000"}, 200),
        ({"origin": "https://evil.example"}, 403), ({"origin": "null"}, 403),
    ],
)  # fmt: skip
def test_without_a_key_only_this_machine_may_ask(
    server: Server, headers: dict[str, str], status: int
) -> None:
    answered = server.ask("GET", "/v1/models", headers=headers)
    assert answered.status == status
    if status == 200 and "origin" in headers:
        assert answered.headers["access-control-allow-origin"] == headers["origin"]
    else:
        assert "access-control-allow-origin" not in answered.headers


def test_with_a_key_whoever_has_it_may_ask() -> None:
    server = Server(FakeEngine())
    server.app = make_app(server.state, keys=("secret", "other"), host="0.0.0.0")
    with server.load():
        for headers in ({}, {"authorization": "Bearer wrong"}, {"authorization": "secret"}):
            refused = server.ask("GET", "/v1/models", headers=headers)
            assert error_of(refused, 401)["code"] == "invalid_api_key"
        for headers in (
            {"authorization": "Bearer secret"}, {"authorization": "bearer other"},
            {"x-api-key": "secret", "host": "anything.example"},
        ):  # fmt: skip
            assert server.ask("GET", "/v1/models", headers=headers).status == 200
        assert server.ask("GET", "/health").status == 200


def test_preflights_of_local_pages(server: Server) -> None:
    named = "authorization, x-stainless-os"  # the openai client's own
    asked = {"access-control-request-method": "POST", "access-control-request-headers": named}
    local = {"origin": "http://localhost:5173", **asked}
    allowed = server.ask("OPTIONS", CHAT, headers=local)
    assert allowed.status == 204 and allowed.headers["access-control-allow-headers"] == named
    foreign = server.ask("OPTIONS", CHAT, headers={"origin": "https://evil.example", **asked})
    assert foreign.status == 403 and "access-control-allow-origin" not in foreign.headers


def test_every_answer_has_the_id_of_its_request(server: Server) -> None:
    assert (
        server.post(CHAT, HELLO, headers={"x-request-id": "mine"}).headers["x-request-id"] == "mine"
    )
    found = {server.ask("GET", path).headers["x-request-id"] for path in ("/health", "/nothing")}
    assert len(found) == 2 and all(found)


def test_metrics_add_up(server: Server) -> None:
    server.post(CHAT, {**HELLO, "n": 2})
    text = server.ask("GET", "/metrics").pieces[0].decode()
    values = dict(
        line.rsplit(" ", 1) for line in text.splitlines() if line and not line.startswith("#")
    )
    ends = [float(v) for name, v in values.items() if "request_success_total" in name]
    assert sum(ends) == 2
    assert float(values['windlass:request_params_n_count{model_name="fake"}']) == 1
    tokens = float(values['windlass:request_generation_tokens_sum{model_name="fake"}'])
    assert tokens == float(values['windlass:generation_tokens_total{model_name="fake"}'])
    hits = values['windlass:expert_hits_total{model_name="fake",tier="host"}']
    assert float(hits) > 0
    assert server.ask("HEAD", "/metrics").status == 200


NAMES = st.sampled_from(
    ["messages", "prompt", "max_tokens", "n", "stream", "stream_options", "logprobs", "stop",
     "seed", "top_logprobs", "temperature", "tools", "tool_choice", "echo", "logit_bias",
     "response_format",
     "min_tokens", "chat_template_kwargs", "return_token_ids", "model", "strange"]
)  # fmt: skip


@settings(max_examples=some(50, of=150), deadline=None)
@given(st.sampled_from([CHAT, COMPLETIONS, "/tokenize", "/detokenize"]), st.booleans(),
       st.dictionaries(NAMES, JSON, max_size=4))  # fmt: skip
def test_no_body_is_an_internal_error(path: str, is_near: bool, changes: dict[str, Any]) -> None:
    base = {**HELLO, "prompt": "x"} if is_near else {}
    if is_near and path != COMPLETIONS:
        base.pop("prompt")
    elif is_near:
        base.pop("messages")
    server = FUZZED
    answered = server.post(path, {**base, **changes})
    assert answered.status in (200, 400, 404), answered.pieces
    if answered.status != 200:
        error_of(answered, answered.status)


FUZZED = Server(FakeEngine())
FUZZED.load()
