"""The input of a batch job: one OpenAI batch request per line. Scanned once for identities, then
read row by row; holds about 50 bytes per row. Knows no tokens and no results."""

import hashlib
import json
import os
import sys
import time
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, Protocol

import numpy as np

from windlass.engine.text_limits import ENCODING_BYTES
from windlass.errors import JobError, UsageError
from windlass.protocol.fields import shorten
from windlass.protocol.openai import Endpoint, text_chars
from windlass.units import format_bytes

DIGEST_BYTES = 16
_FIELDS = ("custom_id", "method", "url", "body")
_BOM = b"\xef\xbb\xbf"
_TELL_EVERY_S = 0.25
_STRUCTURES = ("response_format", "structured_outputs", "tool_choice")  # may ask for a grammar
_MAX_REPORTED = 10  # of duplicates or malformed lines, in one message
_LONG_LINE = 1 << 16  # bytes; what shorter ones take while they are read is not counted
_BODY_COPIES = 3  # of a body, before its prompt is text
_MARGIN = 1.15  # over what is held by the count
_CHUNK_BYTES, _MOST_CHUNKS = 60, 100_000  # that Python's encoder of JSON holds at a time
_INDEX_ROWS = 1 << 16  # whose numbers are Python's at a time: each takes 40 bytes
_MALFORMED_COPIES = 9  # of a line: itself, decoded and half read at 4 bytes a character


class LineProblem(NamedTuple):
    """What is wrong with a line (from 1); `code` as `Malformed` has it."""

    line: int
    code: str
    message: str


class BadLines(UsageError):
    """Lines that a job cannot have. `problems`: the first of them."""

    def __init__(self, message: str, problems: Sequence[LineProblem]) -> None:
        super().__init__(message)
        self.problems = tuple(problems)


@dataclass(frozen=True, slots=True)
class Malformed:
    """Why a line is no request; `code` in the words of OpenAI's batch validation."""

    code: str
    message: str


class LongRow(NamedTuple):
    """What a long line takes. Bytes while it is read, and of its body; characters of its text, as
    `text_chars` has them."""

    reading_bytes: int
    body_bytes: int
    num_chars: int

    def needed_bytes(self, most_chars: int) -> int:
        """Memory until its tokens are there. A text of more than `most_chars` is not encoded."""
        if self.num_chars > most_chars:
            return self.reading_bytes
        handling = _BODY_COPIES * self.body_bytes + ENCODING_BYTES * self.num_chars
        return max(self.reading_bytes, handling)


@dataclass(frozen=True, slots=True)
class JobRow:
    """One non-empty line. Either `endpoint` and `body` are set, or `malformed`."""

    index: int  # among the non-empty lines, from 0
    line: int  # in the file, from 1
    digest: bytes  # identity: custom_id and canonical request
    custom_id: str | None
    endpoint: Endpoint | None = None
    body: dict[str, Any] | None = None
    malformed: Malformed | None = None
    long: LongRow | None = None


class Notes(Protocol):
    """Whoever tells a person what goes on."""

    def note(self, text: str) -> None: ...


