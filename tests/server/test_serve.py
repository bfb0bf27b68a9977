"""`windlass serve` as a process, driven by the openai client over a real socket."""

import json
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import openai
import pytest

from live_server import Running, serving
from processes import PATIENCE_S
from windlass import LLM, SamplingParams
from windlass.cli import main

sys.path.insert(0, str(Path(__file__).parents[2] / "bench"))
from server import health

MESSAGES: Any = [{"role": "user", "content": "Tell me of the sea."}]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    data = str(tmp_path_factory.mktemp("data"))
    with serving(
        "demo", "--host-memory", "1GiB", "--max-num-seqs", "8", "--data-dir", data
    ) as running:
        yield running


def test_bits_over_http_are_those_of_the_python_api(server: Running) -> None:
    """Whatever runs beside: the streams below are under way all the time."""
    client = server.client()
    company = [
        client.completions.create(
            model="demo", prompt="x", max_tokens=300, stream=True, seed=i,
            extra_body={"ignore_eos": True},
        )
        for i in range(3)
    ]  # fmt: skip
    settings: dict[str, Any] = {"max_tokens": 24, "temperature": 0.8, "top_p": 0.9, "seed": 11}
    chat = client.chat.completions.create(
        model="demo", messages=MESSAGES, logprobs=True, top_logprobs=2, **settings
    )
    plain = client.completions.create(
        model="demo", prompt="In the beginning", logprobs=2, n=2, **settings
    )
    for stream in company:
        stream.close()
    with LLM("demo", host_memory="4GiB", threads=1, expert_usage="off") as llm:
        params = SamplingParams(logprobs=2, **settings)
        (one,) = llm.chat([MESSAGES], params)
        (two,) = llm.generate(["In the beginning"], SamplingParams(logprobs=2, n=2, **settings))
    assert chat.choices[0].message.content == one.outputs[0].text
    steps = chat.choices[0].logprobs
    assert steps is not None and steps.content is not None
    pairs = zip(one.outputs[0].token_ids, one.outputs[0].logprobs or (), strict=True)
    assert [step.logprob for step in steps.content] == [
        step[token].logprob for token, step in pairs
    ]
    for choice, output in zip(plain.choices, two.outputs, strict=True):
        assert choice.text == output.text and choice.logprobs is not None
        pairs = zip(output.token_ids, output.logprobs or (), strict=True)
        assert choice.logprobs.token_logprobs == [step[token].logprob for token, step in pairs]


def test_a_stream_of_the_client(server: Running) -> None:
    client = server.client()
    wanted: dict[str, Any] = {"model": "demo", "messages": MESSAGES, "max_tokens": 20, "seed": 3}
    whole = client.chat.completions.create(**wanted)
    with client.chat.completions.create(
        **wanted, stream=True, stream_options={"include_usage": True}
    ) as stream:
        chunks = list(stream)
    text = "".join(one.choices[0].delta.content or "" for one in chunks if one.choices)
    assert text == whole.choices[0].message.content
    assert chunks[-1].usage == whole.usage


def test_the_next_turn_reads_what_is_new(server: Running) -> None:
    """Of 100 tokens and an answer of 60, whose last one was not computed, two blocks of 64."""
    client = server.client()
    wanted: dict[str, Any] = {"model": "demo", "max_tokens": 60, "seed": 7, "logprobs": 1}
    more = {"ignore_eos": True, "return_token_ids": True}
    history = [*range(20, 120)]
    for turn, cached in enumerate((0, 128, 192)):
        answer = client.completions.create(prompt=history, **wanted, extra_body=more)
        assert answer.usage is not None and answer.usage.prompt_tokens == len(history)
        details = answer.usage.prompt_tokens_details
        assert details is not None and details.cached_tokens == cached
        (choice,) = answer.choices
        again = client.completions.create(prompt=history, **wanted, extra_body=more)
        assert again.choices == answer.choices
        history += choice.model_extra["token_ids"]  # type: ignore[index]
        history += [300 + turn] * 5


