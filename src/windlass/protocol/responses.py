"""Response bodies of OpenAI's two endpoints, from finished outputs. Knows no engine, no files."""

import codecs
from collections.abc import Sequence
from hashlib import blake2b
from typing import Any

from windlass.engine.outputs import CompletionOutput, Logprob, LogprobsOfStep, RequestOutput
from windlass.errors import RequestError
from windlass.protocol.delivery import Delivery
from windlass.protocol.openai import ApiRequest, Echo, Endpoint, Prompt

_LOWEST = -9999.0  # JSON has no -inf; vLLM's and OpenAI's stand-in


def response_body(
    request: ApiRequest,
    outputs: Sequence[RequestOutput],
    *,
    key: str,
    created: int,
    tells_cached: bool = False,
) -> dict[str, Any]:
    """The body of a 200. `outputs` are in the order of `request.prompts`; `key` ends the id.
    `tells_cached`: what of the prompts was not computed again, which depends on what came before.
    """
    is_chat, delivery = request.endpoint is Endpoint.CHAT, request.delivery
    choices: list[dict[str, Any]] = []
    for prompt, output in zip(request.prompts, outputs, strict=True):
        top = prompt.params.logprobs
        for choice in sorted(output.outputs, key=lambda each: each.index):
            if is_chat:
                shaped = _chat_choice(choice, top, request, f"{key}/{len(choices)}")
            else:
                shaped = _completion_choice(choice, prompt, output, delivery)
            if delivery.token_ids:
                shaped |= {"prompt_token_ids": list(output.prompt_token_ids)} if not is_chat else {}
                shaped["token_ids"] = list(choice.token_ids) if delivery.has_output else []
            if not is_chat:
                shaped |= prompt_logprobs(delivery, output.prompt_logprobs)
            shaped["stop_reason"] = choice.stop_reason
            choices.append({"index": len(choices), **shaped})
    body: dict[str, Any] = {
        "id": id_of(request.endpoint, key),
        "object": "chat.completion" if is_chat else "text_completion",
        "created": created,
        "model": request.model,
        "choices": choices,
        "usage": usage_of(request, outputs, tells_cached=tells_cached),
    }
    if delivery.token_ids and is_chat:
        body["prompt_token_ids"] = list(outputs[0].prompt_token_ids)
    if is_chat:
        body |= prompt_logprobs(delivery, outputs[0].prompt_logprobs)
    return body


def prompt_logprobs(
    delivery: Delivery, steps: Sequence[LogprobsOfStep | None] | None
) -> dict[str, Any]:
    """The field as vLLM has it, by ids of each token of the prompt but the first; nothing where it
    is not asked for."""
    if delivery.prompt_logprobs is None or not steps:
        return {}
    count = delivery.prompt_logprobs
    return {"prompt_logprobs": [step and _prompt_step(step, count) for step in steps]}


def _prompt_step(step: LogprobsOfStep, count: int) -> dict[str, dict[str, Any]]:
    """The token itself, which comes first, and `count` of the likeliest."""
    return {
        str(token): {
            "logprob": _finite(own.logprob),
            "rank": own.rank,
            "decoded_token": own.decoded_token,
        }
        for place, (token, own) in enumerate(step.items())
        if not place or (own.rank or 0) <= count
    }


def id_of(endpoint: Endpoint, key: str) -> str:
    return ("chatcmpl-" if endpoint is Endpoint.CHAT else "cmpl-") + key


def usage_of(
    request: ApiRequest, outputs: Sequence[RequestOutput], *, tells_cached: bool = False
) -> dict[str, Any]:
    """Of all prompts together."""
    num_generated = sum(len(c.token_ids) for output in outputs for c in output.outputs)
    return usage(
        sum(len(output.prompt_token_ids) for output in outputs),
        num_generated if request.delivery.has_output else 0,
        num_cached(outputs) if tells_cached else None,
    )


