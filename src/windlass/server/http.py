"""uvicorn's reading of HTTP, with a limit on what stands before a body, and what it refuses itself
in OpenAI's shape too: no application hears of it."""

import json
from http import HTTPStatus

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from windlass.protocol.responses import error_body

MAX_HEAD_BYTES = 1 << 16  # of the first line and the headers


class HttpProtocol(HttpToolsProtocol):
    """One connection."""

    _head_bytes = 0  # read of lines that have ended
    _pending_bytes = 0  # received since the head under way began
    _in_head = False

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._head_bytes, self._pending_bytes, self._in_head = 0, 0, True

    def on_url(self, url: bytes) -> None:
        self._count(len(url))
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        self._count(len(name) + len(value))
        super().on_header(name, value)

    def on_headers_complete(self) -> None:
        self._in_head = False
        super().on_headers_complete()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self._in_head and not self.transport.is_closing():
            self._pending_bytes += len(data)
            if self._pending_bytes > MAX_HEAD_BYTES:  # of a line without an end
                self.send_400_response("")

    def _count(self, num_bytes: int) -> None:
        self._head_bytes += num_bytes
        if self._head_bytes > MAX_HEAD_BYTES:
            raise ValueError("the head is too large")  # the parser calls send_400_response

    def send_400_response(self, msg: str) -> None:
        status, said = HTTPStatus.BAD_REQUEST, "not readable as HTTP"
        if max(self._head_bytes, self._pending_bytes) > MAX_HEAD_BYTES:
            status = HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE
            said = f"headers: too large, allowed {MAX_HEAD_BYTES} bytes"
        body = json.dumps(error_body(said)).encode()
        head = (
            f"HTTP/1.1 {status.value} {status.phrase}\r\ncontent-type: application/json\r\n"
            f"content-length: {len(body)}\r\nconnection: close\r\n\r\n"
        )
        self.transport.write(head.encode() + body)
        self.transport.close()
