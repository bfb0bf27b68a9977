"""MoE-Infinity as in the paper (arXiv 2401.14361): what a pass will route is what requests did
before it whose choices were most like those of the pass so far.

A matrix of counts has a row of tokens by expert for each layer: of a pass (iEAM), or of all passes
of a request (rEAM). Layers are counted among those that have experts, from 0.
"""

from typing import Any

import numpy as np

from windlass.forecast.expert_map_store import ExpertMapStore, TrajectorySearch
from windlass.forecast.gate_shares import Rows, SequenceRows, chosen, merged
from windlass.forecast.interface import Candidates, ExpertTable, Outlook
from windlass.schedule.batch import Batch
from windlass.schedule.observer import RoutedTokens


class MoeInfinityForecast:
    """Implements `ExpertForecast`. The matrices of finished requests are kept in a collection of
    fixed capacity, a new one in place of the one most similar to it. The paper's value of expert j
    of a layer i ahead of layer l, `pEAM(i, j) = rownorm(sum of matched)(i, j) * (1 - (i - l) / L)`,
    is that of its candidates; `outlook.now` is the same without the factor, merged over sequences.

    Nobody says when a request ends: a sequence that is not in a pass has ended, or has given its
    turn to others; what it counted by then becomes an entry.
    """

    wants_scores = False
    threshold: float | None = None
    speculates: bool = True
    wants_states = False

    def __init__(self, table: ExpertTable, *, capacity: int = 1000, matches: int = 1) -> None:
        """`capacity`: matrices kept. `matches`: of them, so many are summed."""
        self.outlook = Outlook(table)
        self._table = table
        self._matches = matches
        self._index = {layer: index for index, layer in enumerate(table.layers)}
        sizes = [table.num_experts[layer] for layer in table.layers]
        for each in (self.outlook.now, self.outlook.next):
            each[:] = 1.0 / np.repeat(sizes, sizes)
        self.outlook.usage = self.outlook.next
        self._store = ExpertMapStore(0, sizes, capacity=capacity, distance=0)
        self._requests: dict[int, list[Rows]] = {}  # of the sequences of this pass
        self._rows: SequenceRows | None = None
        self._search: TrajectorySearch | None = None
        self._routed = -1
        self._is_due = False  # a match, when there is time

    @property
    def num_kept(self) -> int:
        """Matrices in the collection."""
        return self._store.num_maps

    def begin(self, batch: Batch, embedded_TD: Any = None) -> None:
        """A pass begins."""
        self._rows = SequenceRows(batch)
        before, sizes = self._requests, self._store.num_experts
        self._requests = {
            one: before.get(one) or [np.zeros(size, np.float32) for size in sizes]
            for one in self._rows.sequences
        }
        for one, counts in before.items():
            if one not in self._requests and counts[-1].any():
                self._store.add(np.zeros((1, 0), np.float32), [own_E[None] for own_E in counts])
        self._search = self._store.by_trajectory(len(self._rows.sequences))
        self._routed, self._is_due = -1, False
        self.outlook.now[:] = self.outlook.next
        self.outlook.version += 1

    def observe(self, tokens: RoutedTokens) -> None:
        """A layer has routed."""
        self._routed = routed = self._index[tokens.layer]
        self.outlook.now[self._table.slice(tokens.layer)] = np.asarray(tokens.counts_E) > 0
        self.outlook.version += 1
        if tokens.ids_TA is None or self._rows is None or self._search is None:
            return  # a clock that only counts
        counts_BE = self._rows.sum(chosen(tokens.ids_TA, self._table.num_experts[tokens.layer]))
        for one, own_E in zip(self._rows.sequences, counts_BE, strict=True):
            self._requests[one][routed] += own_E
        self._search.extend(routed, counts_BE)
        self._is_due = self._store.num_maps > 0

    def end(self, final_TD: Any = None) -> None:
        pass

    def work(self) -> bool:
        """Matches, once a layer."""
        is_due, self._is_due = self._is_due, False
        if is_due:
            self._match()
        return is_due

    def candidates(self, layer: int) -> Candidates:
        """Experts of all layers ahead that a matched request used, by pEAM; none before the first
        layer."""
        self.work()
        if self._routed < 0 or not self._store.num_maps:
            return Candidates(np.zeros(0, np.int64), np.zeros(0))
        layers = np.array(self._table.layers)
        ahead = layers.searchsorted(self._table.layer_of) - self._routed
        is_ahead = (ahead > 0) & (self._table.layer_of >= layer)
        value = self.outlook.now * (1.0 - ahead / len(layers))
        places = (is_ahead & (value > 0)).nonzero()[0]
        return Candidates(places, value[places])

    def _match(self) -> None:
        assert self._search is not None and self._rows is not None, "a layer outside a pass"
        scores_BC = self._search.scores()
        count = min(self._matches, scores_BC.shape[1])
        entries_BM = np.argpartition(-scores_BC, count - 1, axis=1)[:, :count]
        for index in range(self._routed + 1, len(self._index)):
            summed_BE = np.stack([self._store.rows(index, own).sum(0) for own in entries_BM])
            shares_BE = summed_BE / np.maximum(summed_BE.sum(1, keepdims=True), 1.0)
            own = self._table.slice(self._table.layers[index])
            chances_E = merged(shares_BE, self._rows.tokens_B)
            self.outlook.now[own] = self.outlook.next[own] = chances_E
        self.outlook.version += 1
