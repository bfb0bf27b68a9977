"""How long a pass takes under a plan: a few passes run by the schedule on a clock, all others
between them. Of a large model a few layers stand for all. Seconds."""

from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import log2
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from windlass.checkpoint.part_reads import Read
from windlass.forecast.interface import ExpertTable
from windlass.forecast.usage import UsageForecast
from windlass.ids import ALL_ON_DEVICE, Home, HomeShares, Part
from windlass.models.spec import ModelSpec, Moe
from windlass.perf.device_cost import DEVICE_LANES, DeviceCost
from windlass.perf.device_pass_cost import DevicePassCost, Placed
from windlass.perf.job_passes import PassRun
from windlass.perf.op_cost import OpCost
from windlass.perf.pass_cost import (
    PassCost,
    Timed,
    contention,
    held_shares,
    kv_numbers,
)
from windlass.perf.sample import Sample, parts_of, sample_layers, slots_of
from windlass.perf.sizes import Problem, Sizes
from windlass.plan import Plan, TierPlan
from windlass.prefetch.expert_pool import ExpectedNextUse, floor_of
from windlass.prefetch.prefetcher import Prefetcher
from windlass.prefetch.tiers import LowerPolicy, UpperPolicy, takers
from windlass.runtime.clock import Clock, Lanes, Span
from windlass.runtime.kv_rounds import half_pages, windows_of
from windlass.runtime.simulated import SimulatedParts, SimulatedRuntime, SimulatedWeights
from windlass.runtime.simulated_host import SimulatedHostExperts
from windlass.runtime.simulated_stream import Pages, SimulatedStream
from windlass.schedule.batch import Batch, RowGroup, Segment, make_batch
from windlass.schedule.observer import RoutedTokens
from windlass.schedule.passes import PassShape, run_pass
from windlass.units import MIB
from windlass.weights.eviction import EvictionPolicy

_MOST_EXPERTS = 768  # of a model on the clock: a pass over them takes about 20 ms
_MOST_POINTS = 4  # passes that are run on the clock
# On the link to a device: blocks in flight, and bytes of one. A run's are shorter, for the sake of
# who overtakes; of passes that want what comes anyway a clock is spared most of them.
LINK_DEPTH, _LINK_BLOCK = 2, 16 * MIB
_LINKS = ("disk", "down", "up")
_EXACT_DRAWS = 4096  # rows times experts up to which routing is drawn row by row


class UniformRouter:
    """Rows by expert where every expert is as likely, or as likely as `usage` says of it."""

    def __init__(
        self, spec: ModelSpec, *, seed: int = 0, usage: Sequence[Sequence[float]] | None = None
    ) -> None:
        self._spec = spec
        self._usage = usage
        self._random = np.random.default_rng(seed)

    def begin(self, batch: Batch) -> None:
        return None

    def end(self) -> None:
        return None

    def route(self, layer: int, batch: Batch, group: RowGroup) -> RoutedTokens:
        return RoutedTokens(layer, batch, self.counts(layer, group.num_tokens))

    def counts(self, layer: int, num_rows: int) -> NDArray[np.int64]:
        """(E) rows of each expert."""
        moe = self._spec.blocks[layer].ffn
        assert isinstance(moe, Moe), f"layer {layer} has no experts"
        share = np.full(moe.num_experts, 1.0) if self._usage is None else self._usage[layer]
        weights = np.asarray(share, dtype=float) / np.sum(share)
        if num_rows * moe.num_experts <= _EXACT_DRAWS:
            # the k largest of log(weight) + Gumbel noise: k different experts for each row
            noise = self._random.gumbel(size=(num_rows, moe.num_experts))
            keys = np.log(np.maximum(weights, 1e-30)) + noise
            chosen = np.argpartition(-keys, moe.top_k - 1, axis=1)[:, : moe.top_k]
            counts = np.bincount(chosen.ravel(), minlength=moe.num_experts)
        else:
            counts = self._random.multinomial(num_rows * moe.top_k, weights)
        return counts


# --- passes on the clock --------------------------------------------------------------------------


