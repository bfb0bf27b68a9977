"""What an endpoint has of its own: how it reads a body as one of chat's, and how it writes the
answer. Knows no HTTP."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import Any, NamedTuple, Protocol

from windlass.engine.outputs import GRAMMAR_FAILED, NOTHING_ALLOWED, RequestOutput
from windlass.engine.request import Delta
from windlass.errors import RequestError
from windlass.protocol.openai import ApiRequest
from windlass.protocol.served import ServedModel

PING = ": ping\n\n"  # a comment of server-sent events


class Writer(Protocol):
    """Writes one answer: as text of server-sent events, "" for none, or whole. `ping`: what fills
    silence."""

    @property
    def ping(self) -> str: ...
    def begin(self) -> str: ...
    def piece(self, prompt: int, delta: Delta) -> str:
        """What one step brought to a choice of prompt number `prompt`."""
        ...

    def end(self, outputs: Sequence[RequestOutput]) -> str:
        """All have ended, none with an error."""
        ...

    def failed(self, failure: "Failure") -> str:
        """The last event, instead of `end`."""
        ...

    def body(self, outputs: Sequence[RequestOutput]) -> dict[str, Any]:
        """The whole answer, instead of any of those above."""
        ...


class Failure(NamedTuple):
    """Why an answer ends before its end: `kind` and `code` in OpenAI's words."""

    message: str
    kind: str = "server_error"
    code: str | None = None

    @property
    def status(self) -> int:
        """Of HTTP."""
        return 400 if self.kind == "invalid_request_error" else 500

    @classmethod
    def of(cls, output: RequestOutput) -> "Failure":
        """Of an answer that has an error: of the request's own, or the server's."""
        is_own = output.error_code in (NOTHING_ALLOWED, GRAMMAR_FAILED)
        kind = "invalid_request_error" if is_own else "server_error"
        return cls(str(output.error), kind, output.error_code)


class Asked(NamedTuple):
    """A body that was read."""

    api: ApiRequest
    writer: Writer


@dataclass(frozen=True, slots=True)
class Dialect:
    """`read`: of a body, asked of a model, with the key that ends the answer's id; raises
    RequestError, in which `names` are those of its fields, by those of chat."""

    read: Callable[[Mapping[str, Any], ServedModel, str], Asked]
    names: Mapping[str, str] = field(default_factory=dict)


def whole_delta(output: RequestOutput) -> Delta:
    """An answer of one choice as one piece, so that whole ones and streams are written alike."""
    (one,) = output.outputs
    return Delta(
        output.request_id, 0, one.text, one.token_ids, one.logprobs or (),
        one.finish_reason, one.stop_reason,
    )  # fmt: skip


def item_id(kind: str, key: str, place: int) -> str:
    """Of a part of the answer that is named `key`."""
    return f"{kind}_" + blake2b(f"{key}/{place}".encode(), digest_size=16).hexdigest()


def renamed(error: RequestError, names: Mapping[str, str]) -> RequestError:
    """The error with the names of this endpoint's fields. `names`: by those of chat."""
    head, *rest = (error.param or "").split(".", 1)
    if head not in names:
        return error
    param = ".".join([names[head], *rest])
    message = str(error)
    if message.startswith(head):
        message = names[head] + message.removeprefix(head)
    return RequestError(message, param=param, code=error.code)