def test_a_response_of_the_client(server: Running) -> None:
    client = server.client()
    wanted: dict[str, Any] = {"model": "demo", "input": MESSAGES, "max_output_tokens": 12}
    whole = client.responses.create(**wanted, extra_body={"seed": 3})
    with client.responses.create(**wanted, stream=True, extra_body={"seed": 3}) as stream:
        events = list(stream)
    text = "".join(one.delta for one in events if one.type == "response.output_text.delta")
    assert text == whole.output_text and whole.usage is not None
    chat = client.chat.completions.create(model="demo", messages=MESSAGES, max_tokens=12, seed=3)
    assert text == chat.choices[0].message.content and chat.usage is not None
    assert whole.usage.total_tokens == chat.usage.total_tokens


def test_prompts_are_scored_as_an_evaluation_asks(server: Running) -> None:
    """lm-eval: log-probabilities of given continuations, and whether they are the likeliest."""
    client = server.client()
    ids = [610, 273, 271, 9]
    greedy = client.completions.create(
        model="demo", prompt=ids, max_tokens=3, temperature=0, extra_body={"return_token_ids": True}
    )
    more = greedy.choices[0].model_extra["token_ids"]  # type: ignore[index]
    scored = client.completions.create(
        model="demo", prompt=[[*ids, *more], [*ids, 7, 7]], max_tokens=1, logprobs=1, echo=True,
        temperature=0, seed=1234,
    )  # fmt: skip
    for choice, length, is_greedy in zip(
        scored.choices, (len(more), 2), (True, False), strict=True
    ):
        logs = choice.logprobs
        assert logs is not None and logs.token_logprobs is not None and logs.top_logprobs
        assert len(logs.token_logprobs) == len(ids) + length + 1
        values = logs.token_logprobs[len(ids) : -1]
        tops = logs.top_logprobs[len(ids) : -1]
        best = [max(top.values()) for top in tops]
        assert (values == best) == is_greedy and all(
            v <= b for v, b in zip(values, best, strict=True)
        )


def test_a_scored_prompt_comes_in_pieces_too(server: Running) -> None:
    client = server.client()
    wanted: Any = {"model": "demo", "prompt": "In the beginning", "max_tokens": 3, "logprobs": 1}
    wanted |= {"echo": True, "seed": 3}
    (whole,) = client.completions.create(**wanted).choices
    chunks = [one.choices[0] for one in client.completions.create(**wanted, stream=True)]
    assert "".join(chunk.text for chunk in chunks) == whole.text
    assert whole.logprobs is not None
    for name, values in whole.logprobs.model_dump().items():
        assert [v for chunk in chunks for v in chunk.logprobs.model_dump()[name]] == values  # type: ignore[union-attr]


def test_characters_of_several_tokens_come_whole(server: Running) -> None:
    text = "👋🏽世界é"
    wanted: Any = {"model": "demo", "messages": MESSAGES, "max_tokens": 200, "stream": True}
    stream = server.client().chat.completions.create(
        **wanted, extra_body={"structured_outputs": {"choice": [text]}}
    )
    pieces = [one.choices[0].delta.content or "" for one in stream]
    assert "".join(pieces) == text and not any("\ufffd" in piece for piece in pieces)


POST = (
    b"POST /v1/completions HTTP/%s\r\nhost: localhost\r\ncontent-type: application/json\r\n"
    b"content-length: %d\r\n%s\r\n"
)
BODY = b'{"prompt": "a", "max_tokens": 2}'
STREAM = b'{"prompt": "a", "max_tokens": 2, "stream": true}'


def asked(server: Running, *pieces: bytes) -> tuple[int, Any]:
    """Status and body of what comes until the server closes; each piece is sent once something has
    come for the one before."""
    came = b""
    with (
        socket.create_connection(("127.0.0.1", server.port), timeout=PATIENCE_S) as connection,
        suppress(ConnectionResetError),  # it has not read all
    ):
        for piece in pieces:
            connection.sendall(piece)
            came = connection.recv(1 << 16)
        while more := connection.recv(1 << 16):
            came += more
    head, _, body = came.partition(b"\r\n\r\n")
    return int(head.split()[1]), json.loads(body)


