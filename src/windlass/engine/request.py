"""Request (frozen, from a front) and what an engine step gives back. Knows no model."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from windlass.engine.outputs import LogprobsOfStep, RequestOutput
from windlass.params import SamplingParams

# What fronts keep in the engine, times its capacity: a freed place is never left empty.
WINDOW = 2


@dataclass(frozen=True, slots=True)
class Request:
    """One prompt, already tokenised. `seed_key` is a stable name (a `custom_id`) from which seeds
    of unseeded requests are derived, so that order and restarts change nothing, and the home; of a
    request that nobody has named (`is_named`) it is by chance, and the home follows from the prompt
    and the seed, so that the same request has the same bits again. `wants_deltas`:
    somebody looks at log-probabilities before the end. `is_batch`: nobody waits for it: it gives
    way to all others."""

    request_id: str
    prompt_token_ids: tuple[int, ...]
    params: SamplingParams
    seed_key: str
    wants_deltas: bool = False
    is_batch: bool = False
    is_named: bool = True


@dataclass(frozen=True, slots=True)
class Delta:
    """New text and tokens of one choice of a request in one step. `logprobs`: of each token, where
    the request wants any; the first one has those of the prompt then. The last one has a
    `finish_reason` and a `stop_reason`."""

    request_id: str
    index: int
    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[LogprobsOfStep, ...] = ()
    finish_reason: str | None = None
    stop_reason: str | int | None = None
    prompt_logprobs: tuple[LogprobsOfStep | None, ...] = ()


def joined(deltas: Sequence[Delta]) -> Delta:
    """Of one choice, one after the other, as one."""
    last = deltas[-1]
    if len(deltas) == 1:
        return last
    return replace(
        last,
        text="".join(one.text for one in deltas),
        token_ids=tuple(token for one in deltas for token in one.token_ids),
        logprobs=tuple(step for one in deltas for step in one.logprobs),
        prompt_logprobs=deltas[0].prompt_logprobs,
    )


@dataclass(frozen=True, slots=True)
class StepResult:
    """What one `Engine.step` brought."""

    finished: tuple[RequestOutput, ...]
    deltas: tuple[Delta, ...]
