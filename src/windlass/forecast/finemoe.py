"""FineMoE as in the paper (arXiv 2502.05370): what a pass will route is looked up in the expert map
of the most similar pass before it.

B sequences of a pass, E experts of a layer, H hidden. Layers are counted among those that have
experts, from 0; -1 is the beginning of a pass. A sequence's part of a pass has one map: of a prompt
chunk the means over its rows.
"""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from windlass.errors import UsageError
from windlass.forecast.expert_map_store import ExpertMapStore, Found, TrajectorySearch
from windlass.forecast.gate_shares import Rows, SequenceRows, chosen, merged, shares_of
from windlass.forecast.interface import Candidates, ExpertTable, Floats, Outlook
from windlass.forecast.worker import Executor, Inline, Worker
from windlass.schedule.batch import Batch
from windlass.schedule.observer import RoutedTokens


@dataclass(frozen=True, slots=True, kw_only=True)
class FineMoeSettings:
    """`distance`: d, layers between a search and the layer it is for. `capacity`: maps kept.
    Ablations: without `semantic` the first d layers have no forecast; without `widens` it is
    always top-k experts; of `counts` a map knows the winners alone. `delay`: None: a thread
    searches beside the pass, which never waits for it; else no thread, and what is found after a
    layer is known so many layers later (the same results)."""

    distance: int = 3
    capacity: int = 1000
    semantic: bool = True
    widens: bool = True
    tracks: Literal["gates", "counts"] = "gates"
    delay: int | None = None

    def __post_init__(self) -> None:
        for name, value, least in (
            ("distance", self.distance, 1), ("delay", self.delay or 0, 0),
        ):  # fmt: skip
            if value < least:
                raise UsageError(f"{name} of finemoe: got {value}, allowed at least {least}")


class MapFile(NamedTuple):
    """Where maps are kept between runs, and the stamp of the model they are of."""

    path: Path
    stamp: str


@dataclass(slots=True)
class FineMoeStats:
    """Layers that a search found a map for, of these such that came after their gate; sequences'
    look-ups that delta made wider than top-k; passes whose maps were kept; contexts that the
    matcher did not get, because too many waited."""

    found: int = 0
    late: int = 0
    widened: int = 0
    kept: int = 0
    dropped: int = 0


class _Match(NamedTuple):
    """What a search after layer `after` of a pass found for `layer`: chances that any row uses an
    expert, and the experts worth a read."""

    number: int
    after: int
    layer: int
    chances_E: Floats
    places: NDArray[np.int64]


class FineMoeForecast:
    """Implements `ExpertForecast`. `outlook.now` is the router's share in the map that was found
    (merged over rows by `1 - prod(1 - p)`), until the layer has routed; `next` and `usage` are the
    same, but stay as they are until another map is found for their layer. Before the first one all
    experts of a layer share alike. `close` must be called."""

    wants_scores = True
    threshold: float | None = None
    speculates: bool = True
    wants_states = True

    def __init__(
        self,
        table: ExpertTable,
        hidden: int,
        settings: FineMoeSettings = FineMoeSettings(),
        *,
        are_logits: bool = False,
        file: MapFile | None = None,
    ) -> None:
        """`hidden`: numbers of an embedding. `are_logits`: of the scores; see `gate_shares`.
        `file`: is read now where it exists, and written by `close`. UsageError."""
        self.stats = FineMoeStats()
        self.outlook = Outlook(table)
        self._table, self._settings, self._file = table, settings, file
        self._are_logits, self._delay = are_logits, settings.delay or 0
        self._index = {layer: index for index, layer in enumerate(table.layers)}
        sizes = [table.num_experts[layer] for layer in table.layers]
        for each in (self.outlook.now, self.outlook.next):
            each[:] = 1.0 / np.repeat(sizes, sizes)
        self.outlook.usage = self.outlook.next
        store = ExpertMapStore(
            hidden, sizes, capacity=settings.capacity, distance=settings.distance
        )
        if file is not None and file.path.exists():
            store.load(file.path, stamp=file.stamp)
        self._matches: deque[_Match] = deque()
        self._matcher = _Matcher(store, table.top_k, settings, self._matches, self.stats)
        self._worker: Executor = Worker("finemoe") if settings.delay is None else Inline()
        self._routed = -1  # the last layer that has
        self._wanted: dict[int, NDArray[np.int64]] = {}
        self._rows: SequenceRows | None = None
        self._embeddings_BH: Rows | None = None
        self._map_BE: list[Rows] = []

    def begin(self, batch: Batch, embedded_TD: Any) -> None:
        """A pass begins; without embedded rows its first layers have no forecast."""
        self._worker.check()
        self._matcher.number += 1  # what was found for the last pass is of no use any more
        self._wanted.clear()
        self._routed, self._map_BE = -1, []
        self.outlook.now[:] = self.outlook.next
        self.outlook.version += 1
        self._rows = rows = SequenceRows(batch)
        self._embeddings_BH = None
        if embedded_TD is not None:
            self._embeddings_BH = rows.mean(np.asarray(embedded_TD))
        self._publish(partial(self._matcher.begin, rows.tokens_B, self._embeddings_BH))

    def observe(self, tokens: RoutedTokens) -> None:
        """A layer has routed: its forecast is over, and its search begins."""
        self._routed = routed = self._index[tokens.layer]
        self._wanted = {layer: own for layer, own in self._wanted.items() if layer > routed}
        num_experts = self._table.num_experts[tokens.layer]
        self.outlook.now[self._table.slice(tokens.layer)] = np.asarray(tokens.counts_E) > 0
        self.outlook.version += 1
        is_counted = self._settings.tracks == "counts"
        seen = tokens.ids_TA if is_counted else tokens.scores_TE
        if seen is None or self._rows is None:
            return  # a clock that only counts
        shares_TE = (
            shares_of(chosen(seen, num_experts), are_logits=False)
            if is_counted
            else shares_of(seen, are_logits=self._are_logits)
        )
        own_BE = self._rows.mean(shares_TE)
        self._map_BE.append(own_BE)
        self._publish(partial(self._matcher.routed, routed, own_BE))

    def end(self, final_TD: Any = None) -> None:
        """The maps of the pass are kept, where it had all layers."""
        if self._embeddings_BH is not None and len(self._map_BE) == len(self._index):
            self._publish(partial(self._matcher.keep, self._embeddings_BH, self._map_BE))

    def work(self) -> bool:
        """Takes what was found meanwhile."""
        self._worker.check()
        has_taken = False
        while self._matches:
            match = self._matches[0]
            is_old = match.number != self._matcher.number or match.layer <= self._routed
            if not is_old and match.after + self._delay > self._routed:
                break
            self._matches.popleft()
            if is_old:
                self.stats.late += 1
                continue
            has_taken = True
            self._wanted[match.layer] = match.places
            own = self._table.slice(self._table.layers[match.layer])
            self.outlook.now[own] = self.outlook.next[own] = match.chances_E
        self.outlook.version += has_taken
        return has_taken

    def candidates(self, layer: int) -> Candidates:
        """For every layer ahead what its search chose, by `PRI = p / (l - l_now)`, l_now the layer
        that routed last."""
        self.work()
        places, values = [np.zeros(0, np.int64)], [np.zeros(0)]
        for index, own in self._wanted.items():
            target = self._table.layers[index]
            if target >= layer:  # layers that are all in memory may pass without a word
                places.append(own + self._table.first[target])
                values.append(self.outlook.now[places[-1]] / (index - self._routed))
        return Candidates(np.concatenate(places), np.concatenate(values))

    def close(self) -> None:
        """Ends the matcher, and writes the file that was asked for. May be called again."""
        try:
            self._worker.close()
        finally:
            file, self._file = self._file, None
            if file is not None:
                self._matcher.store.save(file.path, stamp=file.stamp)

    def _publish(self, context: Callable[[int], None]) -> None:
        if not self._worker.submit(partial(context, self._matcher.number)):
            self.stats.dropped += 1


