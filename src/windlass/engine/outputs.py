"""What a finished request gives back: vLLM's shapes. No torch, no tokenizer."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

# Codes of errors while sampling; they come back whenever the row of logits does.
NOTHING_ALLOWED = "no_token_allowed"  # the request's constraints leave no token
GRAMMAR_FAILED = "grammar_failed"  # what the request's answer must look like is too complicated
NOT_FINITE = "logits_not_finite"  # the model's fault


class Logprob(NamedTuple):
    """One candidate of one step. `logprob` is of the model's raw distribution, before penalties
    and temperature (vLLM's `raw_logprobs`); `rank` is 1 for the most likely token. Joined
    `token_bytes` are the text, also where a token is a part of a character and `decoded_token` has
    U+FFFD."""

    logprob: float
    rank: int | None = None
    decoded_token: str | None = None
    token_bytes: bytes | None = None


LogprobsOfStep = Mapping[int, Logprob]  # token id -> its Logprob; the sampled token comes first


@dataclass(frozen=True, slots=True, kw_only=True)
class CompletionOutput:
    """One choice. `finish_reason`: stop, length, abort, error. `stop_reason`: the stop string or
    stop token id; None after an end-of-sequence token."""

    index: int
    text: str
    token_ids: tuple[int, ...]
    cumulative_logprob: float | None = None
    logprobs: tuple[LogprobsOfStep, ...] | None = None
    finish_reason: str | None = None
    stop_reason: str | int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestMetrics:
    """Moments of a request in `time.monotonic()` seconds; None where it did not get there."""

    arrival_time: float
    first_token_time: float | None = None
    finished_time: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestOutput:
    """The result of one prompt. `error` says why, where a choice's finish_reason is `error`;
    `error_code` (one of those above) is set where trying again would bring the same."""

    request_id: str
    prompt: str | None
    prompt_token_ids: tuple[int, ...]
    outputs: tuple[CompletionOutput, ...]
    finished: bool = True
    prompt_logprobs: tuple[LogprobsOfStep | None, ...] | None = None  # of the first token: None
    metrics: RequestMetrics | None = None
    num_cached_tokens: int = 0
    error: str | None = None
    error_code: str | None = None

    @classmethod
    def failed(
        cls, request_id: str, error: str, *, prompt: str | None = None,
        prompt_token_ids: tuple[int, ...] = (),
    ) -> "RequestOutput":  # fmt: skip
        """A row that brought nothing: one empty choice with `finish_reason` error."""
        nothing = CompletionOutput(index=0, text="", token_ids=(), finish_reason="error")
        return cls(
            request_id=request_id,
            prompt=prompt,
            prompt_token_ids=prompt_token_ids,
            outputs=(nothing,),
            error=error,
        )