def _keeps_all(plan: Plan, sizes: Sizes) -> bool:
    return all(
        share == 1 for part, share in held_shares(plan, sizes).items() if part is not Part.EMBED
    )


class _Timing(NamedTuple):
    """A sample of the model, the lanes of the machine, and what operations ask of them."""

    sample: Sample
    lanes: Lanes
    costs: OpCost


def _lanes_of(plan: Plan) -> Sequence[str]:
    return ("disk", "host") if plan.above is None else DEVICE_LANES


def _costs_of(problem: Problem, plan: Plan, sample: Sample) -> OpCost:
    numbers = kv_numbers(problem.spec)
    own, scale = replace(problem, spec=sample.spec), 1 / sample.factor
    if plan.above is None:
        return OpCost(
            own, kv_numbers=numbers, weights=sample.weights, scale=scale,
            keeps_all=_keeps_all(plan, problem.sizes),
        )  # fmt: skip
    return DeviceCost(own, kv_numbers=numbers, weights=sample.weights, scale=scale)


def _weights_of(
    problem: Problem, plan: Plan, on: _Timing, forecast: UsageForecast
) -> SimulatedWeights:
    """Slots of the tier that passes take weights from, over those of the host where that is
    another."""
    sizes, sample = problem.sizes, on.sample
    parts = parts_of(sample, sizes)

    def tier(own: TierPlan, slot_bytes: Mapping[Part, int], **more: Any) -> SimulatedParts:
        reads = {part: (Read("", 0, size, 0),) for part, size in slot_bytes.items()}
        slots = slots_of(plan, own, sizes, sample)
        return SimulatedParts(parts, slots, lambda key: reads[key.part], **more)

    def policy(own: SimulatedParts) -> EvictionPolicy:
        floor = floor_of(forecast.outlook.table, own.slots.get(Part.EXPERT, 0))
        return ExpectedNextUse(forecast.outlook, floor=floor)

    host, depth = tier(plan.host, sizes.slot_bytes), plan.read_threads + 1
    if plan.above is None:
        return SimulatedWeights(on.lanes, on.costs, host, policy=policy(host), depth=depth)
    assert sizes.device is not None, "a plan of a device for a machine without"
    above = tier(plan.above, sizes.device.slot_bytes, block_bytes=_LINK_BLOCK)
    kept = {part for part, count in above.slots.items() if count >= parts[part]}
    num_experts = forecast.outlook.table.num_experts
    lower = LowerPolicy(policy(host), takers(kept, num_experts, plan.host_experts))
    below = SimulatedWeights(on.lanes, on.costs, host, policy=lower, depth=depth)
    weights = SimulatedWeights(
        on.lanes, on.costs, above, policy=UpperPolicy(policy(above), lower), depth=LINK_DEPTH,
        tier_below=below,
    )  # fmt: skip
    weights.cache.feed.tell(lower.came_above)
    return weights