class _Matcher:
    """The subscriber: searches in the order of its calls, all by one thread. Keeps of a pass only
    the running search."""

    def __init__(
        self,
        store: ExpertMapStore,
        top_k: int,
        settings: FineMoeSettings,
        matches: deque[_Match],
        stats: FineMoeStats,
    ) -> None:
        self.store = store
        self.number = 0  # of the pass under way: set by the thread that computes
        self._top_k, self._settings, self._stats = top_k, settings, stats
        self._matches = matches
        self._search: TrajectorySearch | None = None
        self._searched = -1  # the pass of the search
        self._tokens_B = np.zeros(0)

    def begin(self, tokens_B: NDArray[Any], embeddings_BH: Rows | None, number: int) -> None:
        if number != self.number:
            return  # fallen behind: that pass is over
        self._searched, self._tokens_B = number, tokens_B
        self._search = self.store.by_trajectory(len(tokens_B))
        if embeddings_BH is None or not self._settings.semantic:
            return
        found = self.store.by_meaning(embeddings_BH)
        for layer in range(min(self._settings.distance, len(self.store.num_experts))):
            self._report(found, -1, layer)

    def routed(self, layer: int, shares_BE: Rows, number: int) -> None:
        if self._search is None or not number == self._searched == self.number:
            return
        self._search.extend(layer, shares_BE)
        target = layer + self._settings.distance
        if target < len(self.store.num_experts):
            self._report(self._search.best(), layer, target)

    def keep(self, embeddings_BH: Rows, maps_BE: list[Rows], number: int) -> None:
        self._search = None  # entries change under it
        self.store.add(embeddings_BH, maps_BE)
        self._stats.kept += 1

    def _report(self, found: Found | None, after: int, layer: int) -> None:
        if found is None:
            return
        shares_BE = self.store.rows(layer, found.entries_B)
        scores_B = found.scores_B if self._settings.widens else np.ones(len(shares_BE))
        chosen_BE = choose(shares_BE, scores_B, self._top_k)
        self._stats.widened += int((chosen_BE.sum(1) > self._top_k).sum())
        places = np.flatnonzero(chosen_BE.any(0))
        chances_E = merged(shares_BE, self._tokens_B)
        self._matches.append(_Match(self._searched, after, layer, chances_E, places))
        self._stats.found += 1


def choose(shares_BE: Rows, scores_B: Floats, top_k: int) -> NDArray[np.bool_]:
    """What is worth a read of each row: the smallest set of the largest shares whose sum reaches
    `delta = clip(1 - score, 0, 1)`, and at least `top_k`."""
    order_BE = np.argsort(-shares_BE, axis=1, kind="stable")
    sums_BE = np.take_along_axis(shares_BE, order_BE, 1).cumsum(1, dtype=np.float64)
    deltas_B = np.clip(1.0 - scores_B, 0.0, 1.0)
    sizes_B = np.maximum(top_k, (sums_BE < deltas_B[:, None]).sum(1) + 1)
    chosen_BE = np.zeros(shares_BE.shape, bool)
    np.put_along_axis(chosen_BE, order_BE, np.arange(order_BE.shape[1]) < sizes_B[:, None], 1)
    return chosen_BE
