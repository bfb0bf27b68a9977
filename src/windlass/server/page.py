"""The page at `/`: one file, which asks nobody but this server."""

import base64
import hashlib
import re
from functools import cache
from importlib.resources import files

from starlette.requests import Request
from starlette.responses import Response

from windlass.server.state import ServerState


async def page(state: ServerState, request: Request) -> Response:
    """The same for all; it knows nothing until it has the key."""
    text, policy = _page()
    return Response(
        text,
        headers={
            "content-type": "text/html; charset=utf-8",
            "content-security-policy": policy,
            "referrer-policy": "no-referrer",
            "x-content-type-options": "nosniff",
        },
    )


@cache
def _page() -> tuple[str, str]:
    """The file, and a policy that allows its own script and style and no others."""
    text = files("windlass.server").joinpath("page.html").read_text(encoding="utf-8")

    def hashes(tag: str) -> str:
        found = re.findall(f"<{tag}>(.*?)</{tag}>", text, re.DOTALL)
        digests = (hashlib.sha256(one.encode()).digest() for one in found)
        return " ".join(f"'sha256-{base64.b64encode(one).decode()}'" for one in digests)

    policy = (
        f"default-src 'none'; script-src {hashes('script')}; style-src {hashes('style')};"
        " connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none';"
        " frame-ancestors 'none'"
    )
    return text, policy