class ClockedModel:
    """A model under a plan on a clock; its weights are not there yet when it is made."""

    def __init__(
        self,
        problem: Problem,
        plan: Plan,
        *,
        keeps_spans: bool = False,
        usage: Sequence[Sequence[float]] | None = None,
    ) -> None:
        spec, sizes = problem.spec, problem.sizes
        self._sample = sample = sample_layers(spec, most_experts=_MOST_EXPERTS)
        self._plan = plan
        self._threads = problem.profile.threads
        table = ExpertTable.of(sample.spec)
        forecast = UsageForecast(table)
        costs = _costs_of(problem, plan, sample)
        self.lanes = Lanes(Clock(), _lanes_of(plan), keeps_spans=keeps_spans)
        self._weights = _weights_of(problem, plan, _Timing(sample, self.lanes, costs), forecast)
        self._shape = PassShape.of(sample.spec, sizes.num_parts.get(Part.HEAD, 0)).whole
        cache = self._weights.cache
        below = self._weights.tier_below
        prefetcher = Prefetcher(
            self._shape, cache, forecast, below=None if below is None else below.cache
        )
        self._runtime = SimulatedRuntime(
            self.lanes, costs, self._weights,
            prefetcher=prefetcher if plan.overlap else None, forecast=forecast,
            router=UniformRouter(sample.spec, usage=usage),
        )  # fmt: skip
        self._runtime.runs_ahead = plan.above is not None
        if plan.host_experts and below is not None and isinstance(costs, DeviceCost):
            prefetcher.leave_to_host(plan.host_experts)
            self._runtime.host = SimulatedHostExperts(
                self.lanes, below, table.num_experts, plan.host_experts, costs.host_experts
            )
        if plan.kv_offloading_share and isinstance(costs, DeviceCost):
            most = half_pages(sizes.staged_bytes_per_token, plan.page_tokens, plan.max_model_len)
            self._runtime.stream = SimulatedStream(
                self.lanes, self._weights, costs, windows_of(sample.spec),
                Pages(plan.page_tokens, most),
            )  # fmt: skip

    @property
    def spans(self) -> list[Span]:
        """What the lanes did, where it is kept."""
        return self.lanes.spans

    def run(self, one: PassRun) -> Timed:
        """One pass like `one`; times are those of the whole model."""
        plan = self._plan
        batch = batch_of(
            one, micro_batch_tokens=plan.micro_batch_tokens, groups=plan.groups,
            shares=plan.shares,
        )  # fmt: skip
        begin, busy = self.lanes.clock.now, self.lanes.busy()
        lowest = self._weights.tier_below or self._weights
        read = lowest.cache.stats().bytes_read
        run_pass(self._runtime, self._shape, batch)
        factor = self._sample.factor
        seconds = (self.lanes.clock.now - begin) * factor
        busy = {lane: (end - busy[lane]) * factor for lane, end in self.lanes.busy().items()}
        seconds += contention(busy["disk"], busy["host"], seconds, self._threads)
        return Timed(
            seconds,
            busy,
            (lowest.cache.stats().bytes_read - read) * factor,
        )


def batch_of(
    one: PassRun, *, micro_batch_tokens: int, groups: int = 1, shares: HomeShares = ALL_ON_DEVICE
) -> Batch:
    """Rows as many as those of `one`, that see as many positions on average; `shares`: of the
    sequences by home."""
    seen, segments = one.seen, []
    if seen.decode_rows:
        first = max(0, round(seen.decode_positions / seen.decode_rows) - 1)
        segments = [_segment(first, 1, is_prompt=False) for _ in range(seen.decode_rows)]
    if seen.prompt_rows:
        length, earlier = seen.chunks()
        first = round(earlier)
        for at in range(0, seen.prompt_rows, length):
            count = min(length, seen.prompt_rows - at)
            segments.append(_segment(first, count, is_prompt=True))
    logits = [replace(s, wants_logits=i < one.num_logits) for i, s in enumerate(segments)]
    at_host, others = _divided(logits, shares.host)
    share = min(1.0, shares.streamed / (1 - shares.host)) if others else 0.0
    streamed, own = _divided(others, share)
    placed = [
        *(replace(s, home=Home.HOST) for s in at_host), *own,
        *(replace(s, home=Home.STREAMED) for s in streamed),
    ]  # fmt: skip
    return make_batch(placed, micro_batch_tokens=micro_batch_tokens, groups=groups)


def _divided(segments: list[Segment], share: float) -> tuple[list[Segment], list[Segment]]:
    """That share of the segments, evenly spread, and the others."""
    is_so = [int((i + 1) * share) > int(i * share) for i in range(len(segments))]
    pairs = list(zip(segments, is_so, strict=True))
    return [s for s, one in pairs if one], [s for s, one in pairs if not one]


def _segment(first: int, count: int, *, is_prompt: bool) -> Segment:
    return Segment(
        sequence=0, token_ids=(0,) * count, first_position=first, pages=(), state_slot=-1,
        is_prompt=is_prompt, long_rope=False, wants_logits=False,
    )  # fmt: skip


# --- all passes of a job --------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Point:
    """A pass that was timed. `slower`: its seconds over the least that was estimated; `links`: the
    share of them that each link worked; `computing`: the seconds of each processor over what was
    estimated."""

    rows: int
    slower: float
    links: Mapping[str, float]
    computing: Mapping[str, float]


