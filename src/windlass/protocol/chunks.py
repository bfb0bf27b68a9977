"""Pieces of a streamed answer: OpenAI's chunks, from deltas. Knows no HTTP, no engine."""

import json
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

from windlass.engine.request import Delta
from windlass.protocol.answers import AnswerReader
from windlass.protocol.markup import Arguments, Call, Content, Found, Reasoning
from windlass.protocol.openai import ApiRequest, Endpoint
from windlass.protocol.responses import (
    CompletionLogprobs,
    call_id,
    chat_logprobs,
    finish_reason,
    id_of,
    prompt_logprobs,
    reasoning_fields,
    usage,
)

NOTHING: Mapping[str, object] = MappingProxyType({})


class ChunkWriter:
    """The chunks of one answer, each as JSON text. Choice `c` of prompt `p` is number p n + c."""

    def __init__(self, request: ApiRequest, *, key: str, created: int) -> None:
        self._request = request
        self._key = key
        self._readers: dict[int, AnswerReader] = {}  # of the choices of a chat
        self._is_chat = request.endpoint is Endpoint.CHAT
        head = {
            "id": id_of(request.endpoint, key),
            "object": "chat.completion.chunk" if self._is_chat else "text_completion",
            "created": created,
            "model": request.model,
        }
        self._head = json.dumps(head, separators=(",", ":"))[:-1] + ',"choices":'
        self._num_prompt = sum(len(prompt.token_ids) for prompt in request.prompts)
        self._num_generated = 0
        self._begun: set[int] = set()  # choices of a completion that have a chunk
        self._logprobs: dict[int, CompletionLogprobs] = {}

    def begin(self) -> list[str]:
        """Of chat: the role of each choice, before there is any text. Else nothing."""
        if not self._is_chat:
            return []
        count = sum(prompt.params.n for prompt in self._request.prompts)
        return [self._begin(number) for number in range(count)]

    def _begin(self, number: int) -> str:
        delta = {"role": "assistant", "content": ""}
        found = {"index": number, "delta": delta, "logprobs": None, "finish_reason": None}
        if self._request.delivery.token_ids and not number:
            ids = list(self._request.prompts[0].token_ids)
            return self._chunk([found], prompt_token_ids=ids)
        return self._chunk([found])

    def chunk(self, prompt: int, delta: Delta) -> str:
        """What one step brought to a choice of prompt number `prompt`."""
        params = self._request.prompts[prompt].params
        number = prompt * params.n + delta.index
        has_output = self._request.delivery.has_output
        self._num_generated += len(delta.token_ids) if has_output else 0
        choice: dict[str, Any] = {"index": number}
        if self._is_chat:
            choice["delta"] = self._delta(number, delta)
            wanted = params.logprobs
            names_ids = self._request.delivery.names_ids
            choice["logprobs"] = (
                None
                if wanted is None
                else chat_logprobs(delta.token_ids, delta.logprobs, wanted, names_ids=names_ids)
            )
        else:
            choice |= self._completion(prompt, number, delta)
        reader = self._readers.get(number)
        reason = finish_reason(delta.finish_reason, has_calls=bool(reader and reader.num_calls))
        choice["finish_reason"] = reason if has_output else "length"
        if delta.stop_reason is not None:
            choice["stop_reason"] = delta.stop_reason
        if self._request.delivery.token_ids:
            choice["token_ids"] = list(delta.token_ids) if has_output else []
        of_prompt = prompt_logprobs(self._request.delivery, delta.prompt_logprobs)
        if self._is_chat:
            return self._chunk([choice], **of_prompt)
        return self._chunk([choice | of_prompt])

    def _delta(self, number: int, delta: Delta) -> dict[str, Any]:
        """What is new of a chat's message."""
        reader = self._readers.setdefault(number, AnswerReader(self._request.form))
        found = reader.push(delta.text)
        if delta.finish_reason is not None:
            found += reader.finish()
        made: dict[str, Any] = {}
        content = _joined(found, Content)
        if content:
            made["content"] = content
        reasoning = _joined(found, Reasoning)
        if reasoning:
            made |= reasoning_fields(reasoning)
        calls = _calls(found, reader.num_calls, f"{self._key}/{number}")
        if calls:
            made["tool_calls"] = calls
        return made

    def _completion(self, prompt: int, number: int, delta: Delta) -> dict[str, Any]:
        own = self._request.prompts[prompt]
        is_first = number not in self._begun
        self._begun.add(number)
        text = delta.text if self._request.delivery.has_output else ""
        if own.echo is not None and is_first:
            text = own.echo.text + text
        found: dict[str, Any] = {"text": text, "logprobs": None}
        if own.params.logprobs is not None:
            names_ids = self._request.delivery.names_ids
            writer = self._logprobs.setdefault(
                number, CompletionLogprobs(own.params.logprobs, names_ids=names_ids)
            )
            if own.echo is not None and delta.prompt_logprobs:
                writer.add_prompt(own.echo, own.token_ids, delta.prompt_logprobs)
            if self._request.delivery.has_output:
                writer.add(delta.token_ids, delta.logprobs)
            found["logprobs"] = writer.take()
        if self._request.delivery.token_ids and is_first:
            found["prompt_token_ids"] = list(own.token_ids)
        return found

    def usage(self, cached: int) -> str:
        """The last chunk, where the body wants it. `cached`: tokens of prompts that were not
        computed again."""
        return self._text([], usage(self._num_prompt, self._num_generated, cached))

    def _chunk(self, choices: list[dict[str, Any]], **more: object) -> str:
        delivery = self._request.delivery
        if delivery.continuous_usage:
            return self._text(choices, usage(self._num_prompt, self._num_generated), more)
        has_usage = delivery.include_usage
        return self._text(choices, None, more, has_usage=has_usage)

    def _text(
        self,
        choices: list[dict[str, Any]],
        counted: dict[str, int] | None,
        more: Mapping[str, object] = NOTHING,
        *,
        has_usage: bool = True,
    ) -> str:
        end = f',"usage":{json.dumps(counted)}' if has_usage else ""
        rest = "".join(f",{json.dumps(name)}:{json.dumps(value)}" for name, value in more.items())
        return f"{self._head}{json.dumps(choices)}{end}{rest}}}"


def _joined(found: Sequence[Found], kind: type[Content] | type[Reasoning]) -> str:
    return "".join(one.text for one in found if isinstance(one, kind))


def _calls(found: Sequence[Found], num_calls: int, key: str) -> list[dict[str, Any]]:
    """Calls that have begun, and more of their arguments. `num_calls`: so far."""
    place = num_calls - sum(isinstance(one, Call) for one in found) - 1
    calls: list[dict[str, Any]] = []
    for one in found:
        if isinstance(one, Call):
            place += 1
            function = {"name": one.name, "arguments": ""}
            begun = {"index": place, "id": call_id(key, place), "type": "function"}
            calls.append({**begun, "function": function})
        elif isinstance(one, Arguments):
            if not (calls and calls[-1]["index"] == place):
                calls.append({"index": place, "function": {"arguments": ""}})
            calls[-1]["function"]["arguments"] += one.text
    return calls
