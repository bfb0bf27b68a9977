"""The ASGI application: paths to handlers, every failure to OpenAI's shape."""

import logging
from collections.abc import Awaitable, Callable, Sequence

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from windlass.protocol.chat_writer import chat_dialect
from windlass.protocol.openai import Endpoint
from windlass.server import anthropic_routes as anthropic
from windlass.server import batch_routes, file_routes, watching
from windlass.server import model_routes as own
from windlass.server import response_routes as responses
from windlass.server.errors import HttpError
from windlass.server.gate import Gate
from windlass.server.openai_routes import answer
from windlass.server.page import page
from windlass.server.state import ServerState

_LOG = logging.getLogger("windlass.server")
Handler = Callable[[ServerState, Request], Awaitable[Response]]


def make_app(state: ServerState, *, keys: Sequence[str] = (), host: str = "127.0.0.1") -> Starlette:
    """Serves `state`. `keys`: one of them is asked of every client; without any, only programs of
    this machine are served (`gate.py`). `host`: what the server listens at."""
    routes: dict[str, tuple[str, Handler]] = {
        "/health": ("GET", own.health),
        "/version": ("GET", own.version),
        "/metrics": ("GET", own.metrics),
        "/": ("GET", page),
        "/v1/stats": ("GET", watching.stats),
        "/v1/stats/stream": ("GET", watching.stream),
        "/v1/models": ("GET", own.models),
        "/v1/models/{name:path}": ("GET", own.model),
        "/tokenize": ("POST", own.tokenize),
        "/detokenize": ("POST", own.detokenize),
        "/tokenizer_info": ("GET", own.tokenizer_info),
        Endpoint.CHAT: ("POST", _answering(Endpoint.CHAT)),
        Endpoint.COMPLETIONS: ("POST", _answering(Endpoint.COMPLETIONS)),
        "/v1/messages": ("POST", anthropic.messages),
        "/v1/messages/count_tokens": ("POST", anthropic.count_tokens),
        "/v1/responses": ("POST", responses.create),
        "/v1/responses/input_tokens": ("POST", responses.input_tokens),
        "/v1/responses/{id}": ("GET DELETE", responses.kept),
        "/v1/responses/{id}/input_items": ("GET", responses.input_items),
        "/v1/responses/{id}/cancel": ("POST", responses.cancel),
        "/v1/files": ("GET POST", file_routes.files),
        "/v1/files/{name}": ("GET DELETE", file_routes.file),
        "/v1/files/{name}/content": ("GET", file_routes.content),
        "/v1/batches": ("GET POST", batch_routes.batches),
        "/v1/batches/{name}": ("GET", batch_routes.batch),
        "/v1/batches/{name}/cancel": ("POST", batch_routes.cancel),
    }
    return Starlette(
        routes=[
            Route(path, _bound(handler, state), methods=methods.split())
            for path, (methods, handler) in routes.items()
        ],
        middleware=[Middleware(Gate, keys=keys, host=host)],
        exception_handlers={
            HttpError: _told,
            HTTPException: _told_by_router,
            Exception: _unexpected,
        },
    )


def _answering(endpoint: Endpoint) -> Handler:
    dialect = chat_dialect(endpoint)
    return lambda state, request: answer(state, dialect, request)


def _bound(handler: Handler, state: ServerState) -> Callable[[Request], Awaitable[Response]]:
    async def run(request: Request) -> Response:
        return await handler(state, request)

    return run


async def _told(request: Request, error: Exception) -> Response:
    assert isinstance(error, HttpError)
    return error.response(request.url.path)


async def _told_by_router(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    where = f"{request.method} {request.url.path}"
    headers = dict(error.headers or {})
    if error.status_code == 405:
        methods = sorted(headers.get("Allow", "other methods").split(", "))
        message = f"{where}: allowed {', '.join(methods)}"
    elif error.status_code == 404:
        message = f"{where}: there is no such path"
    else:
        message = str(error.detail)
    return HttpError(error.status_code, message, headers=headers).response(request.url.path)


async def _unexpected(request: Request, error: Exception) -> Response:
    _LOG.error("%s %s failed", request.method, request.url.path, exc_info=error)
    found = HttpError(500, f"internal error: {type(error).__name__}: {error}")
    return found.response(request.url.path)
