"""What is known of prompts' tokens, by the blocks of rows that they follow, and what is kept of it
for prompts that begin alike. Knows no pages.

R rows of a block, or of a pass; K likeliest tokens.
"""

from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from windlass.schedule.batch import CHUNK_TOKENS, Scoring
from windlass.schedule.runtime import Outcome

_MOST = 1 << 19  # candidates that are kept, of 8 bytes


class ScoreRows(NamedTuple):
    """Of the tokens that follow some rows: log-probability, the likeliest in their place with
    theirs, best first, and rank."""

    logprobs_R: NDArray[Any]
    best_RK: NDArray[Any]
    best_logprobs_RK: NDArray[Any]
    ranks_R: NDArray[Any] | None

    @classmethod
    def of(cls, outcome: Outcome) -> "ScoreRows":
        """Of all targets of a pass, in segment order."""
        return cls(
            outcome.logprobs.numpy(),
            outcome.best.numpy().astype(np.int32),
            outcome.best_logprobs.numpy(),
            None if outcome.ranks is None else outcome.ranks.numpy(),
        )

    def rows(self, first: int, last: int, scoring: Scoring) -> "ScoreRows":
        """A copy of some, with what `scoring` says alone: others of the pass may want more."""
        some, ranks_R = slice(first, last), self.ranks_R if scoring.ranks else None
        return ScoreRows(
            self.logprobs_R[some].copy(),
            self.best_RK[some, : scoring.top].copy(),
            self.best_logprobs_RK[some, : scoring.top].copy(),
            None if ranks_R is None else ranks_R[some].copy(),
        )


@dataclass(slots=True, eq=False)
class BlockScores:
    """Of the rows of a block; None until the pass that computes them has run."""

    rows: ScoreRows | None = None


class KnownScores:
    """Scores by whatever they depend on, those least recently used forgotten beyond a bound."""

    def __init__(self) -> None:
        self._found: dict[Hashable, tuple[BlockScores, int]] = {}
        self._size = 0

    def find(self, name: Hashable) -> BlockScores | None:
        """None where nothing is known, nor will be when the next pass has run."""
        entry = self._found.pop(name, None)
        if entry is None:
            return None
        self._found[name] = entry
        return entry[0]

    def begin(self, name: Hashable, scoring: Scoring) -> BlockScores:
        """What the next pass fills."""
        self._forget(name)
        size = CHUNK_TOKENS * (1 + scoring.top)
        self._found[name] = BlockScores(), size
        self._size += size
        while self._size > _MOST:
            self._forget(next(iter(self._found)))
        return self._found[name][0]

    def _forget(self, name: Hashable) -> None:
        self._size -= self._found.pop(name, (None, 0))[1]

    def forget_all(self) -> None:
        self._found.clear()
        self._size = 0
