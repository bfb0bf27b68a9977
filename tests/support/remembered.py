"""Passes whose routing repeats, a model without bytes that routes them, and FineMoE over both."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from windlass.checkpoint.part_reads import Read
from windlass.forecast.interface import Candidates, ExpertForecast, ExpertTable
from windlass.ids import DISK_TO_HOST, Part
from windlass.prefetch.expert_pool import ExpertPool
from windlass.prefetch.prefetcher import Prefetcher
from windlass.runtime.clock import Clock, LaneJob, Lanes, LaneWork
from windlass.runtime.simulated import SimulatedParts, SimulatedRuntime, SimulatedWeights
from windlass.schedule.batch import Batch, RowGroup, Segment, make_batch
from windlass.schedule.observer import RoutedTokens
from windlass.schedule.passes import LayerShape, PassShape

HIDDEN = 16


def chunks(lengths: Sequence[int], *, first: int = 0) -> Batch:
    """A pass over so many tokens of each sequence, numbered from `first`."""
    segments = [
        Segment(
            sequence=first + i, token_ids=(0,) * length, first_position=0, pages=(), state_slot=-1,
            is_prompt=length > 1, long_rope=False, wants_logits=True,
        )
        for i, length in enumerate(lengths)
    ]  # fmt: skip
    return make_batch(segments, micro_batch_tokens=1 << 20)


def cosine(a: Any, b: Any) -> float:
    """0 where one of both is nothing but zeros."""
    a, b = np.ravel(a).astype(float), np.ravel(b).astype(float)
    norm = np.sqrt((a @ a) * (b @ b))
    return float(a @ b / norm) if norm else 0.0


class Routing:
    """What a pass over T tokens routes: shares (T, L, E) and embeddings (T, HIDDEN)."""

    def __init__(self, shares_TLE: Any, embedded_TD: Any) -> None:
        self.shares_TLE, self.embedded_TD = shares_TLE, embedded_TD

    def tokens(
        self, layer: int, batch: Batch, top_k: int, *, at: int | None = None
    ) -> RoutedTokens:
        """Of a layer, the place `at` (else the same) among those with experts."""
        scores_TE = self.shares_TLE[:, layer if at is None else at]
        ids_TA = np.argsort(-scores_TE, axis=1, kind="stable")[:, :top_k]
        counts_E = np.bincount(ids_TA.ravel(), minlength=scores_TE.shape[1])
        return RoutedTokens(layer, batch, counts_E, ids_TA, scores_TE.astype(np.float32))


class Topics:
    """Passes that follow one of a few paths through layers, and a little noise."""

    def __init__(
        self, layers: int, experts: int, *, topics: int = 6, noise: float = 0.3, seed: int = 0
    ) -> None:
        self._random = random = np.random.default_rng(seed)
        self._noise = noise
        self.logits_ZLE = random.normal(0, 2, (topics, layers, experts))
        self.meanings_ZD = random.normal(0, 1, (topics, HIDDEN))

    def routing(self, topics: Sequence[int]) -> Routing:
        """One token of each topic."""
        which, normal = list(topics), self._random.normal
        logits_TLE = self.logits_ZLE[which]
        logits_TLE = logits_TLE + normal(0, self._noise, logits_TLE.shape)
        shares_TLE = np.exp(logits_TLE - logits_TLE.max(-1, keepdims=True))
        shares_TLE /= shares_TLE.sum(-1, keepdims=True)
        meanings_TD = self.meanings_ZD[which]
        meanings_TD = meanings_TD + normal(0, 0.1 * self._noise, meanings_TD.shape)
        return Routing(shares_TLE.astype(np.float32), meanings_TD.astype(np.float32))

    def walk(self, count: int) -> Iterator[Routing]:
        """So many passes of one token; the topic changes now and then."""
        topic = 0
        for _ in range(count):
            if self._random.random() < 0.2:
                topic = int(self._random.integers(len(self.logits_ZLE)))
            yield self.routing([topic])


def play(
    forecast: ExpertForecast, table: ExpertTable, routing: Routing, batch: Batch
) -> list[Candidates]:
    """One pass; the candidates after its begin and after each layer."""
    forecast.begin(batch, routing.embedded_TD)
    told = [forecast.candidates(0)]
    for at, layer in enumerate(table.layers):
        forecast.observe(routing.tokens(layer, batch, table.top_k, at=at))
        told.append(forecast.candidates(layer))
    forecast.end(None)
    return told


class _Costs:
    """Blocks of a quarter expert, `link_s` seconds each; all operations of a layer take 1 s."""

    def __init__(self, link_s: float) -> None:
        self._link_s = link_s

    def block(self, key: Any, num_bytes: int) -> list[Any]:
        return [(DISK_TO_HOST, self._link_s * num_bytes / 100)]

    def embedding_rows(self, num_rows: int) -> float:
        raise AssertionError("the table is resident here")

    def __getattr__(self, name: str) -> Any:
        return lambda *_: LaneWork(LaneJob("host", 0.25))


class Machine:
    """A model without bytes on the clock: layers of experts of 4 reads each, some resident."""

    def __init__(
        self, forecast: ExpertForecast, policy: ExpertPool, *, slots: int, link_s: float = 0.2
    ) -> None:
        """One block is in flight at a time."""
        self.table = table = forecast.outlook.table
        self.lanes = Lanes(Clock(), ("disk", "host"), keeps_spans=True)
        costs: Any = _Costs(link_s)
        counts = {Part.EXPERT: len(table), Part.BLOCK: len(table.num_experts)}
        counts |= dict.fromkeys((Part.HEAD, Part.EMBED, Part.FINAL), 1)
        self.weights = SimulatedWeights(
            self.lanes,
            costs,
            SimulatedParts(
                counts, counts | {Part.EXPERT: slots}, lambda key: (Read("", 0, 100, 0),) * 4
            ),
            policy=policy,
            depth=1,
        )
        self.cache = self.weights.cache
        self.shape = PassShape((LayerShape(True, "experts"),) * len(table.num_experts), 1)
        self.prefetcher = Prefetcher(self.shape, self.cache, forecast)
        self.routing: Routing | None = None
        self.runtime = SimulatedRuntime(
            self.lanes, costs, self.weights, prefetcher=self.prefetcher, forecast=forecast,
            router=self,
        )  # fmt: skip

    def begin(self, batch: Batch) -> Any:
        assert self.routing is not None
        return self.routing.embedded_TD

    def route(self, layer: int, batch: Batch, group: RowGroup) -> RoutedTokens:
        assert self.routing is not None
        return self.routing.tokens(layer, batch, self.table.top_k)

    def end(self) -> None:
        return None
