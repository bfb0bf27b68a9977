"""What a client is told when a request cannot be served: a status and OpenAI's body."""

from collections.abc import Mapping

from starlette.responses import JSONResponse

from windlass.errors import RequestError
from windlass.protocol.responses import error_body, error_response

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

    def response(self) -> JSONResponse:
        kind = "server_error" if self.status >= 500 else "invalid_request_error"
        body = error_body(str(self), kind=_KINDS.get(self.status, kind), code=self.code)
        return JSONResponse(body, self.status, headers=self.headers)


def refusal(error: RequestError) -> JSONResponse:
    """Of a body that was read and is wrong."""
    status, body = error_response(error)
    return JSONResponse(body, status)
