"""What a client is told when a request cannot be served: a status and OpenAI's body, or Anthropic's
on its paths."""

from collections.abc import Mapping
from typing import Any

from starlette.responses import JSONResponse

from windlass.engine.outputs import RequestOutput
from windlass.errors import RequestError
from windlass.protocol.anthropic_writer import anthropic_error
from windlass.protocol.dialect import Failure
from windlass.protocol.responses import error_body, error_response

ANTHROPIC = "/v1/messages"  # where its paths begin
_KINDS = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}


class HttpError(Exception):
    """Ends the request with this status and message. `code`: OpenAI's word for it, if any."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.headers = headers

    def response(self, path: str) -> JSONResponse:
        """As clients of this path expect it."""
        kind = "server_error" if self.status >= 500 else "invalid_request_error"
        body = error_body(str(self), kind=_KINDS.get(self.status, kind), code=self.code)
        return _response(path, self.status, body, self.headers)


def refusal(error: RequestError, path: str) -> JSONResponse:
    """Of a body that was read and is wrong."""
    return _response(path, *error_response(error))


def failure(output: RequestOutput, path: str) -> JSONResponse:
    """Of an answer that ended with an error."""
    found = Failure.of(output)
    return _response(
        path, found.status, error_body(found.message, kind=found.kind, code=found.code)
    )


def _response(
    path: str, status: int, body: dict[str, Any], headers: Mapping[str, str] | None = None
) -> JSONResponse:
    if path.startswith(ANTHROPIC):
        body = anthropic_error(body["error"]["message"], status)
    return JSONResponse(body, status, headers=headers)
