"""What a forecast keeps of a pass: states and choices of a few of its tokens, and what was foretold
of them.

T tokens of a pass, n of them looked at, D hidden, E experts of a layer, A experts of a token.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from windlass.forecast.gate import MOST_TOKENS, Foretold, Source
from windlass.forecast.interface import Floats
from windlass.forecast.selection import Singles
from windlass.schedule.batch import Batch
from windlass.schedule.observer import RoutedTokens

Places = NDArray[np.int64]


class Seen(NamedTuple):
    """A layer of a pass: what its router read before its norm, what it said (where that is wanted),
    and whom it chose. Copies."""

    residual_nD: Singles
    scores_nE: Singles | None
    ids_nA: Places


class Claim(NamedTuple):
    """What a source said of a layer: of each token, that any of them uses each expert, and what was
    expected of that before."""

    foretold: Foretold
    stood_E: Floats
    said_E: Floats


class Lesson(NamedTuple):
    """States, what was said of them (None: nothing), and what came."""

    x_nD: Singles
    claim: Claim | None
    scores_nE: Singles | None
    ids_nA: Places


class PassStates:
    """Of one pass."""

    def __init__(
        self, batch: Batch, last: "PassStates | None", normalise: Callable[[Singles], Singles]
    ) -> None:
        """`last`: the pass before it, where there is one; also below. `normalise`: as norms before
        routers do, without their weights; done when states are first asked for."""
        self._normalise = normalise
        self._states: dict[int, Singles] = {}
        self.rows_n = _sample(batch)
        self.is_whole = len(self.rows_n) == batch.num_tokens
        sequences, positions = batch.sequences, batch.positions
        names = [(sequences[row], positions[row]) for row in self.rows_n.tolist()]
        known: dict[tuple[int, int], int] = {} if last is None else last._place
        self._place: dict[tuple[int, int], int] = {name: i for i, name in enumerate(names)}
        # places in the last pass of the tokens before these; -1 where that was not looked at
        self._before_n = np.array([known.get((seq, at - 1), -1) for seq, at in names])
        self._followers = (self._before_n >= 0).nonzero()[0]
        self._all_follow = len(self._followers) == len(names)
        self.ends_n = self._ends(batch)
        # whether the last pass foretold these tokens: one for each that ended
        self.is_foretold = self.is_whole and self._are_ends_of(last, np.sort(self._before_n))
        self._seen: dict[int, Seen] = {}
        self.claims: dict[tuple[Source, int], Claim] = {}
        self.start_n2D: Singles | None = None
        self._final_nD: Singles | None = None

    def _ends(self, batch: Batch) -> Places | None:
        """Places of the tokens that others will follow; None if parts of prompts will, or they are
        too many."""
        segments = batch.segments
        if len(segments) > MOST_TOKENS or not all(one.wants_logits for one in segments):
            return None
        ends = np.cumsum([one.num_tokens for one in segments]) - 1
        return np.searchsorted(self.rows_n, ends)

    @staticmethod
    def _are_ends_of(last: "PassStates | None", places: Places) -> bool:
        return last is not None and last.ends_n is not None and np.array_equal(places, last.ends_n)

    def begin(self, embedded_TD: Singles, last: "PassStates | None") -> bool:
        """Takes the embeddings of all tokens; whether anything follows from them."""
        if last is None or last._final_nD is None or not len(self._followers):
            return False
        before_nD = self._normalise(last._final_nD)[self._before_n]
        before_nD[self._before_n < 0] = 0.0
        embedded_nD = self._normalise(embedded_TD[self.rows_n])
        self.start_n2D = np.concatenate((embedded_nD, before_nD), axis=1)
        return True

    def observe(self, tokens: RoutedTokens) -> None:
        """Takes what a layer routed."""
        rows_n, scores_TE = self.rows_n, tokens.scores_TE
        self._seen[tokens.layer] = Seen(
            np.asarray(tokens.residual_TD)[rows_n],
            None if scores_TE is None else np.asarray(scores_TE)[rows_n],
            np.asarray(tokens.ids_TA)[rows_n],
        )

    def end(self, final_TD: Singles) -> None:
        """Takes what leaves the last layer."""
        self._final_nD = final_TD[self.rows_n]

    def states(self, layer: int) -> Singles | None:
        """What the router of `layer` read, normalised; None if that was not seen."""
        if layer not in self._states:
            if layer not in self._seen:
                return None
            self._states[layer] = self._normalise(self._seen[layer].residual_nD)
        return self._states[layer]

    def lesson(
        self, source: Source, layer: int, before: int, last: "PassStates | None"
    ) -> Lesson | None:
        """What the routing of `layer` teaches of `source`, whose states are those of layer
        `before`; None if they were not seen."""
        own, claim = self._seen[layer], self.claims.get((source, layer))
        if source.layers_before:
            x_nD = self.states(before)
            return None if x_nD is None else Lesson(x_nD, claim, own.scores_nE, own.ids_nA)
        if last is None or not len(self._followers):
            return None
        rows = slice(None) if self._all_follow else self._followers
        if source is Source.START:
            if self.start_n2D is None:
                return None
            x_nD, claim = self.start_n2D[rows], claim if self._all_follow else None
        else:
            last_nD, places = last.states(layer), self._before_n[rows]
            if last_nD is None:
                return None
            is_said = self._are_ends_of(last, places)
            x_nD, claim = last_nD[places], last.claims.get((source, layer))
            claim = claim if is_said else None
        scores_nE = None if own.scores_nE is None else own.scores_nE[rows]
        return Lesson(x_nD, claim, scores_nE, own.ids_nA[rows])


def _sample(batch: Batch) -> Places:
    """Ascending rows: all, or those that others will follow and some evenly between."""
    total = batch.num_tokens
    if total <= MOST_TOKENS:
        return np.arange(total)
    ends = np.array(batch.logit_rows[-MOST_TOKENS:], np.int64)
    others = np.setdiff1d(np.linspace(0, total - 1, MOST_TOKENS, dtype=np.int64), ends)
    return np.sort(np.concatenate((ends, others[: MOST_TOKENS - len(ends)])))
