"""How long a pass takes under a plan: a few passes run by the schedule on a clock, all others
between them. Of a large model a few layers stand for all. Seconds."""

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import log2

import numpy as np
from numpy.typing import NDArray

from windlass.checkpoint.part_reads import Read
from windlass.forecast.interface import ExpertTable
from windlass.forecast.usage import UsageForecast
from windlass.ids import Part
from windlass.models.spec import Block, Ffn, ModelSpec, Moe
from windlass.perf.job_passes import PassRun
from windlass.perf.op_cost import OpCost
from windlass.perf.pass_cost import (
    PassCost,
    Timed,
    contention,
    held_shares,
    kv_numbers,
)
from windlass.perf.sizes import Problem, Sizes
from windlass.plan import Plan
from windlass.prefetch.expert_pool import ExpectedNextUse, floor_of
from windlass.prefetch.prefetcher import Prefetcher
from windlass.runtime.clock import Clock, Lanes, Span
from windlass.runtime.simulated import SimulatedParts, SimulatedRuntime, SimulatedWeights
from windlass.schedule.batch import Batch, RowGroup, Segment, make_batch
from windlass.schedule.observer import RoutedTokens
from windlass.schedule.passes import PassShape, run_pass

_MOST_EXPERTS = 768  # of a model on the clock: a pass over them takes about 20 ms
_PIPELINE_SLOTS = 16  # of experts on their way, however many layers there are
_MOST_POINTS = 4  # passes that are run on the clock
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


# --- a few layers for all -------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Sample:
    """A model of some of the layers. `weights`: how much more than itself each stands for, less
    what all do; `factor`: layers of the whole for each of the sample."""

    spec: ModelSpec
    weights: tuple[float, ...]
    factor: float


