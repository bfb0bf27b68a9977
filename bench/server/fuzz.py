"""Sends bodies that a seeded generator makes to every route of a server, and counts what comes:
`python bench/server/fuzz.py --url http://127.0.0.1:8000 --count 10000`.

Every answer must be a 200 or a refusal in OpenAI's shape (Anthropic's on its paths); a 5xx is a
failure, and so is a server that is gone. Bodies are right ones with some values changed, or made of
nothing.
"""

import argparse
import http.client
import json
import random
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing
from typing import Any, NamedTuple
from urllib.parse import urlsplit

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
RESPONSES, MESSAGES = "/v1/responses", "/v1/messages"
SCHEMA = {"type": "object", "properties": {"a": {"enum": ["x", "y"]}}, "required": ["a"]}
TOOL = {"type": "function", "function": {"name": "get", "parameters": SCHEMA}}
USER: dict[str, Any] = {"role": "user", "content": "hello"}
BASES: dict[str, dict[str, Any]] = {
    CHAT: {"messages": [USER], "max_tokens": 4},
    COMPLETIONS: {"prompt": "hello", "max_tokens": 4},
    RESPONSES: {"input": "hello", "max_output_tokens": 4},
    MESSAGES: {"messages": [USER], "max_tokens": 4},
    "/tokenize": {"prompt": "hello"},
    "/detokenize": {"tokens": [5, 6]},
}
GOOD: dict[str, list[Any]] = {
    "n": [1, 2], "stream": [True, False], "stream_options": [{"include_usage": True}],
    "temperature": [0, 1.5], "top_p": [0.5], "top_k": [3], "min_p": [0.1], "seed": [7, -1],
    "stop": ["e", ["a", "b"]], "stop_token_ids": [[5]], "logit_bias": [{"5": 3}],
    "logprobs": [True, 1, 5], "top_logprobs": [2], "echo": [True], "prompt_logprobs": [0, 1, 7],
    "min_tokens": [2], "ignore_eos": [True], "presence_penalty": [1], "frequency_penalty": [-1],
    "repetition_penalty": [1.2], "return_token_ids": [True], "best_of": [1], "suffix": ["x"],
    "return_tokens_as_token_ids": [True], "truncate_prompt_tokens": [1, -1], "user": ["u"],
    "response_format": [{"type": "json_object"}, {"type": "text"},
                        {"type": "json_schema", "json_schema": {"name": "n", "schema": SCHEMA}}],
    "structured_outputs": [{"regex": "[ab]+"}, {"choice": ["a", "b"]}, {"json": SCHEMA}],
    "tools": [[TOOL]], "tool_choice": ["auto", "none", "required",
                                       {"type": "function", "function": {"name": "get"}}],
    "parallel_tool_calls": [False], "continue_final_message": [True],
    "add_generation_prompt": [False], "reasoning_effort": ["low"], "include_reasoning": [False],
    "chat_template_kwargs": [{"x": 1}], "metadata": [{"a": "b"}], "store": [True],
    "allowed_token_ids": [[5, 6]], "max_tokens": [0, 1, 9], "max_completion_tokens": [3],
    "prompt": ["x", [5, 6], ["a", "b"], [[5], [6, 7]]], "tokens": [[], [0]], "model": ["nobody"],
    "messages": [[USER, {"role": "assistant", "content": "Well"}],
                 [{"role": "system", "content": [{"type": "text", "text": "a"}]}, USER]],
    "input": ["x", [USER]], "instructions": ["be kind"], "text": [{"format": {"type": "text"}}],
    "reasoning": [{"effort": "low"}], "include": [[]], "previous_response_id": ["resp_x"],
    "system": ["be kind", [{"type": "text", "text": "a"}]], "stop_sequences": [["a"]],
    "thinking": [{"type": "disabled"}], "max_output_tokens": [1, 20],
    "return_token_strs": [True], "add_special_tokens": [False], "priority": [0],
}  # fmt: skip
ODD: list[Any] = [
    None,
    True,
    False,
    0,
    1,
    -1,
    1e308,
    -0.0,
    10**30,
    2**63,
    "",
    "x",
    "é👋",
    "\x00",
    "\ud800",
    "a" * 3000,
    [],
    {},
    [None],
    [[]],
    [{}],
    [1, "a"],
    {"": 0},
    {"type": "text"},
    [5] * 2000,
]
RAW = (
    b"", b"{", b"[]", b"null", b'"x"', b"\xff\xfe", b"[" * 50_000, b'{"a":' * 20_000,
    b'{"max_tokens":' + b"9" * 5000 + b"}", b'{"temperature":NaN}', b"{} {}", b'{"a":1,"a":2}',
)  # fmt: skip