@pytest.mark.parametrize(
    ("pieces", "status", "said"),
    [
        ([POST % (b"1.0", len(BODY), b"") + BODY], 200, ""),
        ([POST % (b"1.0", len(STREAM), b"") + STREAM], 400, "from HTTP/1.1 on"),
        ([POST % (b"1.1", len(BODY), b"expect: 100-continue\r\nconnection: close\r\n"), BODY],
         200, ""),
        ([POST % (b"1.1", 1 << 40, b"expect: 100-continue\r\n")], 413, "body: got more than the "),
        ([b"NONSENSE\r\n\r\n"], 400, "not readable as HTTP"),
        ([b"GET /health HTTP/1.1\r\nx-long: " + b"a" * (1 << 17)], 431, "headers: too large"),
        ([b"GET /health HTTP/1.1\r\n" + b"x-a: b\r\n" * (1 << 14) + b"\r\n"], 431, "headers"),
    ],
)  # fmt: skip
def test_bytes_that_no_client_library_sends(
    server: Running, pieces: list[bytes], status: int, said: str
) -> None:
    found, body = asked(server, *pieces)
    assert found == status, body
    assert said in body.get("error", {}).get("message", "")


def test_log_probabilities_of_a_prompt(server: Running) -> None:
    client, ids = server.client(), [610, 273, 271]
    wanted: Any = {"model": "demo", "prompt": ids, "max_tokens": 1}
    asked: Any = {"extra_body": {"prompt_logprobs": 5}}
    answer = client.completions.create(**wanted, **asked)
    whole = answer.choices[0].model_extra["prompt_logprobs"]  # type: ignore[index]
    first, *rest = whole
    assert first is None and len(rest) == 2
    for token, step in zip(ids[1:], rest, strict=True):
        assert next(iter(step)) == str(token) and 5 <= len(step) <= 6
        assert {one["rank"] for one in step.values()} >= {1, 2, 3, 4, 5}
        ordered = sorted(step.values(), key=lambda one: one["rank"])
        assert [one["logprob"] for one in ordered] == sorted(
            (one["logprob"] for one in step.values()), reverse=True
        )
        assert all(one["decoded_token"] for one in step.values())
    stream = client.completions.create(**wanted | {"max_tokens": 3, "n": 2}, stream=True, **asked)
    told = [one.choices[0] for one in stream]
    firsts = [next(i for i, one in enumerate(told) if one.index == choice) for choice in (0, 1)]
    found = {i: (one.model_extra or {}).get("prompt_logprobs") for i, one in enumerate(told)}
    assert found[firsts[0]] == whole
    assert not any(one for i, one in found.items() if i != firsts[0])
    nothing = client.completions.create(**wanted | {"max_tokens": 0}, **asked)
    assert nothing.choices[0].text == "" and nothing.usage.completion_tokens == 0  # type: ignore[union-attr]
    assert nothing.choices[0].model_extra["prompt_logprobs"] == whole  # type: ignore[index]
    with pytest.raises(openai.BadRequestError, match="prompt_logprobs: got 21, allowed .*0 to 20"):
        client.completions.create(**wanted, extra_body={"prompt_logprobs": 21})


def test_log_probabilities_of_a_chat_come_with_its_first_tokens(server: Running) -> None:
    client = server.client()
    wanted: Any = {"model": "demo", "messages": MESSAGES, "max_tokens": 3, "seed": 3}
    wanted |= {"extra_body": {"prompt_logprobs": 2, "return_token_ids": True}}
    whole = client.chat.completions.create(**wanted).model_extra
    chunks = [one.model_extra for one in client.chat.completions.create(**wanted, stream=True)]
    assert whole is not None and len(whole["prompt_logprobs"]) == len(whole["prompt_token_ids"])
    told = [place for place, one in enumerate(chunks) if one and "prompt_logprobs" in one]
    assert told == [1]  # after that which begins the message
    assert chunks[1]["prompt_logprobs"] == whole["prompt_logprobs"]  # type: ignore[index]