class PassTimes:
    """Seconds of any pass under a plan. With `on_clock`, passes of a few sizes among `runs` run on
    the clock; without, a pass is as long as its busiest lane works, which is less exact."""

    def __init__(
        self,
        problem: Problem,
        plan: Plan,
        runs: Sequence[PassRun],
        *,
        on_clock: bool = True,
    ) -> None:
        self._estimated, self._costs = _estimates(problem, plan)
        model = ClockedModel(problem, plan) if on_clock else None
        cold = self._estimated(runs[0], True) if model is None else model.run(runs[0])
        self._points = [self._point(one, model) for one in _choose(runs)][::-1]
        warm = self.of(runs[0])
        self.load = Timed(
            max(0.0, cold.seconds - warm.seconds),
            {lane: max(0.0, cold.busy[lane] - warm.busy[lane]) for lane in cold.busy},
        )

    def of(self, one: PassRun) -> Timed:
        """A pass like `one`, with weights where the passes before left them. Links may work more
        than they must: none is idle while anything is hinted."""
        estimated = self._estimated(one, False)
        at = bisect_left([point.rows for point in self._points], one.num_rows)
        high = self._points[min(at, len(self._points) - 1)]
        low = self._points[max(at - 1, 0)] if high.rows > one.num_rows else high
        share = _share(log2(low.rows), log2(high.rows), log2(max(1, one.num_rows)))
        seconds = max(estimated.busy.values()) * _mean(low.slower, high.slower, share)
        busy = {
            lane: seconds * _mean(worked, high.links[lane], share)
            for lane, worked in low.links.items()
        }
        for lane, slower in low.computing.items():
            more = _mean(slower, high.computing[lane], share)
            busy[lane] = min(seconds, estimated.busy[lane] * more)
        return Timed(seconds, busy)

    def sample_s(self, num_rows: int) -> float:
        """Drawing a token for each of `num_rows` rows of logits, after the pass."""
        return self._costs.sample_s(num_rows)

    def _point(self, one: PassRun, model: ClockedModel | None) -> _Point:
        estimated = self._estimated(one, False)
        timed = estimated
        if model is not None:
            model.run(one)  # finds the weights as a pass of another size left them
            timed = model.run(one)
        return _Point(
            one.num_rows,
            timed.seconds / max(estimated.busy.values()),
            {k: min(1.0, timed.busy[k] / timed.seconds) for k in estimated.busy if k in _LINKS},
            {
                k: timed.busy[k] / worked if worked else 0.0
                for k, worked in estimated.busy.items()
                if k not in _LINKS
            },
        )


def _estimates(problem: Problem, plan: Plan) -> tuple[Callable[[PassRun, bool], Timed], OpCost]:
    """What a pass takes without a clock, of the first where it is so; and costs of operations."""
    if plan.above is None:
        cost, held = PassCost(problem), held_shares(plan, problem.sizes)
        return lambda one, is_first: cost.of(one, {} if is_first else held), cost.costs
    above, placed = DevicePassCost(problem), Placed.of(plan, problem.sizes)
    return lambda one, is_first: above.of(one, placed.cold if is_first else placed), above.costs


def _share(low: float, high: float, value: float) -> float:
    """Where `value` lies between `low` (0) and `high` (1)."""
    return min(1.0, max(0.0, (value - low) / (high - low))) if high > low else 0.0


def _mean(low: float, high: float, share: float) -> float:
    return low + share * (high - low)


def _choose(runs: Sequence[PassRun]) -> list[PassRun]:
    """Passes of a few sizes that stand for all: of each size, the one that occurs most often; the
    largest first."""
    by_rows: dict[int, PassRun] = {}
    for one in runs:
        known = by_rows.get(one.num_rows)
        if known is None or known.repeats < one.repeats:
            by_rows[one.num_rows] = one
    sizes = sorted(by_rows)
    if len(sizes) > _MOST_POINTS:
        low, high = sizes[0], sizes[-1]
        aims = [low * (high / low) ** (i / (_MOST_POINTS - 1)) for i in range(_MOST_POINTS)]
        sizes = sorted({min(sizes, key=lambda size: abs(size - aim)) for aim in aims})
    return [by_rows[size] for size in reversed(sizes)]
