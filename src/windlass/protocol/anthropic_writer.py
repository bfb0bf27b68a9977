"""Answers of Anthropic's `/v1/messages`: blocks and events from deltas. Knows no HTTP."""

import json
from collections.abc import Callable, Sequence
from hashlib import blake2b
from typing import Any

from windlass.engine.outputs import RequestOutput
from windlass.engine.request import Delta
from windlass.protocol.answers import AnswerReader
from windlass.protocol.dialect import Failure, item_id, whole_delta
from windlass.protocol.markup import Call, Content, Found, Reasoning
from windlass.protocol.openai import ApiRequest

_KINDS = {
    400: "invalid_request_error", 401: "authentication_error", 403: "permission_error",
    404: "not_found_error", 413: "request_too_large", 429: "rate_limit_error",
    503: "overloaded_error",
}  # fmt: skip


def anthropic_error(message: str, status: int) -> dict[str, Any]:
    """Anthropic's shape of an error."""
    kind = _KINDS.get(status, "invalid_request_error" if status < 500 else "api_error")
    return {"type": "error", "error": {"type": kind, "message": message}}


class MessageWriter:
    """`count`: of tokens in a text."""

    ping = 'event: ping\ndata: {"type": "ping"}\n\n'

    def __init__(self, api: ApiRequest, *, key: str, count: Callable[[str], int]) -> None:
        self._key = key
        self._count = count
        self._reader = AnswerReader(api.form)
        self._events: list[str] = []  # that are not sent yet
        self._block: dict[str, Any] | None = None  # the one that is open
        self._texts: list[str] = []  # of it
        self._message: dict[str, Any] = {
            "id": f"msg_{key}",
            "type": "message",
            "role": "assistant",
            "model": api.model,
            "content": [],
            "stop_reason": None,
            "stop_sequence": None,
            "usage": self._usage(len(api.prompts[0].token_ids), 0, 0),
        }

    def begin(self) -> str:
        self._event("message_start", message=self._message)
        return self._take()

    def piece(self, prompt: int, delta: Delta) -> str:
        found = self._reader.push(delta.text)
        if delta.finish_reason is not None:
            found += self._reader.finish()
        for one in found:
            self._tell(one)
        if delta.finish_reason is not None:
            if self._block is None:
                self._open({"type": "text", "text": ""})
            self._close()
            self._message |= self._stop(delta)
        return self._take()

    def _stop(self, delta: Delta) -> dict[str, str | None]:
        sequence = delta.stop_reason if isinstance(delta.stop_reason, str) else None
        reason = "end_turn"
        if delta.finish_reason == "length":
            reason = "max_tokens"
        elif self._reader.num_calls:
            reason, sequence = "tool_use", None
        elif sequence is not None:
            reason = "stop_sequence"
        return {"stop_reason": reason, "stop_sequence": sequence}

    def end(self, outputs: Sequence[RequestOutput]) -> str:
        (output,) = outputs
        blocks = self._message["content"]
        thought = sum(self._count(one["thinking"]) for one in blocks if one["type"] == "thinking")
        num_output = len(output.outputs[0].token_ids)
        usage = self._usage(len(output.prompt_token_ids), num_output, min(thought, num_output))
        self._message["usage"] = usage
        names = ("stop_reason", "stop_sequence")
        delta = {name: self._message[name] for name in names}
        self._event("message_delta", delta=delta, usage=usage)
        self._event("message_stop")
        return self._take()

    def failed(self, failure: Failure) -> str:
        self._event("error", error=anthropic_error(failure.message, failure.status)["error"])
        return self._take()

    def body(self, outputs: Sequence[RequestOutput]) -> dict[str, Any]:
        self.piece(0, whole_delta(outputs[0]))
        self.end(outputs)
        return self._message

    def _tell(self, one: Found) -> None:
        if isinstance(one, Call):
            self._close()
            ident = item_id("toolu", self._key, len(self._message["content"]))
            self._open({"type": "tool_use", "id": ident, "name": one.name, "input": {}})
            return
        if isinstance(one, (Content, Reasoning)):
            kind = "text" if isinstance(one, Content) else "thinking"
            if self._block is None or self._block["type"] != kind:
                self._close()
                more = {"signature": ""} if kind == "thinking" else {}
                self._open({"type": kind, kind: "", **more})
        assert self._block is not None, "arguments follow their call"
        self._texts.append(one.text)
        kind = self._block["type"]
        if kind == "tool_use":
            self._delta({"type": "input_json_delta", "partial_json": one.text})
        else:
            self._delta({"type": f"{kind}_delta", kind: one.text})

    def _open(self, block: dict[str, Any]) -> None:
        self._block, self._texts = block, []
        place = len(self._message["content"])
        self._event("content_block_start", index=place, content_block=block)

    def _close(self) -> None:
        """The open block, if any, is whole, or as much as there will be of it."""
        if (block := self._block) is None:
            return
        text, kind = "".join(self._texts), block["type"]
        if kind == "tool_use":
            block["input"] = _object(text)
        else:
            block[kind] = text
        if kind == "thinking":
            # clients send no thinking back that has none; here it is not looked at
            block["signature"] = blake2b(
                text.encode("utf-8", "replace"), digest_size=16
            ).hexdigest()
            self._delta({"type": "signature_delta", "signature": block["signature"]})
        self._event("content_block_stop", index=len(self._message["content"]))
        self._message["content"].append(block)
        self._block = None

    def _usage(self, num_input: int, num_output: int, thought: int) -> dict[str, Any]:
        """All of the prompt counts as input: what a client adds up is right."""
        return {
            "input_tokens": num_input,
            "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": 0,
            "output_tokens": num_output,
            "output_tokens_details": {"thinking_tokens": thought},
        }

    def _delta(self, delta: dict[str, str]) -> None:
        self._event("content_block_delta", index=len(self._message["content"]), delta=delta)

    def _event(self, kind: str, **fields: object) -> None:
        data = json.dumps({"type": kind, **fields})
        self._events.append(f"event: {kind}\ndata: {data}\n\n")

    def _take(self) -> str:
        text = "".join(self._events)
        self._events = []
        return text


def _object(text: str) -> dict[str, Any]:
    """Arguments of a call; empty where they were cut off, or are none."""
    try:
        found = json.loads(text or "{}")
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}
