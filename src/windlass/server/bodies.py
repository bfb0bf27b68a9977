"""Request bodies: bytes to a JSON object, within limits."""

import asyncio
import json
from typing import Any

from starlette.requests import ClientDisconnect, Request

from windlass.server.errors import HttpError

_IN_A_THREAD = 1 << 18  # bytes from which parsing would hold up other streams
_PATIENCE_S = 60.0  # for the next piece of a body
_MOST_READ = 4  # times the limit, of a body that is too long: who hears of it must first be heard


async def read_object(
    request: Request, limit: int, *, patience_s: float = _PATIENCE_S
) -> dict[str, Any]:
    """The JSON object that the request holds. Raises HttpError: 415 for another content type, 413
    beyond `limit` bytes, 408 where nothing comes for `patience_s`, 400 for what is no UTF-8, no
    JSON, no object or nested without end."""
    kind = request.headers.get("content-type", "application/json").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise HttpError(415, f"content-type: got {kind or 'none'}, allowed application/json")
    if request.headers.get("content-encoding", "identity").lower() != "identity":
        raise HttpError(415, "content-encoding: allowed only identity")
    data = await _read(request, limit, patience_s)
    if len(data) < _IN_A_THREAD:
        return parse_object(bytes(data))
    return await asyncio.to_thread(parse_object, bytes(data))


async def _read(request: Request, limit: int, patience_s: float) -> bytearray:
    """Of what is too long the rest is read and dropped, or the sender would not hear of it."""
    announced = request.headers.get("content-length", "")
    length = int(announced[:20]) if announced.isdecimal() else 0
    if length > limit and (length > _MOST_READ * limit or "expect" in request.headers):
        raise _too_large(limit)
    data, count = bytearray(), 0
    pieces = request.stream()
    try:
        while (piece := await asyncio.wait_for(anext(pieces, None), patience_s)) is not None:
            count += len(piece)
            if count > _MOST_READ * limit:
                break
            if count <= limit:
                data += piece
            else:
                data.clear()
    except ClientDisconnect as error:
        raise HttpError(400, "the request's body did not arrive whole") from error
    except TimeoutError as error:
        raise HttpError(
            408, f"body: nothing has come for {patience_s:g} s", headers={"connection": "close"}
        ) from error
    if count > limit:
        raise _too_large(limit)
    return data


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
        raise HttpError(400, f"body: got a {type(found).__name__}, allowed a JSON object")
    return found


def _no_number(name: str) -> float:
    raise ValueError(f"{name} is no JSON number")


def _too_large(limit: int) -> HttpError:
    # the rest of the body may not have been read, and then the connection cannot go on
    return HttpError(
        413,
        f"body: got more than the {limit} bytes allowed (--max-body-size)",
        headers={"connection": "close"},
    )