def num_cached(outputs: Sequence[RequestOutput]) -> int:
    """Tokens of prompts that were not computed again."""
    return sum(output.num_cached_tokens for output in outputs)


def usage(num_prompt: int, num_generated: int, cached: int | None = None) -> dict[str, Any]:
    counted = {
        "prompt_tokens": num_prompt,
        "completion_tokens": num_generated,
        "total_tokens": num_prompt + num_generated,
    }
    if cached is None:
        return counted
    return {**counted, "prompt_tokens_details": {"cached_tokens": cached}}


def _named_by_ids(steps: Sequence[LogprobsOfStep]) -> tuple[LogprobsOfStep, ...]:
    """The same, with `token_id:ID` for the text of each token, as vLLM has it."""
    return tuple(
        {
            i: one._replace(decoded_token=f"token_id:{i}", token_bytes=None)
            for i, one in step.items()
        }
        for step in steps
    )


def error_body(
    error: RequestError | str, *, kind: str = "invalid_request_error", code: str | None = None
) -> dict[str, Any]:
    """OpenAI's shape of an error."""
    is_known = isinstance(error, RequestError)
    return {
        "error": {
            "message": str(error),
            "type": kind,
            "param": error.param if isinstance(error, RequestError) else None,
            "code": error.code if is_known and code is None else code,  # type: ignore[union-attr]
        }
    }


def error_response(error: RequestError) -> tuple[int, dict[str, Any]]:
    """HTTP status and body of a refused request."""
    is_missing = error.code in ("model_not_found", "response_not_found")
    return 404 if is_missing else 400, error_body(error)


def _chat_choice(
    choice: CompletionOutput, top: int | None, request: ApiRequest, key: str
) -> dict[str, Any]:
    logprobs = None
    if top is not None and choice.logprobs is not None:
        names_ids = request.delivery.names_ids
        logprobs = chat_logprobs(choice.token_ids, choice.logprobs, top, names_ids=names_ids)
    read = request.form.read(choice.text)
    message: dict[str, Any] = {"role": "assistant", "content": read.content, "refusal": None}
    if read.reasoning:
        message |= reasoning_fields(read.reasoning)
    if read.calls:
        message["content"] = read.content or None
        message["tool_calls"] = [
            {
                "id": call_id(key, place),
                "type": "function",
                "function": {"name": name, "arguments": arguments},
            }
            for place, (name, arguments) in enumerate(read.calls)
        ]
    return {
        "message": message,
        "logprobs": logprobs,
        "finish_reason": finish_reason(choice.finish_reason, has_calls=bool(read.calls)),
    }


def reasoning_fields(text: str) -> dict[str, str]:
    """Under both names that clients read."""
    return {"reasoning": text, "reasoning_content": text}


def call_id(key: str, place: int) -> str:
    """Of a call of the choice that is named `key`: the same in every run."""
    return "call_" + blake2b(f"{key}/{place}".encode(), digest_size=12).hexdigest()


def finish_reason(reason: str | None, *, has_calls: bool) -> str | None:
    return "tool_calls" if has_calls and reason == "stop" else reason


def chat_logprobs(
    token_ids: Sequence[int], steps: Sequence[LogprobsOfStep], top: int, *, names_ids: bool = False
) -> dict[str, Any]:
    """Log-probabilities of a chat answer's tokens."""
    steps = _named_by_ids(steps) if names_ids else steps
    pairs = zip(token_ids, steps, strict=True)
    return {"content": [_chat_step(token, step, top) for token, step in pairs], "refusal": None}


def _chat_step(token: int, step: LogprobsOfStep, top: int) -> dict[str, Any]:
    return {
        **_candidate(token, step[token]),
        "top_logprobs": [_candidate(i, candidate) for i, candidate in _best(step)[:top]],
    }


