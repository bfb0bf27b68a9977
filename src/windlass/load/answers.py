"""One request to an OpenAI server, and when its pieces came. Times in seconds."""

import asyncio
import json
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from windlass.errors import WindlassError
from windlass.load.http_client import HttpError, Response, Server, ask

_T = TypeVar("_T")
_RETRY_S = 0.5
_TEXTS = ("content", "reasoning_content", "reasoning", "refusal", "tool_calls")


class ServerError(WindlassError):
    """The server to be measured cannot be asked."""


class NotReadyError(ServerError):
    """Nobody listens there, or loads a model as yet."""


@dataclass(frozen=True, slots=True)
class Ask:
    """A prompt and how many tokens its answer may have."""

    prompt: str
    output_len: int


@dataclass(slots=True)
class Answer:
    """What came of a request. `start`: when it was sent, of `time.perf_counter`; `itl_s`: between
    pieces of text. `error` says why there is nothing to measure."""

    start: float
    ttft_s: float = 0.0
    latency_s: float = 0.0
    itl_s: list[float] = field(default_factory=list)
    input_tokens: int = 0
    output_tokens: int = 0
    has_usage: bool = False
    text: str = ""
    error: str = ""

    def came(self, text: str) -> None:
        """A piece of text, now."""
        elapsed = time.perf_counter() - self.start
        if self.text or self.ttft_s:
            self.itl_s.append(elapsed - self.latency_s)
        else:
            self.ttft_s = elapsed
        self.latency_s = elapsed
        self.text += text

    def count(self, usage: Mapping[str, Any]) -> None:
        self.has_usage = True
        self.input_tokens = usage.get("prompt_tokens") or 0
        self.output_tokens = usage.get("completion_tokens") or 0

    @property
    def tpot_s(self) -> float | None:
        """Per token after the first; None where there is one at most."""
        if self.output_tokens < 2:
            return None
        return (self.latency_s - self.ttft_s) / (self.output_tokens - 1)


@dataclass(frozen=True, slots=True)
class Endpoint:
    """How requests are made. `backend`: one of `ENDPOINTS`; `fields`: those of every body."""

    server: Server
    backend: str
    path: str
    model: str
    fields: Mapping[str, Any]

    def body(self, one: Ask) -> dict[str, Any]:
        if self.backend == "openai":
            own = {"prompt": one.prompt, "max_tokens": one.output_len}
        else:
            own = {
                "messages": [{"role": "user", "content": one.prompt}],
                "max_completion_tokens": one.output_len,
            }
        return {"model": self.model, **own, **self.fields}

    async def stream(self, one: Ask) -> Answer:
        """Asks for a stream and measures it. Errors are in the answer."""
        body = {**self.body(one), "stream": True, "stream_options": {"include_usage": True}}
        answer = Answer(time.perf_counter())
        try:
            async with ask(self.server, "POST", self.path, body) as response:
                if response.status == 200:
                    await _read(response, answer)
                else:
                    answer.error = f"status {response.status}: {_message(await response.read())}"
        except (OSError, HttpError) as error:
            answer.error = str(error) or type(error).__name__
        if not answer.error and not answer.ttft_s:
            answer.error = "a stream without text"
        return answer

    async def whole(self, one: Ask) -> dict[str, Any]:
        """The answer, not streamed. Raises ServerError."""
        return await fetch(self.server, "POST", self.path, self.body(one))

    async def prompt_tokens(self, prompt: str) -> int:
        """What the server counts of a prompt. Raises ServerError."""
        usage = (await self.whole(Ask(prompt, 1))).get("usage") or {}
        if not isinstance(usage.get("prompt_tokens"), int):
            raise ServerError(f"{self.path}: no usage in the answer, which random prompts need")
        tokens: int = usage["prompt_tokens"]
        return tokens


async def patiently(ask_it: Callable[[], Awaitable[_T]], end: float) -> _T:
    """Asks again until `end`, of `time.monotonic`, while nothing is ready. Raises ServerError."""
    while True:
        try:
            return await ask_it()
        except NotReadyError:
            if time.monotonic() >= end:
                raise
        await asyncio.sleep(_RETRY_S)


async def fetch(server: Server, method: str, path: str, body: Any = None) -> dict[str, Any]:
    """An answer in JSON. Raises ServerError."""
    place = f"{server.host}:{server.port}{server.path}{path}"
    try:
        async with ask(server, method, path, body) as response:
            if response.status != 200:
                kind = NotReadyError if response.status == 503 else ServerError
                raise kind(f"{place}: status {response.status}: {_message(await response.read())}")
            found = await response.json()
    except (OSError, HttpError) as error:
        raise NotReadyError(f"{place}: {error}") from error
    if not isinstance(found, dict):
        raise ServerError(f"{place}: got {found!r:.80}, allowed an object")
    return found


async def _read(response: Response, answer: Answer) -> None:
    async for event in response.events():
        if event == b"[DONE]":
            break
        chunk = json.loads(event)
        if chunk.get("error"):
            answer.error = _message(event)
            return
        for choice in chunk.get("choices") or ():
            text = choice.get("text") or _delta(choice.get("delta") or {})
            if text or (choice.get("finish_reason") and not answer.ttft_s):
                answer.came(text)  # tokens without text have an end, too
        if chunk.get("usage"):
            answer.count(chunk["usage"])
    if not answer.has_usage:
        answer.output_tokens = 1 + len(answer.itl_s)


def _delta(delta: Mapping[str, Any]) -> str:
    found = (delta.get(name) for name in _TEXTS)
    return "".join(one if isinstance(one, str) else json.dumps(one) for one in found if one)


def _message(data: bytes) -> str:
    """Of an error, as OpenAI has it, or what came, on one line."""
    try:
        return str(json.loads(data)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return " ".join(data.decode(errors="replace").split())[:200]
