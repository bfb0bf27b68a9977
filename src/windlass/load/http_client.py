"""HTTP/1.1 as a client that measures needs it: a connection for each request, bodies as they come.
Knows no API."""

import asyncio
import json
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from windlass.errors import UsageError

_LINE_BYTES = 2**22  # an event may be as long


class HttpError(Exception):
    """What came is no answer: the connection broke, or it is not HTTP."""


@dataclass(frozen=True, slots=True)
class Server:
    """Where to ask. `path` comes before that of each request."""

    host: str
    port: int
    is_tls: bool
    path: str
    headers: Mapping[str, str]

    @classmethod
    def at(cls, url: str, headers: Mapping[str, str]) -> "Server":
        """UsageError where `url` is not one of http or https."""
        try:
            parts = urlsplit(url)
            port = parts.port
        except ValueError as error:
            raise UsageError(f"base url: got {url!r}: {error}") from error
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise UsageError(f"base url: got {url!r}, allowed http://HOST:PORT or https://HOST")
        is_tls = parts.scheme == "https"
        return cls(
            parts.hostname, port or (443 if is_tls else 80), is_tls, parts.path.rstrip("/"), headers
        )


class Response:
    """The head of an answer, and its body as it comes."""

    def __init__(
        self, status: int, headers: Mapping[str, str], reader: asyncio.StreamReader
    ) -> None:
        self.status = status
        self._headers = headers
        self._reader = reader

    async def pieces(self) -> AsyncIterator[bytes]:
        """The body's bytes as they come. Raises HttpError where it breaks off."""
        try:
            if "chunked" in self._headers.get("transfer-encoding", "").lower():
                while size := int((await self._reader.readline()).partition(b";")[0], 16):
                    yield await self._reader.readexactly(size)
                    await self._reader.readexactly(2)
            elif "content-length" in self._headers:
                yield await self._reader.readexactly(int(self._headers["content-length"]))
            else:
                while data := await self._reader.read(2**16):
                    yield data
        except (EOFError, ValueError) as error:
            raise HttpError("the connection broke off within an answer") from error

    async def read(self) -> bytes:
        return b"".join([piece async for piece in self.pieces()])

    async def json(self) -> Any:
        """The whole body. HttpError where it is not JSON."""
        try:
            return json.loads(await self.read())
        except ValueError as error:
            raise HttpError("an answer is not JSON") from error

    async def events(self) -> AsyncIterator[bytes]:
        """What follows `data:` in each line of a stream of events."""
        rest = b""
        async for piece in self.pieces():
            *lines, rest = (rest + piece).split(b"\n")
            for line in lines:
                if line.startswith(b"data:"):
                    yield line[5:].strip()


@asynccontextmanager
async def ask(server: Server, method: str, path: str, body: Any = None) -> AsyncIterator[Response]:
    """Sends `body`, as JSON, and gives the answer once its head is there. Raises HttpError, and
    OSError where nobody listens."""
    data = b"" if body is None else json.dumps(body).encode()
    host = f"[{server.host}]" if ":" in server.host else server.host
    headers = {"host": f"{host}:{server.port}", "connection": "close",
               "content-type": "application/json", "content-length": len(data),
               **server.headers}  # fmt: skip
    lines = [f"{method} {server.path}{path} HTTP/1.1", *(f"{k}: {v}" for k, v in headers.items())]
    reader, writer = await asyncio.open_connection(
        server.host, server.port, ssl=True if server.is_tls else None, limit=_LINE_BYTES
    )
    try:
        writer.write("\r\n".join([*lines, "", ""]).encode() + data)
        await writer.drain()
        yield await _head(reader)
    finally:
        writer.close()
        with suppress(OSError):
            await writer.wait_closed()


async def _head(reader: asyncio.StreamReader) -> Response:
    first = (await reader.readline()).split()
    if len(first) < 2 or not first[0].startswith(b"HTTP/") or not first[1].isdigit():
        raise HttpError("the connection broke off before an answer" if not first else "not HTTP")
    headers: dict[str, str] = {}
    while line := (await reader.readline()).strip():
        name, _, value = line.decode("latin-1").partition(":")
        headers[name.strip().lower()] = value.strip()
    return Response(int(first[1]), headers, reader)
