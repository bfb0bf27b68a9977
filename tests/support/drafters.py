"""Drafters that know too much, or nothing, for tests."""

import random
from collections.abc import Iterable, Mapping, Sequence

from windlass.engine.drafting import Drafting
from windlass.engine.drafts import Guess
from windlass.engine.sequence import Sequence as EngineSequence


class Oracle:
    """Knows how texts go on: `answers` of prompts. Each token of a guess is spoilt with
    probability `wrong`."""

    def __init__(
        self, answers: Mapping[tuple[int, ...], Sequence[int]], *, wrong: float = 0.0, seed: int = 0
    ) -> None:
        self._answers = answers
        self._wrong = wrong
        self._chance = random.Random(seed)
        self._known: list[int] = []

    def extend(self, token_ids: Iterable[int]) -> None:
        self._known += token_ids

    def guess(self, count: int) -> Guess:
        for prompt, answer in self._answers.items():
            told = self._known[len(prompt) :]
            if tuple(self._known[: len(prompt)]) == prompt and told == list(answer[: len(told)]):
                following = answer[len(told) : len(told) + count]
                spoilt = (abs(t - (self._chance.random() < self._wrong)) for t in following)
                return Guess(tuple(spoilt), 1)
        return Guess((self._known[-1],) * count, 2)


class Eager(Drafting):
    """Computes all that is guessed, whatever it costs."""

    def propose(self, sequence: EngineSequence) -> tuple[int, ...]:
        return self._follow(sequence).drafter.guess(self.most).token_ids
