"""One batch as the server keeps it and clients see it. Frozen: a change is a new one."""

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any

from windlass.errors import RequestError
from windlass.files import replace_file
from windlass.protocol.fields import optional, refuse_unknown, required, shorten
from windlass.protocol.openai import Endpoint

_FIELDS = (
    "input_file_id", "endpoint", "completion_window", "metadata", "output_expires_after"
)  # fmt: skip
_UNIT_S = {"m": 60, "h": 3600, "d": 86400}
_LONGEST_S = 30 * 86400
_MOST_METADATA, _LONGEST_KEY, _LONGEST_VALUE = 16, 64, 512


class Status(StrEnum):
    """Of a batch, as OpenAI has them."""

    VALIDATING = "validating"
    FAILED = "failed"
    IN_PROGRESS = "in_progress"
    FINALIZING = "finalizing"
    COMPLETED = "completed"
    EXPIRED = "expired"
    CANCELLING = "cancelling"
    CANCELLED = "cancelled"


OPEN = (Status.VALIDATING, Status.IN_PROGRESS, Status.FINALIZING, Status.CANCELLING)


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchWish:
    """What a client asks for. Seconds; `result_lives_s`: of its files, None for ever."""

    input_file_id: str
    endpoint: str
    completion_window: str
    window_s: int
    metadata: Mapping[str, str] | None = None
    result_lives_s: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """`number` grows with each batch. `moments`: when it became what, seconds since 1970, by
    status. `total`, `ok`: rows; `bad`: those with errors. Files have their ids before they are
    there; `has_output` and `has_errors` tell whether they are. `errors`: why it failed."""

    id: str
    number: int
    wish: BatchWish
    created_at: int
    expires_at: int
    status: Status
    output_file_id: str
    error_file_id: str
    moments: Mapping[str, int] = field(default_factory=dict)
    total: int = 0
    ok: int = 0
    bad: int = 0
    has_output: bool = False
    has_errors: bool = False
    errors: tuple[Mapping[str, Any], ...] = ()

    @property
    def is_open(self) -> bool:
        return self.status in OPEN

    def shown(self, model: str, held: str | None) -> dict[str, Any]:
        """OpenAI's shape. `held`: why it does not go on."""
        wish, errors = self.wish, list(self.errors)
        if held is not None:
            errors.append(problem("held", held))
        times = {
            f"{status}_at": self.moments.get(status)
            for status in Status
            if status is not Status.VALIDATING
        }
        return {
            "id": self.id,
            "object": "batch",
            "endpoint": wish.endpoint,
            "model": model,
            "errors": {"object": "list", "data": errors} if errors else None,
            "input_file_id": wish.input_file_id,
            "completion_window": wish.completion_window,
            "status": self.status,
            "output_file_id": self.output_file_id if self.has_output else None,
            "error_file_id": self.error_file_id if self.has_errors else None,
            "created_at": self.created_at,
            "expires_at": self.expires_at,
            **times,
            "request_counts": {"total": self.total, "completed": self.ok, "failed": self.bad},
            "metadata": wish.metadata,
        }

    def write(self, path: Path) -> None:
        """The file appears whole or not at all. Raises OSError."""
        replace_file(path, json.dumps(asdict(self)).encode())

    @classmethod
    def read(cls, path: Path) -> "Batch":
        found = json.loads(path.read_bytes())
        wish, status = BatchWish(**found.pop("wish")), Status(found.pop("status"))
        errors = tuple(found.pop("errors"))
        return cls(wish=wish, status=status, errors=errors, **found)


def problem(code: str, message: str, line: int | None = None) -> dict[str, Any]:
    """An entry of a batch's errors. `line`: of the input file, from 1."""
    return {"code": code, "line": line, "message": message, "param": None}


def read_wish(body: Mapping[str, Any]) -> BatchWish:
    """A body of POST /v1/batches. Raises RequestError naming the field."""
    refuse_unknown(body, _FIELDS)
    endpoint = required(body, "endpoint", str)
    if endpoint not in tuple(Endpoint):
        raise RequestError(
            f"endpoint: got {shorten(endpoint)}, allowed {', '.join(Endpoint)}", param="endpoint"
        )
    window = required(body, "completion_window", str)
    found = re.fullmatch(r"([1-9]\d{0,4})([mhd])", window)
    window_s = int(found[1]) * _UNIT_S[found[2]] if found else 0
    if not 0 < window_s <= _LONGEST_S:
        raise RequestError(
            f"completion_window: got {shorten(window)}, allowed '24h' or other minutes (m), hours "
            "(h) and days (d), at most '30d'",
            param="completion_window",
        )
    return BatchWish(
        input_file_id=required(body, "input_file_id", str),
        endpoint=endpoint,
        completion_window=window,
        window_s=window_s,
        metadata=_metadata(optional(body, "metadata", dict)),
        result_lives_s=_lifetime(optional(body, "output_expires_after", dict)),
    )


def _metadata(given: dict[str, Any] | None) -> dict[str, str] | None:
    for name, value in (given or {}).items():
        if not isinstance(value, str) or len(name) > _LONGEST_KEY or len(value) > _LONGEST_VALUE:
            raise RequestError(
                f"metadata.{shorten(name)}: got {shorten(value)}, allowed names of {_LONGEST_KEY} "
                f"characters with texts of {_LONGEST_VALUE}",
                param="metadata",
            )
        if _has_surrogates(name + value):
            raise RequestError("metadata: got half a character", param="metadata")
    if given is not None and len(given) > _MOST_METADATA:
        raise RequestError(
            f"metadata: got {len(given)} names, allowed {_MOST_METADATA}", param="metadata"
        )
    return given


def _has_surrogates(text: str) -> bool:
    """JSON may escape them; no UTF-8 has them."""
    return any("\ud800" <= char <= "\udfff" for char in text)


def _lifetime(given: dict[str, Any] | None) -> int | None:
    if given is None:
        return None
    refuse_unknown(given, ("anchor", "seconds"), where="output_expires_after.")
    required(given, "anchor", str, where="output_expires_after.")
    return lifetime(
        given["anchor"], required(given, "seconds", int, where="output_expires_after."),
        where="output_expires_after",
    )  # fmt: skip


def lifetime(anchor: str | None, seconds: int, *, where: str) -> int:
    """Seconds that a file lives. Raises RequestError."""
    if anchor != "created_at":
        raise RequestError(
            f"{where}.anchor: got {shorten(anchor)}, allowed 'created_at'", param=f"{where}.anchor"
        )
    if not 3600 <= seconds <= _LONGEST_S:
        raise RequestError(
            f"{where}.seconds: got {seconds}, allowed 3600 to {_LONGEST_S}",
            param=f"{where}.seconds",
        )
    return seconds