def _candidate(token: int, candidate: Logprob) -> dict[str, Any]:
    return {
        "token": _text(token, candidate),
        "logprob": _finite(candidate.logprob),
        "bytes": list(_bytes(token, candidate)),
    }


def _completion_choice(
    choice: CompletionOutput, prompt: Prompt, output: RequestOutput, delivery: Delivery
) -> dict[str, Any]:
    logprobs, echo = None, prompt.echo
    text = choice.text if delivery.has_output else ""
    if prompt.params.logprobs is not None and choice.logprobs is not None:
        writer = CompletionLogprobs(prompt.params.logprobs, names_ids=delivery.names_ids)
        if echo is not None:
            steps = output.prompt_logprobs or ()
            writer.add_prompt(echo, output.prompt_token_ids, steps)
        if delivery.has_output:
            writer.add(choice.token_ids, choice.logprobs)
        logprobs = writer.take()
    return {
        "text": text if echo is None else echo.text + text,
        "logprobs": logprobs,
        "finish_reason": choice.finish_reason if delivery.has_output else "length",
    }


class CompletionLogprobs:
    """Log-probabilities of a completion in OpenAI's four lists, piece by piece."""

    def __init__(self, top: int, *, names_ids: bool) -> None:
        self._top = top
        self._names_ids = names_ids
        self._offset = 0  # where the character begins that the token begins or goes on with
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._lists: dict[str, list[Any]] = self._empty()

    def add_prompt(
        self, echo: Echo, token_ids: Sequence[int], steps: Sequence[LogprobsOfStep | None]
    ) -> None:
        """The prompt: its first token follows nothing."""
        self._add(echo.first, echo.first.encode(), None, None)
        self.add(token_ids[1:], [step or {} for step in steps[1:]])

    def add(self, token_ids: Sequence[int], steps: Sequence[LogprobsOfStep]) -> None:
        """One step for each token."""
        steps = _named_by_ids(steps) if self._names_ids else steps
        for token, step in zip(token_ids, steps, strict=True):
            own = step[token]
            name, data = _name(token, own), _bytes(token, own)
            self._add(name, data, _finite(own.logprob), self._by_text(token, step))

    def _add(
        self, name: str, data: bytes, logprob: float | None, top: dict[str, float] | None
    ) -> None:
        lists = self._lists
        lists["tokens"].append(name)
        lists["token_logprobs"].append(logprob)
        lists["top_logprobs"].append(top)
        lists["text_offset"].append(self._offset)
        self._offset += len(self._decoder.decode(data))

    def take(self) -> dict[str, list[Any]]:
        """What was added since the last call."""
        lists, self._lists = self._lists, self._empty()
        return lists

    def _by_text(self, token: int, step: LogprobsOfStep) -> dict[str, float]:
        best = dict(_best(step)[: self._top])
        best.setdefault(token, step[token])
        by_text: dict[str, float] = {}
        for i, candidate in best.items():  # different ids may share a text: the likelier stays
            by_text.setdefault(_name(i, candidate), _finite(candidate.logprob))
        return by_text

    def _empty(self) -> dict[str, list[Any]]:
        return {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}


def _best(step: LogprobsOfStep) -> list[tuple[int, Logprob]]:
    return sorted(step.items(), key=lambda item: (-item[1].logprob, item[1].rank or 0))


def _text(token: int, candidate: Logprob) -> str:
    decoded = candidate.decoded_token
    return f"token_id:{token}" if decoded is None else decoded


def _bytes(token: int, candidate: Logprob) -> bytes:
    if candidate.token_bytes is None:
        return _text(token, candidate).encode("utf-8", "replace")
    return candidate.token_bytes


def _name(token: int, candidate: Logprob) -> str:
    """The text; of a part of a character its bytes, as OpenAI spells them: `bytes:\\xe4\\xbd`."""
    data = _bytes(token, candidate)
    try:
        data.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)
    return _text(token, candidate)


def _finite(logprob: float) -> float:
    return max(logprob, _LOWEST)
