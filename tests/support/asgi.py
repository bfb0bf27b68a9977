"""Asks an ASGI application without a network."""

import asyncio
import json
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Answered:
    """What came back. `pieces`: of the body, as they were sent."""

    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    pieces: list[bytes] = field(default_factory=list)

    @property
    def json(self) -> Any:
        return json.loads(b"".join(self.pieces))

    @property
    def events(self) -> list[str]:
        """Data of server-sent events."""
        text = b"".join(self.pieces).decode()
        return [line[6:] for line in text.split("\n") if line.startswith("data: ")]

    @property
    def chunks(self) -> list[Any]:
        """Events that are JSON; the last one must be the end."""
        *chunks, last = self.events
        assert last == "[DONE]", last
        return [json.loads(chunk) for chunk in chunks]


async def ask(
    app: Callable[..., Awaitable[None]],
    method: str,
    path: str,
    body: Any = None,
    *,
    headers: Mapping[str, str] | None = None,
    pieces: Sequence[bytes] | None = None,
    leaves_after: int | None = None,
    pause_s: float = 0.0,
) -> Answered:
    """One request. `path` may have a query. `body`: JSON of it is sent, or `pieces` as they are.
    `leaves_after`: pieces of the answer after which the client is gone. `pause_s`: that the client
    takes for a piece."""
    path, _, query = path.partition("?")
    given = {"host": "localhost", "content-type": "application/json", **(headers or {})}
    scope = {
        "type": "http", "asgi": {"version": "3.0", "spec_version": "2.3"}, "http_version": "1.1",
        "method": method, "path": path, "raw_path": path.encode(), "query_string": query.encode(),
        "scheme": "http", "client": ("127.0.0.1", 1), "server": ("127.0.0.1", 80), "root_path": "",
        "headers": [(name.lower().encode(), value.encode()) for name, value in given.items()],
    }  # fmt: skip
    left = list(pieces if pieces is not None else [json.dumps(body).encode()])
    answered, is_gone = Answered(), asyncio.Event()

    async def receive() -> dict[str, Any]:
        if left:
            return {"type": "http.request", "body": left.pop(0), "more_body": bool(left)}
        await is_gone.wait()
        return {"type": "http.disconnect"}

    async def send(message: dict[str, Any]) -> None:
        if message["type"] == "http.response.start":
            answered.status = message["status"]
            answered.headers = {
                name.decode().lower(): value.decode() for name, value in message["headers"]
            }
        elif message.get("body"):
            answered.pieces.append(message["body"])
            await asyncio.sleep(pause_s)
        if leaves_after is not None and len(answered.pieces) >= leaves_after:
            is_gone.set()

    if leaves_after == 0:
        asyncio.get_running_loop().call_later(0.05, is_gone.set)
    await app(scope, receive, send)
    return answered
