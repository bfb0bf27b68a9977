"""Log-probabilities of continuations, all in one job. Knows no harness.

Prompts are sorted by their tokens: those with the same context follow each other, and the blocks of
64 tokens that they share are computed once. Only rows from the one before the continuation on are
scored.
"""

from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import NamedTuple

from windlass.engine.outputs import LogprobsOfStep
from windlass.evals.jobs import Jobs
from windlass.params import SamplingParams


class Pair(NamedTuple):
    """Tokens of a context, at least one, and those of what follows it."""

    context: Sequence[int]
    continuation: Sequence[int]


class Score(NamedTuple):
    """Of a continuation: the sum of its log-probabilities, and whether each of its tokens was the
    likeliest."""

    logprob: float
    is_greedy: bool


def scores(jobs: Jobs, pairs: Sequence[Pair], note: Callable[[int, Score], None]) -> None:
    """Calls `note` with the place of each pair and its score, as they come. What is longer than the
    model can read loses tokens at its beginning. Raises RequestError."""
    places: dict[tuple[int, ...], list[tuple[int, int]]] = defaultdict(list)  # (place, start)
    for place, pair in enumerate(pairs):
        tokens = (*pair.context, *pair.continuation)[-(jobs.max_model_len - 1) :]
        # the first token follows nothing
        places[tokens].append((place, max(1, len(tokens) - len(pair.continuation))))
    ordered = sorted(places)
    params = [_scored(min(start for _, start in places[tokens])) for tokens in ordered]
    for number, output in jobs.results(ordered, params):
        assert output.prompt_logprobs is not None, "they were asked for"
        steps = list(zip(output.prompt_token_ids, output.prompt_logprobs, strict=True))
        for place, start in places[ordered[number]]:
            own = [_of_own(token, step) for token, step in steps[start:] if step is not None]
            assert len(own) == len(steps) - start, "a token has no log-probability"
            note(place, Score(sum(each.logprob for each in own), all(s.is_greedy for s in own)))


def _scored(start: int) -> SamplingParams:
    return SamplingParams(
        max_tokens=1,
        temperature=0.0,
        detokenize=False,
        ignore_eos=True,
        prompt_logprobs=1,
        prompt_logprob_ranks=False,
        prompt_logprob_start=start,
    )


def _of_own(token: int, step: LogprobsOfStep) -> Score:
    return Score(step[token].logprob, step[token].rank == 1)