class JobFile:
    """A scanned input file. Raises UsageError if it cannot be read, BadLines if it holds a
    `custom_id` twice, or, if `strict`, any malformed line. `endpoint`: lines that name another one
    are malformed. `notes` hears now and then how far the scan is."""

    def __init__(
        self,
        path: Path,
        *,
        strict: bool = False,
        endpoint: Endpoint | None = None,
        notes: Notes | None = None,
    ) -> None:
        self.path = path
        self._endpoint = endpoint
        self._offsets = array("Q")
        self._lines = array("Q")
        self._digests = bytearray()
        self.num_malformed = 0
        self.long_rows: list[LongRow] = []
        self.wants_grammars = False  # whether a row may ask what its answer must look like
        self._scan(notes, strict=strict)

    def __len__(self) -> int:
        return len(self._offsets)

    def digests(self) -> "np.ndarray[Any, np.dtype[np.void]]":
        """(rows,) of 16 bytes each, in input order; a view."""
        return np.frombuffer(self._digests, dtype=f"V{DIGEST_BYTES}")

    def rows(self, wanted: "np.ndarray[Any, np.dtype[np.bool_]]") -> Iterator[JobRow]:
        """The rows where `wanted` is true, in input order, parsed as they are asked for. Raises
        JobError if the file changed since it was scanned."""
        with _open(self.path) as file:
            for start in range(0, len(wanted), _INDEX_ROWS):
                for index in np.flatnonzero(wanted[start : start + _INDEX_ROWS]).tolist():
                    # and nothing here holds it while the next is read
                    yield self._row(file, start + index)

    def _row(self, file: BinaryIO, index: int) -> JobRow:
        file.seek(self._offsets[index])
        row = _parse(file.readline(), self._lines[index], self._endpoint)
        start = index * DIGEST_BYTES
        if row is None or row.digest != self._digests[start : start + DIGEST_BYTES]:
            raise JobError(
                f"{self.path}: line {self._lines[index]} changed while the job was running"
            )
        return replace(row, index=index)

    def _scan(self, notes: Notes | None, *, strict: bool) -> None:
        ids = bytearray()  # 8 bytes per row: candidates for duplicates
        malformed: list[LineProblem] = []
        with _open(self.path) as file:
            size = os.fstat(file.fileno()).st_size
            offset = 0
            told_at = time.monotonic()
            for number, text in enumerate(file, start=1):
                if notes is not None and time.monotonic() - told_at >= _TELL_EVERY_S:
                    told_at = time.monotonic()
                    done = f"{format_bytes(offset)} of {format_bytes(size)}"
                    notes.note(f"scanning {self.path}: {number - 1} lines, {done}")
                row = _parse(text, number, self._endpoint)
                if row is not None:
                    self._offsets.append(offset)
                    self._lines.append(number)
                    self._digests += row.digest
                    ids += _id_hash(row)
                    if row.long is not None:
                        self.long_rows.append(row.long)
                    self.wants_grammars |= any(name in (row.body or ()) for name in _STRUCTURES)
                    if row.malformed is not None:
                        self.num_malformed += 1
                        if len(malformed) < _MAX_REPORTED:
                            problem = row.malformed
                            malformed.append(LineProblem(number, problem.code, problem.message))
                offset += len(text)
        self._refuse_duplicates(np.frombuffer(ids, dtype=np.uint64))
        if strict and malformed:
            raise BadLines(
                f"{self.path}: {self.num_malformed} malformed lines, --strict allows none:\n  "
                + "\n  ".join(problem.message for problem in malformed),
                malformed,
            )

    def _refuse_duplicates(self, ids: "np.ndarray[Any, np.dtype[np.uint64]]") -> None:
        ordered = np.sort(ids)
        twice = ordered[1:][ordered[1:] == ordered[:-1]]
        # rows with an equal 64-bit hash: look at the ids themselves
        suspects = np.flatnonzero(np.isin(ids, twice)).tolist() if len(twice) else []
        seen: dict[str, int] = {}
        found: list[str] = []
        problems: list[LineProblem] = []
        with _open(self.path) as file:
            for index in suspects:
                file.seek(self._offsets[index])
                row = _parse(file.readline(), self._lines[index], self._endpoint)
                if row is None or row.custom_id is None:
                    continue
                first = seen.setdefault(row.custom_id, row.line)
                if first != row.line:
                    same_id = f"{shorten(row.custom_id)}: lines {first} and {row.line}"
                    found.append(same_id)
                    problems.append(
                        LineProblem(row.line, "duplicate_custom_id", f"custom_id {same_id}")
                    )
        if found:
            more = len(found) - _MAX_REPORTED
            raise BadLines(
                f"{self.path}: custom_id must be unique:\n  "
                + "\n  ".join(found[:_MAX_REPORTED])
                + (f"\n  and {more} more" if more > 0 else ""),
                problems[:_MAX_REPORTED],
            )


def read_line(text: bytes, index: int) -> JobRow:
    """The row of one line that is not empty. Never raises."""
    row = _parse(text, index + 1, None)
    assert row is not None, "a line that is not empty"
    return replace(row, index=index)


def _open(path: Path) -> BinaryIO:
    if not path.is_file():
        what = "not a regular file" if path.exists() else "no such file"
        raise UsageError(f"input file: got {str(path)!r}: {what}")
    try:
        return path.open("rb")
    except OSError as error:
        raise UsageError(f"input file: got {str(path)!r}: {error.strerror}") from error


def _id_hash(row: JobRow) -> bytes:
    if row.custom_id is None:  # nothing to collide with: any value that is unique in practice
        return row.digest[:8]
    return hashlib.blake2b(row.custom_id.encode(), digest_size=8).digest()


