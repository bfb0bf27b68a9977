"""multipart/form-data as it comes, cut anywhere: its parts and their bytes, none of them kept."""

from collections.abc import Iterator
from email.message import Message
from email.utils import collapse_rfc2231_value
from enum import Enum, auto
from typing import NamedTuple

from windlass.server.errors import HttpError

_MOST_HEADERS = 8192  # bytes of one part's


class Part(NamedTuple):
    """Where a part begins; the bytes that follow are its own."""

    name: str
    filename: str | None


class _State(Enum):
    DATA = auto()
    BETWEEN = auto()  # behind a delimiter
    HEADERS = auto()
    END = auto()


class MultipartReader:
    """Of one body. Raises HttpError: 415 for another content type, 400 for what is no multipart."""

    def __init__(self, content_type: str) -> None:
        found = _parameters("content-type", content_type)
        boundary = found.get_param("boundary", header="content-type")
        if found.get_content_type() != "multipart/form-data" or not boundary:
            raise HttpError(415, "content-type: allowed multipart/form-data with a boundary")
        text = collapse_rfc2231_value(boundary)
        self._delimiter = b"\r\n--" + text.encode("latin-1", "replace")
        self._buffer = bytearray(b"\r\n")  # the first delimiter may be the first bytes
        self._state = _State.DATA
        self._has_begun = False  # a part has; what comes before is nobody's

    def feed(self, data: bytes) -> Iterator[Part | bytes]:
        """What so many more bytes of the body bring."""
        self._buffer += data
        while (found := self._step()) is not None:
            if found:
                yield found

    def _step(self) -> Part | bytes | None:
        """The next piece of the buffer, empty for what is nobody's; None where it takes more."""
        if self._state is _State.DATA:
            return self._data()
        if self._state is _State.BETWEEN:
            return self._between()
        if self._state is _State.HEADERS:
            return self._headers()
        self._buffer.clear()
        return None

    def _data(self) -> bytes | None:
        at = self._buffer.find(self._delimiter)
        # the end may be the beginning of a delimiter
        end = at if at >= 0 else len(self._buffer) - len(self._delimiter) + 1
        if at < 0 and end <= 0:
            return None
        piece = bytes(self._buffer[:end])
        if at >= 0:
            self._state, end = _State.BETWEEN, end + len(self._delimiter)
        del self._buffer[:end]
        return piece if self._has_begun else b""

    def _between(self) -> bytes | None:
        if len(self._buffer) < 2:
            return None
        if self._buffer.startswith(b"--"):
            self._state = _State.END
        elif self._buffer.startswith(b"\r\n"):
            self._state = _State.HEADERS  # each begins with a line break then
        else:
            raise HttpError(400, "body: neither a part nor the end behind a boundary")
        return b""

    def _headers(self) -> Part | None:
        at = self._buffer.find(b"\r\n\r\n")
        if (at if at >= 0 else len(self._buffer)) > _MOST_HEADERS:
            raise HttpError(400, f"body: a part's headers have over {_MOST_HEADERS} bytes")
        if at < 0:
            return None
        found = _part(bytes(self._buffer[:at]))
        del self._buffer[: at + 4]
        self._state, self._has_begun = _State.DATA, True
        return found

    @property
    def has_ended(self) -> bool:
        """Whether the last boundary has come."""
        return self._state is _State.END


def _part(headers: bytes) -> Part:
    for line in headers.decode("utf-8", "replace").split("\r\n"):
        name, _, value = line.partition(":")
        if name.strip().lower() != "content-disposition":
            continue
        found = _parameters("content-disposition", value.strip())
        own, filename = (
            found.get_param(key, header="content-disposition") for key in ("name", "filename")
        )
        if own is not None:
            return Part(
                collapse_rfc2231_value(own),
                None if filename is None else collapse_rfc2231_value(filename),
            )
    raise HttpError(400, "body: a part without a name")


def _parameters(name: str, value: str) -> Message:
    message = Message()
    message[name] = value.replace("\r", " ").replace("\n", " ")
    return message