def sample_layers(spec: ModelSpec, *, most_experts: int) -> Sample:
    """Layers of every kind, in their order, in nearly the shares that the whole has of them."""
    blocks = spec.blocks
    kinds: dict[Block, list[int]] = {}
    for layer, block in enumerate(blocks):
        kinds.setdefault(block, []).append(layer)
    widest = max(b.ffn.num_experts if isinstance(b.ffn, Moe) else 1 for b in kinds)
    wanted = max(most_experts // widest, 2 * len(kinds), 4)
    if wanted >= len(blocks):
        return Sample(spec, (1.0,) * len(blocks), 1.0)
    kept: list[tuple[int, float]] = []
    for layers in kinds.values():
        count = max(1, round(wanted * len(layers) / len(blocks)))
        step = len(layers) / count
        kept += [(layers[int(i * step)], step) for i in range(count)]
    kept.sort()
    factor = len(blocks) / len(kept)
    chosen = replace(spec, blocks=tuple(blocks[layer] for layer, _ in kept))
    return Sample(chosen, tuple(step / factor for _, step in kept), factor)


def _parts_of(sample: Sample, sizes: Sizes) -> dict[Part, int]:
    """Parts of each kind that the sample has."""
    networks = [block.ffn for block in sample.spec.blocks]
    own = {
        Part.EXPERT: sum(f.num_experts for f in networks if isinstance(f, Moe)),
        Part.BLOCK: len(networks),
        Part.FFN: sum(isinstance(f, Ffn) for f in networks),
    }
    return {part: own.get(part, count) for part, count in sizes.num_parts.items() if count}


def _keeps_all(plan: Plan, sizes: Sizes) -> bool:
    return all(
        share == 1 for part, share in held_shares(plan, sizes).items() if part is not Part.EMBED
    )


def _slots_of(plan: Plan, sizes: Sizes, sample: Sample) -> dict[Part, int]:
    """The plan's slots for the sample: the share that stays, and those on their way."""
    slots: dict[Part, int] = {}
    # those of a layer stay until its last group has passed, however many layers there are
    again = max(ExpertTable.of(sample.spec).num_experts) if plan.groups > 1 else 0
    for part, count in _parts_of(sample, sizes).items():
        whole, given = sizes.num_parts[part], plan.host.slots.get(part, 0)
        moving = min(given, 2 if part is not Part.EXPERT else _PIPELINE_SLOTS + again)
        kept = (given - moving) * count / whole
        slots[part] = count if given >= whole else min(count, moving + int(kept))
    return slots


# --- passes on the clock --------------------------------------------------------------------------


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
        costs = OpCost(
            replace(problem, spec=sample.spec), kv_numbers=kv_numbers(spec), weights=sample.weights,
            scale=1 / sample.factor, keeps_all=_keeps_all(plan, sizes),
        )  # fmt: skip
        table = ExpertTable.of(sample.spec)
        forecast = UsageForecast(table)
        self.lanes = Lanes(Clock(), ("disk", "host"), keeps_spans=keeps_spans)
        parts = _parts_of(sample, sizes)
        reads = {part: (Read("", 0, size, 0),) for part, size in sizes.slot_bytes.items()}
        slots = _slots_of(plan, sizes, sample)
        floor = floor_of(table, slots.get(Part.EXPERT, 0))
        policy = ExpectedNextUse(forecast.outlook, floor=floor)
        self._weights = SimulatedWeights(
            self.lanes, costs,
            SimulatedParts(parts, slots, lambda key: reads[key.part]),
            policy=policy, depth=plan.read_threads + 1,
        )  # fmt: skip
        self._shape = PassShape.of(sample.spec, sizes.num_parts.get(Part.HEAD, 0)).whole
        cache = self._weights.cache
        prefetcher = Prefetcher(self._shape, cache, forecast)
        self._runtime = SimulatedRuntime(
            self.lanes, costs, self._weights,
            prefetcher=prefetcher if plan.overlap else None, forecast=forecast,
            router=UniformRouter(sample.spec, usage=usage),
        )  # fmt: skip

    @property
    def spans(self) -> list[Span]:
        """What the lanes did, where it is kept."""
        return self.lanes.spans

    def run(self, one: PassRun) -> Timed:
        """One pass like `one`; times are those of the whole model."""
        plan = self._plan
        batch = batch_of(one, micro_batch_tokens=plan.micro_batch_tokens, groups=plan.groups)
        begin, busy = self.lanes.clock.now, self.lanes.busy()
        read = self._weights.cache.stats().bytes_read
        run_pass(self._runtime, self._shape, batch)
        factor = self._sample.factor
        seconds = (self.lanes.clock.now - begin) * factor
        busy = {lane: (end - busy[lane]) * factor for lane, end in self.lanes.busy().items()}
        seconds += contention(busy["disk"], busy["host"], seconds, self._threads)
        return Timed(
            seconds,
            busy,
            (self._weights.cache.stats().bytes_read - read) * factor,
        )


def batch_of(one: PassRun, *, micro_batch_tokens: int, groups: int = 1) -> Batch:
    """Rows as many as those of `one`, that see as many positions on average."""
    seen, segments = one.seen, []
    if seen.decode_rows:
        first = max(0, round(seen.decode_positions / seen.decode_rows) - 1)
        segments = [_segment(first, 1, is_prompt=False) for _ in range(seen.decode_rows)]
    if seen.prompt_rows:
        mean = seen.prompt_positions / seen.prompt_rows
        length = max(1, min(seen.prompt_rows, round(2 * mean - 1)))
        first = max(0, round(mean - (length + 1) / 2))
        for at in range(0, seen.prompt_rows, length):
            count = min(length, seen.prompt_rows - at)
            segments.append(_segment(first, count, is_prompt=True))
    logits = [replace(s, wants_logits=i < one.num_logits) for i, s in enumerate(segments)]
    return make_batch(logits, micro_batch_tokens=micro_batch_tokens, groups=groups)


def _segment(first: int, count: int, *, is_prompt: bool) -> Segment:
    return Segment(
        sequence=0, token_ids=(0,) * count, first_position=first, pages=(), state_slot=-1,
        is_prompt=is_prompt, long_rope=False, wants_logits=False,
    )  # fmt: skip


# --- all passes of a job --------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Point:
    """A pass that was timed. `slower`: its seconds over the least that was estimated; `disk`: the
    share of them that the disk worked; `host`: the host's seconds over what was estimated."""

    rows: int
    slower: float
    disk: float
    host: float


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
        self._pass_cost = PassCost(problem)
        self._held = held_shares(plan, problem.sizes)
        model = ClockedModel(problem, plan) if on_clock else None
        cold = self._pass_cost.of(runs[0], {}) if model is None else model.run(runs[0])
        self._points = [self._point(one, model) for one in _choose(runs)][::-1]
        warm = self.of(runs[0])
        self.load = Timed(
            max(0.0, cold.seconds - warm.seconds),
            {lane: max(0.0, cold.busy[lane] - warm.busy[lane]) for lane in cold.busy},
        )

    def of(self, one: PassRun) -> Timed:
        """A pass like `one`, with weights where the passes before left them. The disk may work more
        than it must: it is never idle while anything is hinted."""
        estimated = self._pass_cost.of(one, self._held)
        at = bisect_left([point.rows for point in self._points], one.num_rows)
        high = self._points[min(at, len(self._points) - 1)]
        low = self._points[max(at - 1, 0)] if high.rows > one.num_rows else high
        share = _share(log2(low.rows), log2(high.rows), log2(max(1, one.num_rows)))
        seconds = max(estimated.busy.values()) * _mean(low.slower, high.slower, share)
        host = min(seconds, estimated.busy["host"] * _mean(low.host, high.host, share))
        disk = seconds * _mean(low.disk, high.disk, share)
        return Timed(seconds, {"disk": disk, "host": host})

    def sample_s(self, num_rows: int) -> float:
        """Drawing a token for each of `num_rows` rows of logits, after the pass."""
        return self._pass_cost.costs.sample_s(num_rows)

    def _point(self, one: PassRun, model: ClockedModel | None) -> _Point:
        estimated = self._pass_cost.of(one, self._held)
        timed = estimated
        if model is not None:
            model.run(one)  # finds the weights as a pass of another size left them
            timed = model.run(one)
        return _Point(
            one.num_rows,
            timed.seconds / max(estimated.busy.values()),
            min(1.0, timed.busy["disk"] / timed.seconds),
            timed.busy["host"] / estimated.busy["host"],
        )


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
