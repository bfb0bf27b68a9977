"""Answers of `/v1/responses`: items and events from deltas, in OpenAI's order. Knows no HTTP."""

import json
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from windlass.engine.outputs import RequestOutput
from windlass.engine.request import Delta
from windlass.protocol.answers import AnswerReader
from windlass.protocol.dialect import PING, Failure, item_id, whole_delta
from windlass.protocol.markup import Call, Content, Found, Reasoning
from windlass.protocol.response_request import ResponseRequest
from windlass.protocol.responses import call_id, chat_logprobs

# Of what an item is made, by its type: the kind of its id, its part, the events of its text.
_PREFIX = {"message": "msg", "reasoning": "rs", "function_call": "fc"}
_TEXT_EVENT = {
    "message": "response.output_text", "reasoning": "response.reasoning_text",
    "function_call": "response.function_call_arguments",
}  # fmt: skip


class ResponseWriter:
    """`count`: of tokens in a text. `keep`: is given the response and what was asked, once it is
    whole and where it may be kept."""

    ping = PING

    def __init__(
        self,
        asked: ResponseRequest,
        *,
        key: str,
        count: Callable[[str], int],
        keep: Callable[[Mapping[str, Any], Sequence[Mapping[str, Any]]], None],
    ) -> None:
        self._asked = asked
        self._key = key
        self._count = count
        self._keep = keep
        self._response = asked.head
        self._reader = AnswerReader(asked.api.form)
        self._events: list[str] = []  # that are not sent yet
        self._num_events = 0
        self._item: dict[str, Any] | None = None  # the one that is open
        self._texts: list[str] = []  # of its text
        self._logprobs: list[Any] = []  # of its tokens
        self._pending: list[Any] = []  # log-probabilities that no text has taken yet
        self._reason: str | None = None

    def begin(self) -> str:
        self._event("response.created", response=self._response)
        self._event("response.in_progress", response=self._response)
        return self._take()

    def piece(self, prompt: int, delta: Delta) -> str:
        top = self._asked.api.prompts[prompt].params.logprobs
        if top is not None:
            self._pending += chat_logprobs(delta.token_ids, delta.logprobs, top)["content"]
        found = self._reader.push(delta.text)
        if delta.finish_reason is not None:
            found += self._reader.finish()
        for one in found:
            self._tell(one)
        if delta.finish_reason is not None:
            self._reason = delta.finish_reason
            if self._item is None:
                self._open("message")
            self._close("incomplete" if self._is_cut else "completed")
        return self._take()

    @property
    def _is_cut(self) -> bool:
        return self._reason == "length"

    def end(self, outputs: Sequence[RequestOutput]) -> str:
        status = "incomplete" if self._is_cut else "completed"
        details = {"reason": "max_output_tokens"} if self._is_cut else None
        more = {"status": status, "incomplete_details": details, "usage": self._usage(outputs)}
        self._response |= {**more, "completed_at": None if self._is_cut else int(time.time())}
        self._event(f"response.{status}", response=self._response)
        if self._asked.items:
            self._keep(self._response, self._asked.items)
        return self._take()

    def failed(self, failure: Failure) -> str:
        error = {"code": failure.code or failure.kind, "message": failure.message}
        self._event(
            "response.failed", response={**self._response, "status": "failed", "error": error}
        )
        return self._take()

    def body(self, outputs: Sequence[RequestOutput]) -> dict[str, Any]:
        self.piece(0, whole_delta(outputs[0]))
        self.end(outputs)
        return self._response

    def _tell(self, one: Found) -> None:
        if isinstance(one, Call):
            self._close("completed")
            self._open("function_call", one.name)
            return
        if isinstance(one, (Content, Reasoning)):
            kind = "message" if isinstance(one, Content) else "reasoning"
            if self._item is None or self._item["type"] != kind:
                self._close("completed")
                self._open(kind)
        assert self._item is not None, "arguments follow their call"
        self._texts.append(one.text)
        more: dict[str, Any] = {}
        if self._item["type"] == "message":
            more = {"logprobs": self._pending}
            self._logprobs += self._pending
            self._pending = []
        self._item_event(_TEXT_EVENT[self._item["type"]] + ".delta", delta=one.text, **more)

    def _open(self, kind: str, name: str = "") -> None:
        place = len(self._response["output"])
        item: dict[str, Any] = {
            "id": item_id(_PREFIX[kind], self._key, place), "type": kind, "status": "in_progress"
        }  # fmt: skip
        if kind == "function_call":
            item |= {"call_id": call_id(self._key, place), "name": name, "arguments": ""}
        elif kind == "message":
            item |= {"role": "assistant", "content": []}
        else:
            item |= {"summary": [], "content": [], "encrypted_content": None}
        self._item, self._texts, self._logprobs = item, [], []
        self._event("response.output_item.added", output_index=place, item=item)
        if kind != "function_call":
            self._item_event("response.content_part.added", part=self._part(""))

    def _part(self, text: str) -> dict[str, Any]:
        assert self._item is not None, "an item is open"
        if self._item["type"] == "reasoning":
            return {"type": "reasoning_text", "text": text}
        logprobs = self._logprobs
        return {"type": "output_text", "text": text, "annotations": [], "logprobs": logprobs}

    def _close(self, status: str) -> None:
        """The open item, if any, is whole, or as much as there will be of it."""
        if (item := self._item) is None:
            return
        text, event = "".join(self._texts), _TEXT_EVENT[item["type"]] + ".done"
        if item["type"] == "function_call":
            item["arguments"] = text
            self._item_event(event, name=item["name"], arguments=text)
        else:
            is_message = item["type"] == "message"
            if is_message and self._reason is not None:  # tokens without text, like the last one
                self._logprobs += self._pending
                self._pending = []
            more = {"logprobs": self._logprobs} if is_message else {}
            self._item_event(event, text=text, **more)
            part = self._part(text)
            item["content"] = [part]
            self._item_event("response.content_part.done", part=part)
        item["status"] = status
        place = len(self._response["output"])
        self._event("response.output_item.done", output_index=place, item=item)
        self._response["output"].append(item)
        self._item = None

    def _usage(self, outputs: Sequence[RequestOutput]) -> dict[str, Any]:
        (output,) = outputs
        num_input, num_output = len(output.prompt_token_ids), len(output.outputs[0].token_ids)
        texts = [one["content"][0]["text"] for one in self._response["output"]
                 if one["type"] == "reasoning"]  # fmt: skip
        details = {"cached_tokens": output.num_cached_tokens, "cache_write_tokens": 0}
        thought = min(num_output, sum(self._count(text) for text in texts))
        return {
            "input_tokens": num_input,
            "input_tokens_details": details,
            "output_tokens": num_output,
            "output_tokens_details": {"reasoning_tokens": thought},
            "total_tokens": num_input + num_output,
        }

    def _item_event(self, kind: str, **fields: object) -> None:
        """Of the open item, or of its one part."""
        assert self._item is not None, "an item is open"
        place = {"item_id": self._item["id"], "output_index": len(self._response["output"])}
        inner = {} if self._item["type"] == "function_call" else {"content_index": 0}
        self._event(kind, **place, **inner, **fields)

    def _event(self, kind: str, **fields: object) -> None:
        data = json.dumps({"type": kind, "sequence_number": self._num_events, **fields})
        self._events.append(f"event: {kind}\ndata: {data}\n\n")
        self._num_events += 1

    def _take(self) -> str:
        text = "".join(self._events)
        self._events = []
        return text