def test_an_echo_has_alternatives_of_each_token_and_prompt_logprobs_its_own(
    server: Running,
) -> None:
    client, ids = server.client(), [610, 273, 271]
    wanted: Any = {"model": "demo", "prompt": ids, "max_tokens": 2, "echo": True, "logprobs": 5}
    wanted["temperature"] = 0
    plain = client.completions.create(**wanted).choices[0]
    assert plain.logprobs is not None and plain.logprobs.top_logprobs is not None
    tops, own = plain.logprobs.top_logprobs, plain.logprobs.token_logprobs
    assert tops[0] is None and own is not None and len(tops) == len(own) == 5
    for top, value in zip(tops[1:], own[1:], strict=True):
        assert 5 <= len(top) <= 6 and value in top.values()
    assert "prompt_logprobs" not in (plain.model_extra or {})
    both = client.completions.create(**wanted, extra_body={"prompt_logprobs": 1}).choices[0]
    assert both.logprobs == plain.logprobs and both.model_extra is not None
    assert all(1 <= len(step) <= 2 for step in both.model_extra["prompt_logprobs"][1:])
    with pytest.raises(openai.BadRequestError, match="logprobs: got 21, allowed 0 to 20"):
        client.completions.create(**wanted | {"logprobs": 21})


def test_scored_prompts_that_share_a_context_compute_it_once(server: Running) -> None:
    """As lm-eval asks, within a list of prompts and from one request to the next."""
    client, context = server.client(), [300 + 7 * i % 900 for i in range(200)]
    wanted: Any = {"model": "demo", "max_tokens": 1, "logprobs": 1, "echo": True, "temperature": 0}

    def scores(*ends: int) -> tuple[list[list[float]], int]:
        found = client.completions.create(prompt=[[*context, end, 7] for end in ends], **wanted)
        assert found.usage is not None and found.usage.prompt_tokens_details is not None
        logs = [one.logprobs.token_logprobs for one in found.choices]  # type: ignore[union-attr]
        return logs, found.usage.prompt_tokens_details.cached_tokens or 0  # type: ignore[return-value]

    together, cached = scores(5, 6, 8, 9)
    assert cached == 3 * 192
    for end, known in zip((5, 6, 8, 9), together, strict=True):
        alone, cached = scores(end)
        assert cached == 192 and alone == [known]


def test_a_batch_of_the_client_beside_others(server: Running, tmp_path: Path) -> None:
    """Its rows have the bits of the same requests alone; others come first."""
    client = server.client()
    wanted: Any = {"messages": MESSAGES, "max_tokens": 40, "seed": 5, "logprobs": True}
    with (tmp_path / "in.jsonl").open("w") as file:
        for i in range(24):
            row = {
                "custom_id": str(i),
                "method": "POST",
                "url": "/v1/chat/completions",
                "body": {**wanted, "seed": i},
            }
            file.write(json.dumps(row) + "\n")
    source = client.files.create(file=tmp_path / "in.jsonl", purpose="batch")
    assert client.files.retrieve(source.id) == source
    batch = client.batches.create(
        input_file_id=source.id, endpoint="/v1/chat/completions", completion_window="24h",
        metadata={"for": "a test"},
    )  # fmt: skip
    alone = client.chat.completions.create(model="demo", **wanted)
    deadline = time.monotonic() + PATIENCE_S
    while (found := client.batches.retrieve(batch.id)).status != "completed":
        assert time.monotonic() < deadline and found.status in (
            "validating", "in_progress", "finalizing",
        ), found  # fmt: skip
        time.sleep(0.05)
    assert found.request_counts is not None and found.output_file_id is not None
    assert (found.request_counts.total, found.request_counts.completed) == (24, 24)
    assert [one.id for one in client.batches.list(limit=5)][:1] == [batch.id]
    assert source.id in [one.id for one in client.files.list(purpose="batch")]
    lines = client.files.content(found.output_file_id).text.splitlines()
    results = [json.loads(line) for line in lines]
    assert [one["custom_id"] for one in results] == [str(i) for i in range(24)]
    choice = results[5]["response"]["body"]["choices"][0]
    assert choice == alone.to_dict()["choices"][0]  # type: ignore[index]
    assert client.files.delete(source.id).deleted
    with pytest.raises(openai.NotFoundError, match="No such File"):
        client.files.retrieve(source.id)
    with pytest.raises(openai.BadRequestError, match="Cannot cancel"):
        client.batches.cancel(batch.id)


