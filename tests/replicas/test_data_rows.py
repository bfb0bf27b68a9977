"""Rows of a data set become the requests of a job file, and results become columns."""

import json
from typing import Any

import numpy as np
import pytest

from fake_engine import FakeEngine
from replica_rows import computed
from windlass.batch.jobfile import JobRow, read_line
from windlass.options import EngineOptions
from windlass.protocol.openai import Endpoint
from windlass.ray.data_rows import ERROR, REQUEST, answered, with_request
from windlass.ray.messages import ReplicaSpec
from windlass.ray.replica import Replica

ASK = [{"role": "user", "content": "Who?"}]


def asked(row: dict[str, Any], id_column: str | None = None) -> JobRow:
    """What the row asks for, as a job file would have it."""
    found = with_request(row, id_column)
    assert not found[ERROR]
    return read_line(found[REQUEST].encode(), 0)


@pytest.mark.parametrize(
    "row, endpoint, body",
    [
        ({"messages": ASK}, Endpoint.CHAT, {"messages": ASK}),
        (
            {"prompt": "a", "sampling_params": {"max_tokens": 3, "seed": 1}},
            Endpoint.COMPLETIONS,
            {"prompt": "a", "max_tokens": 3, "seed": 1},
        ),
        ({"body": {"input": "a"}}, Endpoint.RESPONSES, {"input": "a"}),
        # a column counts before the body, which has all else
        (
            {"body": {"prompt": "a", "echo": True}, "prompt": "b", "id": 7},
            Endpoint.COMPLETIONS,
            {"prompt": "b", "echo": True},
        ),
        # numpy's, and the fields that a table gives to all objects because one has them
        (
            {
                "messages": np.array([{**ASK[0], "name": None}], dtype=object),
                "sampling_params": {"max_tokens": np.int64(4), "stop": None},
            },
            Endpoint.CHAT,
            {"messages": ASK, "max_tokens": 4},
        ),
        ({"prompt": np.array([5, 6])}, Endpoint.COMPLETIONS, {"prompt": [5, 6]}),
    ],
)
def test_a_row_asks_like_a_line_of_a_job(
    row: dict[str, Any], endpoint: Endpoint, body: dict[str, Any]
) -> None:
    found = asked({"custom_id": "a", **row})
    assert (found.custom_id, found.endpoint, found.body) == ("a", endpoint, body)
    line = {"custom_id": "a", "method": "POST", "url": endpoint, "body": body}
    assert found == read_line(json.dumps(line).encode(), 0)


def test_rows_are_named_by_their_column_or_by_what_they_ask() -> None:
    assert asked({"prompt": "a", "key": 5}, "key").custom_id == "5"
    first, same, other = (asked({"prompt": text}).custom_id for text in ("a", "a", "b"))
    assert first == same != other


@pytest.mark.parametrize(
    "row, words",
    [
        ({"text": "a"}, "got the columns ['text'], allowed one of messages, prompt, input"),
        ({"prompt": "a", "messages": ASK}, "allowed one of"),
        ({"prompt": "a", "sampling_params": 5}, "sampling_params: got 5, allowed an object"),
        ({"prompt": "a", "sampling_params": {"temperature": float("nan")}}, "not JSON compliant"),
        ({"prompt": b"a"}, "got b'a', allowed what JSON has"),
        ({"prompt": "a", "key": None}, "key: missing"),
    ],
)
def test_what_no_line_can_say_is_the_rows_error(row: dict[str, Any], words: str) -> None:
    found = with_request(row, "key" if "key" in row else None)
    assert words in found[ERROR] and not found[REQUEST]
    assert found.items() >= row.items()


def test_columns_of_answers_and_of_refusals() -> None:
    rows: list[dict[str, Any]] = [
        {"messages": ASK, "sampling_params": {"max_tokens": 5}},
        {"prompt": "a b", "sampling_params": {"max_tokens": 6, "n": 2}},
        {"input": "a", "sampling_params": {"max_output_tokens": 7}},
        {"prompt": "a", "sampling_params": {"max_tokens": -1}},
        {"prompt": "boom", "sampling_params": {"max_tokens": 2}},
    ]
    spec = ReplicaSpec(options=EngineOptions(), served_names=("m",), created=5, max_retries=0)
    engine = FakeEngine(fail_prompts={"boom": 1})
    with Replica(spec, engine) as replica:
        given = [
            read_line(with_request({"custom_id": str(i), **row}, None)[REQUEST].encode(), i)
            for i, row in enumerate(rows)
        ]
        lines = [one.line for one in computed(replica, given)]
    *good, refused, lost = map(answered, lines)
    for line, columns in zip(lines, good, strict=False):
        body = json.loads(line)["response"]["body"]
        assert json.loads(columns["response"]) == body and columns[ERROR] == ""
        assert 0 < columns["num_generated_tokens"] and 0 < columns["num_input_tokens"]
    bodies = [json.loads(columns["response"]) for columns in good]
    assert good[0]["generated_text"] == bodies[0]["choices"][0]["message"]["content"] != ""
    assert good[1]["generated_text"] == bodies[1]["choices"][0]["text"] != ""
    assert good[1]["finish_reason"] == bodies[1]["choices"][0]["finish_reason"]
    assert good[2]["generated_text"] == bodies[2]["output"][0]["content"][0]["text"] != ""
    assert "max_tokens: got -1" in refused[ERROR]
    assert "a fault on purpose" in lost[ERROR] and lost[ERROR].startswith("request_failed: ")
    assert len({tuple(columns) for columns in (*good, refused, lost)}) == 1
