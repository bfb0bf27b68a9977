"""Request bodies: bytes to a JSON object, within limits."""

import asyncio
import json
from typing import Any

from starlette.requests import ClientDisconnect, Request

from windlass.server.errors import HttpError

_IN_A_THREAD = 1 << 18  # bytes from which parsing would hold up other streams


async def read_object(request: Request, limit: int) -> dict[str, Any]:
    """The JSON object that the request holds. Raises HttpError: 415 for another content type, 413
    beyond `limit` bytes, 400 for what is no UTF-8, no JSON, no object or nested without end."""
    kind = request.headers.get("content-type", "application/json").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise HttpError(415, f"content-type: got {kind or 'none'}, allowed application/json")
    if request.headers.get("content-encoding", "identity").lower() != "identity":
        raise HttpError(415, "content-encoding: allowed only identity")
    announced = request.headers.get("content-length", "")
    if announced.isdecimal() and int(announced) > limit:
        raise _too_large(limit)
    data = bytearray()
    try:
        async for piece in request.stream():
            data += piece
            if len(data) > limit:
                raise _too_large(limit)
    except ClientDisconnect as error:
        raise HttpError(400, "the request's body did not arrive whole") from error
    if len(data) < _IN_A_THREAD:
        return parse_object(bytes(data))
    return await asyncio.to_thread(parse_object, bytes(data))


def parse_object(data: bytes) -> dict[str, Any]:
    """Raises HttpError, as above."""
    try:
        found = json.loads(data.decode("utf-8"), parse_constant=_no_number)
    except UnicodeDecodeError as error:
        raise HttpError(400, f"body: not UTF-8: {error}") from error
    except RecursionError as error:
        raise HttpError(400, "body: nested too deeply") from error
    except ValueError as error:
        raise HttpError(400, f"body: not readable as JSON: {error}") from error
    if not isinstance(found, dict):
        raise HttpError(400, "body: allowed only a JSON object")
    return found


def _no_number(name: str) -> float:
    raise ValueError(f"{name} is no JSON number")


def _too_large(limit: int) -> HttpError:
    # the rest of the body is not read, so the connection cannot go on
    return HttpError(
        413, f"body: too large, allowed {limit} bytes", headers={"connection": "close"}
    )
