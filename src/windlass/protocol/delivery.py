"""How a body wants its answer: whole or in pieces, with its prompt or without."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from windlass.errors import RequestError
from windlass.protocol.fields import optional, refuse_unknown


class Delivery(NamedTuple):
    """How a body wants its answer. `has_output`: false where it asks for the prompt alone.
    `token_ids`: ids are told beside texts; `names_ids`: log-probabilities name tokens by them.
    `prompt_logprobs`: alternatives of each token of a prompt, as vLLM tells them; None for none
    of it."""

    stream: bool = False
    include_usage: bool = False
    continuous_usage: bool = False
    echo: bool = False
    has_output: bool = True
    token_ids: bool = False
    names_ids: bool = False
    prompt_logprobs: int | None = None


def read_delivery(body: Mapping[str, Any], *, may_stream: bool) -> Delivery:
    """Of a body of either endpoint. Raises RequestError."""
    stream = bool(optional(body, "stream", bool))
    if stream and not may_stream:
        raise RequestError(
            "stream: allowed only false: results are delivered whole", param="stream",
            code="unsupported_parameter",
        )  # fmt: skip
    options = optional(body, "stream_options", dict)
    if options is not None and not stream:
        raise RequestError("stream_options: allowed only with stream", param="stream_options")
    names = ("include_usage", "continuous_usage_stats", "include_obfuscation")
    refuse_unknown(options or {}, names, where="stream_options.")
    wants = {name: bool(optional(options or {}, name, bool, where="stream_options."))
             for name in names}  # fmt: skip
    return Delivery(
        stream=stream,
        include_usage=wants["include_usage"],
        continuous_usage=wants["continuous_usage_stats"],
        echo=bool(optional(body, "echo", bool)),
        token_ids=bool(optional(body, "return_token_ids", bool)),
        names_ids=bool(optional(body, "return_tokens_as_token_ids", bool)),
    )
