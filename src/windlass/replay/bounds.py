"""What no policy can beat, and who knows the future: Belady's choice of what to keep, with any
link, and an oracle that must use the same link as everybody."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from windlass.forecast.interface import Candidates, ExpertForecast, ExpertTable, Floats, Outlook
from windlass.prefetch.expert_pool import ExpertPool
from windlass.prefetch.prefetcher import Prefetcher, Tier
from windlass.replay.routing_trace import RoutingTrace
from windlass.replay.run import Deciders
from windlass.schedule.batch import Batch
from windlass.schedule.observer import RoutedTokens
from windlass.schedule.passes import PassShape
from windlass.weights.cache import WeightCache
from windlass.weights.hints import Hint

_NEVER = 1 << 60
_MOST_HINTS = 64  # more than the link can read during one layer


class NextUses:
    """When each expert is used next, in layers since the first pass began; layers that have routed
    are past."""

    def __init__(self, trace: RoutingTrace) -> None:
        self.table = table = trace.table()
        self._num_layers = len(table.num_experts)
        turns: list[list[int]] = [[] for _ in range(len(table))]
        for number, rows in enumerate(trace.passes):
            for layer in table.layers:
                first = table.first[layer]
                for expert in trace.needed(layer, rows):
                    turns[first + expert].append(number * self._num_layers + layer)
        self._turns = [[*own, _NEVER] for own in turns]
        self._place = [0] * len(table)
        self.next_N = np.array([own[0] for own in self._turns], np.int64)

    def needed(self, number: int, layer: int) -> NDArray[np.int64]:
        """Places of the experts that this layer of a pass uses, before it is passed."""
        part = self.table.slice(layer)
        turn = number * self._num_layers + layer
        found: NDArray[np.int64] = part.start + np.flatnonzero(self.next_N[part] == turn)
        return found

    def passed(self, places: NDArray[np.int64]) -> None:
        """The layer that these are used in has routed."""
        for place in places.tolist():
            self._place[place] += 1
            self.next_N[place] = self._turns[place][self._place[place]]


@dataclass(frozen=True, slots=True)
class Misses:
    """Shares of requests of measured passes that miss: of the best choice that may leave what it
    has read unkept, and of the best that must keep it."""

    belady: float
    forced: float

    def shares(self, causal: float) -> dict[str, float | None]:
        """Of the misses of a causal policy (a share of requests, too): what knowing the future
        saves, and of that what is admission and what the choice of victims. None where there is
        nothing, or where the policy was not forced: of a layer that needs most of the slots, what
        has been computed gives way to what has not."""
        saved = causal - self.belady
        is_split = saved > 0 and self.forced <= causal
        return {
            "gap": saved / causal if causal > 0 else None,
            "admission": (self.forced - self.belady) / saved if is_split else None,
            "victim": (causal - self.forced) / saved if is_split else None,
        }


def belady(trace: RoutingTrace, slots: int) -> Misses:
    """Of one pool over all layers. What a layer needs is served together."""
    return Misses(*(_misses(trace, slots, is_forced=forced) for forced in (False, True)))


def _misses(trace: RoutingTrace, slots: int, *, is_forced: bool) -> float:
    uses = NextUses(trace)
    resident = np.zeros(len(uses.table), bool)
    requests = misses = 0
    for number, rows in enumerate(trace.passes):
        counts = not trace.is_prompt_R[rows].any()
        for layer in uses.table.layers:
            needed = uses.needed(number, layer)
            if counts:
                requests += len(needed)
                misses += len(needed) - int(resident[needed].sum())
            uses.passed(needed)
            resident[needed] = True
            excess = int(resident.sum()) - slots
            if excess <= 0:
                continue
            may_go = resident.copy()
            if is_forced and len(needed) <= slots:
                may_go[needed] = False
            places = may_go.nonzero()[0]
            worst = np.argpartition(-uses.next_N[places], excess - 1)[:excess]
            resident[places[worst]] = False
    return misses / max(1, requests)


# --- the oracle -----------------------------------------------------------------------------------


class _OracleForecast:
    """Implements `ExpertForecast`, by knowing what comes."""

    wants_scores = False
    wants_states = False
    threshold: float | None = None
    speculates: bool = True

    def __init__(self, uses: NextUses) -> None:
        self.outlook = Outlook(uses.table)
        self.turn = -1  # of the last layer that has routed
        self._uses = uses
        self._number = -1
        self._is_news = False

    def begin(self, batch: Batch, embedded_TD: Any) -> None:
        self._number += 1

    def observe(self, tokens: RoutedTokens) -> None:
        self._uses.passed(self._uses.needed(self._number, tokens.layer))
        self.turn = self._number * len(self._uses.table.num_experts) + tokens.layer
        self._is_news = True

    def end(self, final_TD: Any) -> None:
        pass

    def work(self) -> bool:
        has_news, self._is_news = self._is_news, False
        return has_news

    def candidates(self, layer: int) -> Candidates:
        return Candidates(np.zeros(0, np.int64), np.zeros(0))


class _OraclePool(ExpertPool):
    """Gives up what is used last; a hint takes the place of what is used later than it brings."""

    def __init__(self, table: ExpertTable, uses: NextUses) -> None:
        super().__init__(table)
        self._uses = uses

    def losses(self) -> Floats:
        return self._uses.next_N.astype(np.float64)

    def loss_of(self, entering: int, layers: int) -> float:
        return float(self._uses.next_N[entering])


class _OraclePrefetcher(Prefetcher):
    """Hints at what is used next, the soonest first, as far ahead as the oracle sees."""

    def __init__(
        self, shape: PassShape, weights: WeightCache, uses: NextUses, forecast: _OracleForecast,
        sees: int,
    ) -> None:  # fmt: skip
        super().__init__(shape, weights, forecast)
        self._uses, self._oracle, self._sees = uses, forecast, sees

    def _certain(self, tier: Tier) -> list[Hint]:
        next_N, num_layers = self._uses.next_N, len(self._table.num_experts)
        is_seen = (next_N <= self._oracle.turn + self._sees) & ~tier.there[: len(next_N)]
        places = is_seen.nonzero()[0]
        places = places[np.argsort(next_N[places], kind="stable")][:_MOST_HINTS]
        hints = []
        for place in places.tolist():
            number, layer = divmod(int(next_N[place]), num_layers)
            turn = number * self._num_stops + layer
            hints.append(Hint(turn, self._table.keys[place], turn))
        return hints

    def _speculative(self, tier: Tier) -> list[Hint]:
        return []


def oracle(trace: RoutingTrace, sees: int | None) -> Deciders:
    """Who knows the routing of so many layers ahead of the last router that has spoken (all where
    None) reads by it, the soonest use first, and keeps what is used soonest, of all the future. A
    strong reference: where slots bind it is not proven to be the best."""
    uses = NextUses(trace)
    forecast = _OracleForecast(uses)
    horizon = _NEVER // 2 if sees is None else sees

    def prefetcher(shape: PassShape, weights: WeightCache, _: ExpertForecast) -> Prefetcher:
        return _OraclePrefetcher(shape, weights, uses, forecast, horizon)

    return Deciders(forecast, _OraclePool(uses.table, uses), prefetcher=prefetcher)


def unions(trace: RoutingTrace) -> Sequence[float]:
    """Experts that a measured pass uses of a layer, on average, layer by layer."""
    found = np.zeros(len(trace.num_experts))
    measured = [rows for rows in trace.passes if not trace.is_prompt_R[rows].any()]
    for rows in measured:
        for layer, own in enumerate(trace.layers):
            if own is not None:
                found[layer] += len(np.unique(own.ids_RA[rows]))
    result: list[float] = (found / max(1, len(measured))).tolist()
    return result
