"""Who may ask: the key, and without one only programs and pages of this machine. An ASGI
middleware, before any route."""

import hmac
import ipaddress
import uuid
from collections.abc import Sequence
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from windlass.server.errors import ANTHROPIC, HttpError

_OPEN_PATHS = frozenset({"/", "/health", "/version"})  # without a key: they tell no prompts
_REQUEST_ID = "x-request-id"
_LONGEST_ID = 128


class Gate:
    """Refuses who may not ask, answers preflights of local pages, and gives every response the id
    of its request.

    Without a key a page of any site could have the user's browser ask: so the host it asks for must
    be a number, localhost or `host`, which no foreign name can pretend to be (DNS rebinding), and a
    page that asks must itself be local.
    """

    def __init__(self, app: ASGIApp, *, keys: Sequence[str], host: str) -> None:
        self._app = app
        self._keys = [key.encode() for key in keys]
        self._host = host.lower()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        given = headers.get(_REQUEST_ID, "")
        request_id = given if 0 < len(given) <= _LONGEST_ID else uuid.uuid4().hex
        scope.setdefault("state", {})["request_id"] = request_id
        origin = headers.get("origin")
        is_local = origin is not None and _is_local(urlsplit(origin).hostname or "")

        async def tell(message: Message) -> None:
            if message["type"] == "http.response.start":
                own = MutableHeaders(scope=message)
                own[_REQUEST_ID] = request_id
                if scope["path"].startswith(ANTHROPIC):
                    own["request-id"] = request_id
                if origin is not None and is_local:
                    own["access-control-allow-origin"] = origin
                    own["access-control-expose-headers"] = _REQUEST_ID
                    own.add_vary_header("origin")
            await send(message)

        try:
            if scope["method"] == "OPTIONS" and "access-control-request-method" in headers:
                await _preflight(tell, headers, allowed=is_local)
                return
            self._check(scope["path"], headers, origin, is_local=is_local)
        except HttpError as error:
            await error.response(scope["path"])(scope, receive, tell)
            return
        await self._app(scope, receive, tell)

    def _check(self, path: str, headers: Headers, origin: str | None, *, is_local: bool) -> None:
        if self._keys:
            if path not in _OPEN_PATHS and not self._has_key(headers):
                raise HttpError(
                    401, "Incorrect API key provided", code="invalid_api_key",
                    headers={"www-authenticate": "Bearer"},
                )  # fmt: skip
            return
        asked = urlsplit("//" + headers.get("host", "localhost")).hostname or ""
        if not (_is_local(asked) or _is_number(asked) or asked == self._host):
            raise HttpError(
                403, f"host: got {asked:.80}, allowed this machine's (or use --api-key)"
            )
        if origin is not None and not is_local and urlsplit(origin).hostname != asked:
            raise HttpError(403, f"origin: got {origin:.80}, allowed pages of this machine")

    def _has_key(self, headers: Headers) -> bool:
        scheme, _, token = headers.get("authorization", "").partition(" ")
        given = token.strip()
        if scheme.lower() != "bearer":
            given = headers.get("x-api-key") or headers.get("api-key", "")
        found = given.encode("utf-8", "surrogateescape")
        return any([hmac.compare_digest(found, key) for key in self._keys])


async def _preflight(send: Send, asked: Headers, *, allowed: bool) -> None:
    headers = []
    if allowed:
        # clients send headers of their own, and whoever may ask may send any
        wanted = asked.get("access-control-request-headers", "content-type")
        headers = [
            (b"access-control-allow-methods", b"GET, HEAD, POST, DELETE, OPTIONS"),
            (b"access-control-allow-headers", wanted.encode("latin-1")),
            (b"access-control-max-age", b"600"),
        ]
    status = 204 if allowed else 403
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": b""})


def _is_local(name: str) -> bool:
    if name == "localhost" or name.endswith(".localhost"):
        return True
    return _is_number(name) and ipaddress.ip_address(name).is_loopback


def _is_number(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True
