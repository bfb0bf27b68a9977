"""Response bodies of OpenAI's two endpoints, from finished outputs. Knows no engine, no files."""

import codecs
from collections.abc import Sequence
from typing import Any

from windlass.engine.outputs import CompletionOutput, Logprob, LogprobsOfStep, RequestOutput
from windlass.errors import RequestError
from windlass.protocol.openai import ApiRequest, Endpoint

_LOWEST = -9999.0  # JSON has no -inf; vLLM's and OpenAI's stand-in


def response_body(
    request: ApiRequest, outputs: Sequence[RequestOutput], *, key: str, created: int
) -> dict[str, Any]:
    """The body of a 200. `outputs` are in the order of `request.prompts`; `key` ends the id."""
    is_chat = request.endpoint is Endpoint.CHAT
    choices: list[dict[str, Any]] = []
    for prompt, output in zip(request.prompts, outputs, strict=True):
        for choice in sorted(output.outputs, key=lambda each: each.index):
            top = prompt.params.logprobs
            shaped = _chat_choice(choice, top) if is_chat else _completion_choice(choice, top)
            choices.append({"index": len(choices), **shaped})
    num_prompt = sum(len(output.prompt_token_ids) for output in outputs)
    num_generated = sum(len(c.token_ids) for output in outputs for c in output.outputs)
    return {
        "id": ("chatcmpl-" if is_chat else "cmpl-") + key,
        "object": "chat.completion" if is_chat else "text_completion",
        "created": created,
        "model": request.model,
        "choices": choices,
        "usage": {
            "prompt_tokens": num_prompt,
            "completion_tokens": num_generated,
            "total_tokens": num_prompt + num_generated,
        },
    }


def error_response(error: RequestError) -> tuple[int, dict[str, Any]]:
    """HTTP status and body of a refused request."""
    status = 404 if error.code == "model_not_found" else 400
    return status, {
        "error": {
            "message": str(error),
            "type": "invalid_request_error",
            "param": error.param,
            "code": error.code,
        }
    }


def _chat_choice(choice: CompletionOutput, top: int | None) -> dict[str, Any]:
    logprobs = None
    if top is not None and choice.logprobs is not None:
        steps = zip(choice.token_ids, choice.logprobs, strict=True)
        logprobs = {"content": [_chat_step(token, step, top) for token, step in steps]}
    return {
        "message": {"role": "assistant", "content": choice.text},
        "logprobs": logprobs,
        "finish_reason": choice.finish_reason,
    }


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


def _completion_choice(choice: CompletionOutput, top: int | None) -> dict[str, Any]:
    logprobs = None
    if top is not None and choice.logprobs is not None:
        logprobs = _completion_logprobs(choice, top)
    return {"text": choice.text, "logprobs": logprobs, "finish_reason": choice.finish_reason}


def _completion_logprobs(choice: CompletionOutput, top: int) -> dict[str, Any]:
    tokens, values, tops, offsets = [], [], [], []
    offset = 0  # where the character begins that the token begins or goes on with
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    for token, step in zip(choice.token_ids, choice.logprobs or (), strict=True):
        best = dict(_best(step)[:top])
        best.setdefault(token, step[token])
        by_text: dict[str, float] = {}
        for i, candidate in best.items():  # different ids may share a text: the likelier stays
            by_text.setdefault(_name(i, candidate), _finite(candidate.logprob))
        tokens.append(_name(token, step[token]))
        values.append(_finite(step[token].logprob))
        tops.append(by_text)
        offsets.append(offset)
        offset += len(decoder.decode(_bytes(token, step[token])))
    return {
        "tokens": tokens,
        "token_logprobs": values,
        "top_logprobs": tops,
        "text_offset": offsets,
    }


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
