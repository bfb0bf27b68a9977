"""What a forecast keeps of a pass: states and choices of a few of its tokens, and what was foretold
of them.

T tokens of a pass, n of them looked at, D hidden, E experts of a layer.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from windlass.forecast.gate import MOST_TOKENS, Foretold, Source
from windlass.forecast.selection import Singles
from windlass.schedule.batch import Batch

Places = NDArray[np.int64]


class Seen(NamedTuple):
    """A layer of a pass: what its router read, normalised, and what it said. Scores where they are
    wanted."""

    x_nD: Singles
    scores_nE: Singles | None
    used_nE: NDArray[np.bool_]


class Lesson(NamedTuple):
    """States, what was foretold of them (None: nothing), and what came."""

    x_nD: Singles
    foretold: Foretold | None
    scores_nE: Singles | None
    used_nE: NDArray[np.bool_]


class PassStates:
    """Of one pass."""

    def __init__(self, batch: Batch, last: "PassStates | None") -> None:
        """`last`: the pass before it, where there is one; also below."""
        self.rows_n = _sample(batch)
        self.is_whole = len(self.rows_n) == batch.num_tokens
        sequences, positions = batch.sequences, batch.positions
        names = [(sequences[row], positions[row]) for row in self.rows_n.tolist()]
        known = {} if last is None else last._place
        self._place = {name: i for i, name in enumerate(names)}
        # places in the last pass of the tokens before these; -1 where that was not looked at
        self._before_n = np.array([known.get((seq, at - 1), -1) for seq, at in names])
        self._followers = (self._before_n >= 0).nonzero()[0]
        self._all_follow = len(self._followers) == len(names)
        self.ends_n = self._ends(batch)
        # whether the last pass foretold these tokens: one for each that ended
        self.is_foretold = self.is_whole and self._are_ends_of(last, np.sort(self._before_n))
        self.seen: dict[int, Seen] = {}
        self.foretold: dict[tuple[Source, int], Foretold] = {}
        self.start_n2D: Singles | None = None
        self.final_nD: Singles | None = None

    def _ends(self, batch: Batch) -> Places | None:
        """Places of the tokens that others will follow; None if parts of prompts will, or they are
        too many."""
        ends = batch.logit_rows
        if len(ends) != len(batch.segments) or len(ends) > MOST_TOKENS:
            return None
        return np.searchsorted(self.rows_n, ends)

    @staticmethod
    def _are_ends_of(last: "PassStates | None", places: Places) -> bool:
        return last is not None and last.ends_n is not None and np.array_equal(places, last.ends_n)

    def begin(self, embedded_nD: Singles, last: "PassStates | None") -> bool:
        """Takes the normalised embeddings; whether anything follows from them."""
        if last is None or last.final_nD is None or not len(self._followers):
            return False
        before_nD = last.final_nD[self._before_n]
        before_nD[self._before_n < 0] = 0.0
        self.start_n2D = np.concatenate((embedded_nD, before_nD), axis=1)
        return True

    def lesson(
        self, source: Source, layer: int, before: int, last: "PassStates | None"
    ) -> Lesson | None:
        """What the routing of `layer` teaches of `source`, whose states are those of layer
        `before`; None if they were not seen."""
        own, foretold = self.seen[layer], self.foretold.get((source, layer))
        if source.layers_before:
            x_nD = self.seen[before].x_nD if before in self.seen else None
            return None if x_nD is None else Lesson(x_nD, foretold, own.scores_nE, own.used_nE)
        if last is None or not len(self._followers):
            return None
        rows = slice(None) if self._all_follow else self._followers
        if source is Source.START:
            if self.start_n2D is None:
                return None
            x_nD, foretold = self.start_n2D[rows], foretold if self._all_follow else None
        else:
            if layer not in last.seen:
                return None
            places = self._before_n[rows]
            x_nD = last.seen[layer].x_nD[places]
            is_said = self._are_ends_of(last, places)
            foretold = last.foretold.get((source, layer)) if is_said else None
        scores_nE = None if own.scores_nE is None else own.scores_nE[rows]
        return Lesson(x_nD, foretold, scores_nE, own.used_nE[rows])


def _sample(batch: Batch) -> Places:
    """Ascending rows: all, or those that others will follow and some evenly between."""
    total = batch.num_tokens
    if total <= MOST_TOKENS:
        return np.arange(total)
    ends = np.array(batch.logit_rows, np.int64)[:MOST_TOKENS]
    others = np.setdiff1d(np.linspace(0, total - 1, MOST_TOKENS, dtype=np.int64), ends)
    return np.sort(np.concatenate((ends, others[: MOST_TOKENS - len(ends)])))