def test_health_is_told_beside_streams_and_large_prompts(server: Running) -> None:
    """How soon, `bench/server/health.py` measures."""
    load = health.Load(f"127.0.0.1:{server.port}")
    assert len(load.run(1.0)) > 1
    assert load.events > 0 and set(load.statuses) <= {200, 400} and sum(load.statuses.values()) > 0
    deadline = time.monotonic() + PATIENCE_S
    while server.get("/v1/stats")[1]["running"] and time.monotonic() < deadline:
        time.sleep(0.05)
    assert server.get("/v1/stats")[1]["running"] == 0


def test_errors_reach_the_client_as_its_own_classes(server: Running) -> None:
    client = server.client()
    with pytest.raises(openai.NotFoundError, match="does not exist"):
        client.chat.completions.create(model="gpt-4", messages=MESSAGES)
    with pytest.raises(openai.BadRequestError, match="tokens") as caught:
        client.completions.create(model="demo", prompt="word " * 5000)
    assert caught.value.code == "context_length_exceeded"
    assert [model.id for model in client.models.list()] == ["demo"]
    assert client.models.retrieve("demo").owned_by == "windlass"


def test_a_client_that_leaves_frees_its_rows(server: Running) -> None:
    stream = server.client().completions.create(
        model="demo", prompt="x", max_tokens=900, n=4, stream=True,
        extra_body={"ignore_eos": True},
    )  # fmt: skip
    next(iter(stream))
    assert server.get("/v1/stats")[1]["kv_cache_usage"] > 0
    stream.close()
    deadline = time.monotonic() + PATIENCE_S
    while server.get("/v1/stats")[1]["running"] and time.monotonic() < deadline:
        time.sleep(0.05)
    status, stats = server.get("/v1/stats")
    assert status == 200 and stats["running"] == stats["open_requests"] == 0
    assert stats["kv_cache_usage"] == stats["waiting"] == 0
    assert server.get("/v1/stats")[1]["passes"] == stats["passes"], "nobody is computed for"


def test_a_signal_lets_answers_end_and_then_the_server() -> None:
    with serving("demo", "--host-memory", "1GiB", "--shutdown-timeout", "60") as server:
        client = server.client()
        wanted: Any = {"model": "demo", "prompt": "x", "max_tokens": 150, "stream": True}
        stream = client.completions.create(**wanted, extra_body={"ignore_eos": True})
        chunks = iter(stream)
        next(chunks)
        server.signal(signal.SIGTERM)
        deadline = time.monotonic() + PATIENCE_S
        while server.get("/health")[0] != 503 and time.monotonic() < deadline:
            time.sleep(0.02)
        assert server.get("/health")[1]["status"] == "draining"
        rest = list(chunks)
        assert rest[-1].choices[0].finish_reason == "length"
        assert server.exit_code() == 0


def test_answers_that_take_too_long_end_with_an_error() -> None:
    with serving("demo", "--host-memory", "1GiB", "--shutdown-timeout", "0") as server:
        wanted: Any = {"model": "demo", "prompt": "x", "max_tokens": 900, "stream": True}
        stream = server.client().completions.create(**wanted, extra_body={"ignore_eos": True})
        chunks = iter(stream)
        next(chunks)
        server.signal(signal.SIGTERM)
        with pytest.raises(openai.APIError, match="ended before"):
            list(chunks)
        assert server.exit_code() == 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--device", "cuda:99"), "windlass: --device: got 'cuda:99', allowed "),
        (("--host-memory", "100TiB"), "windlass: --host-memory: got 100 TiB, allowed up to "),
    ],
)
def test_what_the_machine_has_not_is_said_before_the_port_is_open(
    words: tuple[str, str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["serve", "--port", "0", *words]) == 2
    shown = capsys.readouterr()
    assert shown.err.startswith(message)
    assert "listening" not in shown.err


def test_an_address_that_is_taken_is_one_clear_error() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        found = subprocess.run(
            [sys.executable, "-m", "windlass.cli", "serve", "--port", str(port)],
            capture_output=True, text=True, timeout=PATIENCE_S,
        )  # fmt: skip
    assert found.returncode == 2
    assert found.stderr.splitlines()[-1].startswith(f"windlass: --port: got 127.0.0.1:{port}")