def _parse(text: bytes, number: int, only: Endpoint | None) -> JobRow | None:
    """The row of one line, None if the line is empty. Never raises. `only`: the endpoint that it
    may name, if not any."""
    if number == 1:
        text = text.removeprefix(_BOM)
    text = text.strip()
    if not text:
        return None
    custom_id: str | None = None
    is_long = len(text) > _LONG_LINE
    try:
        document = _decode(text)
        # known even if the rest is wrong, so that the error row can be joined to its request
        if isinstance(document, dict) and isinstance(document.get("custom_id"), str):
            custom_id = document["custom_id"]
        endpoint, body, canonical = _request(document, only)
    except (_MalformedLine, RecursionError) as error:
        code = error.code if isinstance(error, _MalformedLine) else "invalid_json_line"
        malformed = Malformed(code, f"line {number}: {error}")
        digest = _digest(f"malformed {number}".encode(), text)
        long = LongRow(_MALFORMED_COPIES * len(text), 0, 0) if is_long else None
        return JobRow(0, number, digest, custom_id, malformed=malformed, long=long)
    assert custom_id is not None, "_request checks it"
    digest = _digest(custom_id.encode(), canonical)
    row = JobRow(0, number, digest, custom_id, endpoint, body)
    return replace(row, long=_weighed(row, text, canonical)) if is_long else row


def _weighed(row: JobRow, text: bytes, canonical: bytes) -> LongRow:
    """By what is held at once: the line, the same decoded and what is read of it; then the line,
    the body, and its canonical form as text and as bytes."""
    assert row.endpoint is not None and row.body is not None, "a row that was read"
    body, widest, count = 0, 1, 0
    for value in _values(row.body):
        count += 1
        size = sys.getsizeof(value)
        if isinstance(value, str) and value:
            widest = max(widest, size // len(value))
        if not (isinstance(value, int) and -5 <= value <= 256):  # those are shared
            body += size
    decoded = len(text) * (1 if text.isascii() else min(4, widest))
    parsed = decoded + body * (2 if b"\\" in text else 1)  # what has escapes is put together
    written = 2 * len(canonical) + _CHUNK_BYTES * min(2 * count, _MOST_CHUNKS)
    reading = len(text) + max(parsed, body + written)
    return LongRow(int(_MARGIN * reading), body, text_chars(row.endpoint, row.body))


def _values(document: Any) -> Iterator[Any]:
    """All values in a document, names of fields included."""
    left = [document]
    while left:
        value = left.pop()
        yield value
        if isinstance(value, dict):
            left += value
            left += value.values()
        elif isinstance(value, list):
            left += value


class _MalformedLine(Exception):
    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


def _decode(text: bytes) -> Any:
    try:
        document = json.loads(text.decode(), parse_constant=_refuse_constant)
        if b"\\u" in text:
            # lone surrogates are legal JSON escapes that no tokenizer and no UTF-8 file can take
            for value in _values(document):
                if isinstance(value, str):
                    value.encode()
    except (UnicodeDecodeError, UnicodeEncodeError) as error:
        raise _MalformedLine("invalid_json_line", f"not valid Unicode: {error.reason}") from error
    except ValueError as error:
        raise _MalformedLine("invalid_json_line", f"not valid JSON: {error}") from error
    return document


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON number")


def _request(document: Any, only: Endpoint | None = None) -> tuple[Endpoint, dict[str, Any], bytes]:
    """Endpoint, body and canonical form of a decoded line."""
    if not isinstance(document, dict):
        raise _MalformedLine("invalid_request", f"got {shorten(document)}, allowed an object")
    for name, kind in (("custom_id", str), ("method", str), ("url", str), ("body", dict)):
        if name not in document:
            raise _MalformedLine("missing_required_parameter", f"{name}: missing")
        if not isinstance(document[name], kind):
            word = "an object" if kind is dict else "a string"
            raise _MalformedLine(
                "invalid_type", f"{name}: got {shorten(document[name])}, allowed {word}"
            )
    unknown = [name for name in document if name not in _FIELDS]
    if unknown:
        raise _MalformedLine(
            "unknown_parameter", f"{unknown[0]}: not supported, allowed {', '.join(_FIELDS)}"
        )
    if document["method"] != "POST":
        raise _MalformedLine(
            "invalid_method", f"method: got {shorten(document['method'])}, allowed 'POST'"
        )
    try:
        endpoint = Endpoint(document["url"])
        if only not in (None, endpoint):
            raise ValueError("another endpoint than the batch's")
    except ValueError as error:
        allowed = only or " or ".join(Endpoint)
        raise _MalformedLine(
            "invalid_url", f"url: got {shorten(document['url'])}, allowed {allowed}"
        ) from error
    canonical = json.dumps([endpoint, document["body"]], sort_keys=True, separators=(",", ":"))
    return endpoint, document["body"], canonical.encode()


def _digest(name: bytes, content: bytes) -> bytes:
    digest = hashlib.blake2b(len(name).to_bytes(8, "little"), digest_size=DIGEST_BYTES)
    digest.update(name)
    digest.update(content)
    return digest.digest()