class Case(NamedTuple):
    """What is sent: bytes of a body, to a path."""

    path: str
    data: bytes


def cases(seed: int, count: int) -> Iterator[Case]:
    """The same for the same seed."""
    draw = random.Random(seed)
    for _ in range(count):
        path = draw.choice(list(BASES))
        if draw.random() < 0.03:
            yield Case(path, draw.choice(RAW))
            continue
        body: Any = dict(BASES[path]) if draw.random() < 0.9 else {}
        for name in draw.sample(sorted(GOOD), draw.randrange(4)):
            body[name] = draw.choice(GOOD[name]) if draw.random() < 0.6 else _odd(draw)
        if draw.random() < 0.2:
            body = _bent(draw, body)
        yield Case(path, json.dumps(body).encode())


def _odd(draw: random.Random, depth: int = 0) -> Any:
    if depth < 3 and draw.random() < 0.3:
        inner = [_odd(draw, depth + 1) for _ in range(draw.randrange(3))]
        return inner if draw.random() < 0.5 else dict.fromkeys(draw.sample(sorted(GOOD), 2), inner)
    return draw.choice(ODD)


def _bent(draw: random.Random, value: Any) -> Any:
    """With something within it replaced."""
    if isinstance(value, dict) and value and draw.random() < 0.8:
        name = draw.choice(list(value))
        return {**value, name: _bent(draw, value[name])}
    if isinstance(value, list) and value and draw.random() < 0.8:
        place = draw.randrange(len(value))
        return [*value[:place], _bent(draw, value[place]), *value[place + 1 :]]
    return _odd(draw)


def fault(path: str, status: int, body: bytes) -> str | None:
    """What is wrong with an answer; None where nothing is."""
    if status == 200:
        return None
    if not 400 <= status < 500:
        return f"status {status}"
    try:
        found = json.loads(body)
    except ValueError:
        return "the error is no JSON"
    error = found.get("error") if isinstance(found, dict) else None
    names = {"message", "type"} if path == MESSAGES else {"message", "type", "param", "code"}
    if not isinstance(error, dict) or set(error) != names:
        return "the error has another shape"
    return None if isinstance(error["message"], str) and error["message"] else "no message"


def run(send: Callable[[Case], tuple[int, bytes]], seed: int, count: int) -> Counter[int]:
    """How often each status came. Raises AssertionError at the first fault."""
    statuses: Counter[int] = Counter()
    for case in cases(seed, count):
        status, body = send(case)
        wrong = fault(case.path, status, body)
        assert wrong is None, f"{case.path} {case.data[:500]!r}: {wrong}: {body[:500]!r}"
        statuses[status] += 1
    return statuses


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    where = urlsplit(given.url)
    with closing(
        http.client.HTTPConnection(where.hostname or "", where.port, timeout=120)
    ) as connection:

        def send(case: Case) -> tuple[int, bytes]:
            connection.request("POST", case.path, case.data, {"content-type": "application/json"})
            response = connection.getresponse()
            return response.status, response.read()

        statuses = run(send, given.seed, given.count)
    sys.stdout.write(json.dumps({"seed": given.seed, "statuses": statuses}) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
