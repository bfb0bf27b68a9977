"""Eviction as other programs do it, to compare with. Each ranks all experts by one vector."""

from typing import Any

import numpy as np

from windlass.forecast.interface import ExpertTable, Floats
from windlass.ids import Part, WeightKey
from windlass.prefetch.expert_pool import ExpertPool
from windlass.schedule.batch import Batch
from windlass.schedule.observer import RoutedTokens

_MRS_SHARE = 0.5  # of the newest scores in the average: HybriMoE's code
_MRS_WIDTH = 2  # in top-k: how many scores of a row count


class QuotaPool(ExpertPool):
    """Gives every layer the same share of `slots`: a layer takes from one that has more than its
    share, else from itself. What does not divide evenly floats. Without a quota it is one pool."""

    def __init__(self, table: ExpertTable, slots: int | None) -> None:
        """`slots`: of the whole cache, None for one pool."""
        super().__init__(table)
        self._quota = None if slots is None else max(1, slots // max(1, len(table.layers)))
        self._gives = [True] * self._num_layers  # whether a layer may lose an expert now

    def victim(self, entering: WeightKey, layers: int | None) -> WeightKey | None:
        if self._quota is not None:
            self._gives = (self._in_layer > self._quota).tolist()
            if not any(self._gives):
                self._gives[entering.layer] = True
        return super().victim(entering, layers)

    def is_starved(self, layer: int) -> bool:
        return not self._gives[layer]


class LeastRecentlyUsed(QuotaPool):
    """Gives up what was used, or read ahead, longest ago."""

    def __init__(self, table: ExpertTable, slots: int | None) -> None:
        super().__init__(table, slots)
        self._touched = np.zeros(len(table))

    def used(self, place: int) -> None:
        self._touched[place] = self.now

    def add(self, key: WeightKey) -> None:
        super().add(key)
        if key.part is Part.EXPERT:
            self._touched[self._table.place(key)] = self.now

    def losses(self) -> Floats:
        return -self._touched


class LeastFrequentlyUsed(LeastRecentlyUsed):
    """Gives up what the fewest passes have used since the start, resident or not; of these what was
    used longest ago. Counts do not age."""

    def __init__(self, table: ExpertTable, slots: int | None) -> None:
        super().__init__(table, slots)
        self._uses = np.zeros(len(table))

    def used(self, place: int) -> None:
        super().used(place)
        self._uses[place] += 1.0

    def losses(self) -> Floats:
        return -self._uses - self._touched / (self.now + 1.0)


class LeastFrequentRecent(LeastFrequentlyUsed):
    """LFRU: gives up the smallest number of uses over passes since the last one, plus one. Counts
    age by themselves so."""

    def losses(self) -> Floats:
        return -self._uses / ((self.now - self._touched) / self._num_layers + 1.0)


class RecentScores(QuotaPool):
    """MRS of HybriMoE (arXiv 2504.05897): gives up the smallest average of router scores,
    `S <- a * TopP(s) + (1 - a) * S`, s being the shares of the scores of a pass (the mean over its
    rows), of which TopP keeps the largest 2 * top-k. It must be told of routing: implements
    `RoutingObserver` too."""

    wants_scores = True
    wants_states = False

    def __init__(self, table: ExpertTable, slots: int | None) -> None:
        super().__init__(table, slots)
        self._scores = table.uniform / table.top_k

    def begin(self, batch: Batch, embedded_TD: Any) -> None:
        pass

    def observe(self, tokens: RoutedTokens) -> None:
        scores_TE = np.asarray(tokens.scores_TE, np.float64)
        if scores_TE.min() < 0:  # logits
            scores_TE = np.exp(scores_TE - scores_TE.max(1, keepdims=True))
        shares_E = (scores_TE / scores_TE.sum(1, keepdims=True)).mean(0)
        width = min(len(shares_E), _MRS_WIDTH * self._table.top_k)
        least = np.partition(shares_E, -width)[-width]
        own = self._scores[self._table.slice(tokens.layer)]
        own *= 1 - _MRS_SHARE
        own += _MRS_SHARE * np.where(shares_E >= least, shares_E, 0.0)

    def end(self, final_TD: Any) -> None:
        pass

    def losses(self) -> Floats:
        return -self._scores
