"""Runs the passes of a trace on the clock: the schedule, the weight cache, the policy, the forecast
and the prefetcher are the engine's; only routing is read instead of computed."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from windlass.checkpoint.part_reads import Read
from windlass.forecast.interface import ExpertForecast
from windlass.forecast.told import ToldForecast
from windlass.ids import Part, WeightKey
from windlass.prefetch.guard import WindowGuard
from windlass.prefetch.prefetcher import Prefetcher
from windlass.replay.costs import EXPERT_BYTES, RatioCosts
from windlass.replay.router import TraceRouter
from windlass.replay.routing_trace import RoutingTrace
from windlass.runtime.clock import Clock, Lanes
from windlass.runtime.simulated import SimulatedParts, SimulatedRuntime, SimulatedWeights
from windlass.runtime.simulated_parts import Costs
from windlass.schedule.observer import RoutingObserver
from windlass.schedule.passes import LayerShape, PassShape, run_pass
from windlass.weights.cache import WeightCache
from windlass.weights.eviction import EvictionPolicy


@dataclass(frozen=True, slots=True)
class ClockedMachine:
    """What a trace is replayed on. `num_bytes`: of an expert. `depth`: blocks on the link at
    once."""

    costs: Costs
    shape: PassShape
    expert_slots: int
    num_bytes: int
    depth: int

    def beside_s(self, seconds: float, busy: Mapping[str, float], num_rows: int) -> float:
        """Seconds of a pass that are not on the lanes, after one that kept them busy so long."""
        return 0.0


def ratio_machine(trace: RoutingTrace, slots: int, rho: float) -> ClockedMachine:
    """One that computes a row of a layer in one second; see `RatioCosts`."""
    table = trace.table()
    layers = tuple(LayerShape(True, "experts" if n else "dense") for n in table.num_experts)
    costs = RatioCosts(table, rho)
    return ClockedMachine(costs, PassShape(layers, 1), slots, EXPERT_BYTES, depth=1)


def guarded(shape: PassShape, weights: WeightCache, forecast: ExpertForecast) -> Prefetcher:
    """As the engine has it: speculation that does not pay is left out."""
    return Prefetcher(shape, weights, forecast, guard=WindowGuard())


class Deciders(NamedTuple):
    """Who decides what is resident and what is read ahead. `observers`: who else is told of
    routing, such as a policy that learns from it."""

    forecast: ExpertForecast
    policy: EvictionPolicy
    observers: Sequence[RoutingObserver] = ()
    prefetcher: Callable[[PassShape, WeightCache, ExpertForecast], Prefetcher] = guarded


class PassCounts(NamedTuple):
    """Counters of all passes, one row each: differences from pass to pass."""

    rows: NDArray[np.int64]
    has_prompt: NDArray[np.bool_]
    values: Mapping[str, NDArray[np.float64]]


_COUNTERS = (
    "seconds", "wait_s", "requests", "hits", "bytes_read", "issued", "used", "late", "cancelled",
)  # fmt: skip


class TraceRun:
    """A trace on a machine. Everything but experts is in memory before the first pass."""

    def __init__(self, trace: RoutingTrace, machine: ClockedMachine, by: Deciders) -> None:
        self._trace = trace
        self.machine = machine
        table = trace.table()
        self._shape = shape = machine.shape
        others = _others(shape)
        num_keys = {**Counter(key.part for key in others), Part.EXPERT: len(table)}
        reads = {part: (Read("", 0, 1, 0),) for part in num_keys}
        reads[Part.EXPERT] = (Read("", 0, machine.num_bytes, 0),)
        self.lanes = Lanes(Clock(), ("disk", "host"))
        self.weights = SimulatedWeights(
            self.lanes, machine.costs,
            SimulatedParts(
                num_keys, {**num_keys, Part.EXPERT: machine.expert_slots},
                lambda key: reads[key.part],
            ),
            policy=by.policy, depth=machine.depth,
        )  # fmt: skip
        for key in others:
            with self.weights.lease(key):
                pass
        self._router = TraceRouter(trace)
        forecast = ToldForecast(by.forecast, by.observers) if by.observers else by.forecast
        self._runtime = SimulatedRuntime(
            self.lanes, machine.costs, self.weights,
            prefetcher=by.prefetcher(shape, self.weights.cache, forecast),
            forecast=forecast, router=self._router,
        )  # fmt: skip

    def run(self) -> PassCounts:
        """All passes."""
        before, values = self._counters(), np.zeros((len(self._trace.passes), len(_COUNTERS)))
        for number, rows in enumerate(self._trace.passes):
            busy = self.lanes.busy()
            run_pass(self._runtime, self._shape, self._router.enter(rows))
            after = self._counters()
            values[number] = after - before
            busy = {lane: end - busy[lane] for lane, end in self.lanes.busy().items()}
            values[number, 0] += self.machine.beside_s(values[number, 0], busy, len(rows))
            before = after
        return PassCounts(
            np.array([len(rows) for rows in self._trace.passes]),
            np.array([self._trace.is_prompt_R[rows].any() for rows in self._trace.passes]),
            dict(zip(_COUNTERS, values.T, strict=True)),
        )

    def _counters(self) -> NDArray[np.float64]:
        stats = self.weights.cache.stats()
        return np.array([
            self.lanes.clock.now, stats.wait_s,
            stats.requests.get(Part.EXPERT, 0), stats.hits.get(Part.EXPERT, 0),
            stats.bytes_read, stats.prefetch_issued, stats.prefetch_used, stats.prefetch_late,
            stats.prefetch_cancelled,
        ])  # fmt: skip


def _others(shape: PassShape) -> list[WeightKey]:
    """All parts but experts."""
    dense = [i for i, layer in enumerate(shape.layers) if layer.network == "dense"]
    return [
        WeightKey(Part.EMBED), WeightKey(Part.FINAL),
        *(WeightKey(Part.HEAD, -1, chunk) for chunk in range(shape.num_head_chunks)),
        *(WeightKey(Part.BLOCK, layer) for layer in range(len(shape.layers))),
        *(WeightKey(Part.FFN, layer) for layer in dense),
    ]  # fmt: skip
