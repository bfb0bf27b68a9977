"""Request (frozen, from a front) and what an engine step gives back. Knows no model."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from windlass.engine.outputs import RequestOutput
from windlass.params import SamplingParams

# What fronts keep in the engine, times its capacity: a freed place is never left empty.
WINDOW = 2


@dataclass(frozen=True, slots=True)
class Request:
    """One prompt, already tokenised. `seed_key` is a stable name (a `custom_id`) from which seeds
    of unseeded requests are derived, so that order and restarts change nothing."""

    request_id: str
    prompt_token_ids: tuple[int, ...]
    params: SamplingParams
    seed_key: str


@dataclass(frozen=True, slots=True)
class Delta:
    """New text and tokens of one choice of a request in one step."""

    request_id: str
    index: int
    text: str
    token_ids: tuple[int, ...]


def joined(deltas: Sequence[Delta]) -> Delta:
    """Of one choice, one after the other, as one."""
    first = deltas[0]
    if len(deltas) == 1:
        return first
    tokens = (token for one in deltas for token in one.token_ids)
    return replace(first, text="".join(one.text for one in deltas), token_ids=tuple(tokens))


@dataclass(frozen=True, slots=True)
class StepResult:
    """What one `Engine.step` brought."""

    finished: tuple[RequestOutput, ...]
    deltas: tuple[Delta, ...]
