"""The schedule on the clock and on the device: the same operations on the same keys in the same
order, for every family; and the clock itself."""

import random
from collections import Counter
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from typing import Any

import pytest

from engines import FAMILIES, engine_for, make_model, prompts, request, run_all
from fake_cuda import FakePinned
from fakes import FakeDevice
from routing import CountingRouter, rows
from timed_cuda import LANES, TimedCuda
from two_processors import Model, tier_with
from windlass.build import homes
from windlass.checkpoint.part_reads import Read
from windlass.forecast.interface import ExpertTable
from windlass.forecast.registry import FORECASTS
from windlass.forecast.usage import UsageForecast
from windlass.ids import DISK_TO_HOST, HOST, Home, Part
from windlass.models.registry import read_spec
from windlass.options import read_config
from windlass.prefetch.baselines import LeastRecentlyUsed
from windlass.prefetch.expert_pool import ExpectedNextUse, floor_of
from windlass.prefetch.prefetcher import Prefetcher
from windlass.prefetch.tiers import LowerPolicy, UpperPolicy, takers
from windlass.runtime.clock import HOST_TO_DEVICE, Clock, LaneJob, Lanes, LaneWork
from windlass.runtime.routing_report import RoutingReport
from windlass.runtime.simulated import SimulatedParts, SimulatedRuntime, SimulatedWeights
from windlass.runtime.simulated_host import SimulatedHostExperts
from windlass.schedule import batch as batches
from windlass.schedule.passes import PassShape, run_pass

BLOCK_S = 1.0


class Recorder:
    """A `Runtime` that passes every call on, notes it, and says when an operation has ended."""

    def __init__(self, inner, notes, ended):
        self._inner, self._notes, self._ended = inner, notes, ended

    def _op(self, *note):
        self._notes.append(note)
        self._ended()

    def begin(self, batch):
        hidden = self._inner.begin(batch)
        self._op("embed", batch.num_tokens)
        return hidden

    def prefetch(self, layer):
        self._notes.append(("prefetch", layer))
        self._inner.prefetch(layer)

    @contextmanager
    def lease(self, key):
        with self._inner.lease(key) as lease:
            self._notes.append(("lease", lease.key))
            yield lease
        self._notes.append(("release", key))

    def arrivals(self, keys):
        for arrived in self._inner.arrivals(keys):
            self._notes.append(("arrived", *(one.key for one in arrived)))
            yield arrived

    def replay(self, layer):
        return self._inner.replay(layer)

    def replay_block(self, layer):
        return self._inner.replay_block(layer)

    def attend(self, layer, weights, hidden, rows):
        begun = self._inner.attend(layer, weights, hidden, rows)
        self._op("attend", layer, rows.first_token, rows.num_tokens)
        return begun

    def attended(self, layer, weights, hidden, rows, begun):
        self._inner.attended(layer, weights, hidden, rows, begun)
        self._notes.append(("attended", layer, rows.first_token))

    def enter_experts(self, layer, weights, hidden, group):
        routed = self._inner.enter_experts(layer, weights, hidden, group)
        self._op("route", layer, group.first_token, routed.experts)
        return routed

    def experts(self, layer, arrived, routed):
        self._inner.experts(layer, arrived, routed)
        self._op("experts", layer, *(one.key.index for one in arrived))

    def leave_experts(self, layer, routed):
        self._inner.leave_experts(layer, routed)
        self._op("combine", layer)

    def enter_dense(self, layer, weights, hidden, group):
        return self._inner.enter_dense(layer, weights, hidden, group)

    def dense(self, layer, weights, normed):
        self._inner.dense(layer, weights, normed)
        self._op("dense", layer)

    def enter_head(self, hidden, batch):
        return self._inner.enter_head(hidden, batch)

    def head(self, weights, final):
        self._inner.head(weights, final)
        self._op("head", weights.key.index)

    def finish(self, final):
        return self._inner.finish(final)


class EqualCosts:
    """Every operation takes as long as `blocks` blocks, and a moment more."""

    def __init__(self, blocks):
        self._work = LaneWork(LaneJob("host", blocks * BLOCK_S * (1 + 1e-7)))

    def embedding_rows(self, num_rows):
        raise AssertionError("the table is resident here")

    def block(self, key, num_bytes):
        return ((DISK_TO_HOST, BLOCK_S),)

    def __getattr__(self, name):
        return lambda *_: self._work


def num_experts(spec):
    return max(ExpertTable.of(spec).num_experts)


def pool(forecast, slots):
    table = forecast.outlook.table
    return ExpectedNextUse(forecast.outlook, floor=floor_of(table, slots[Part.EXPERT]))


def _clock_runtime(
    spec, shape, costs, *, slots, reads, num_keys, depth, router, overlap, policy=pool
):
    forecast = UsageForecast(ExpertTable.of(spec))
    lanes = Lanes(Clock(), ("disk", "host"))
    weights = SimulatedWeights(
        lanes, costs, SimulatedParts(num_keys, slots, reads), depth=depth,
        policy=policy(forecast, slots),
    )  # fmt: skip
    prefetcher = Prefetcher(shape, weights.cache, forecast)
    return SimulatedRuntime(
        lanes, costs, weights, prefetcher=prefetcher if overlap else None,
        forecast=forecast, router=router,
    )  # fmt: skip


@pytest.fixture(scope="module")
def checkpoint(request, tmp_path_factory):
    path = tmp_path_factory.mktemp(request.param)
    make_model(request.param, path)
    return path


# blocks, slots, schedule, overlap, groups
SETTINGS = [(0, "2", "module-based", True, 1), (1, "3", "model-based", True, 1),
            (3, "1", "module-based", True, 1), (0, "64", "module-based", True, 3),
            (1, "4", "module-based", False, 1), (1, "2", "module-based", True, 2)]  # fmt: skip
# Families with other kinds of layers get all settings, the rest two each, in turn.
OF_OTHER_LAYERS = ("deepseek_v3", "gpt_oss", "ernie4_5_moe", "qwen3_next")
COMPARED = [
    (family, *settings)
    for i, family in enumerate(FAMILIES)
    for j, settings in enumerate(SETTINGS)
    if family in OF_OTHER_LAYERS or (i + j) % len(SETTINGS) in (0, 2)
]


@pytest.mark.parametrize(
    ("checkpoint", "blocks", "slots", "schedule", "overlap", "groups"),
    COMPARED,
    indirect=["checkpoint"],
)
def test_the_clock_does_what_the_device_does(
    checkpoint, monkeypatch, blocks, slots, schedule, overlap, groups
):
    """Copies answer in their order: only while the caller waits, and `blocks` of them during each
    operation. Layers that are repeated have no operations of their own: none is here."""
    monkeypatch.setattr(batches, "MOST_CAPTURED", 0)
    options = dict(
        moe_expert_cache_size=slots, micro_batch_size=64, schedule=schedule,
        expert_forecast="usage", batch_groups=groups,
    )  # fmt: skip
    if not overlap:
        with engine_for(checkpoint, **options) as engine:
            options["plan"] = replace(engine.plan, overlap=False)
    device = FakeDevice(manual=True)
    real: list[Any] = []
    passes: list[Any] = []
    kept: dict[str, Any] = {}

    def recorded(runtime, shape, batch):
        store = runtime._weights
        kept.update(runtime=runtime, shape=shape, store=store)
        store._changed.wait = lambda: device.complete(0)
        first = len(real)

        def ended():
            for _ in range(blocks):
                if device.pending:
                    device.complete(0)

        outcome = run_pass(Recorder(runtime, real, ended), shape, batch)
        passes.append((batch, real[first:]))
        return outcome

    monkeypatch.setattr("windlass.engine.engine.run_pass", recorded)
    routed = _note_routing(monkeypatch)
    engine = engine_for(checkpoint, device=device, **options)
    given = prompts((70, 3, 41, 9), seed=1)
    run_all(engine, [request(str(i), p, max_tokens=4 + i) for i, p in enumerate(given)])
    plan, store, spec = engine.plan, kept["store"], kept["runtime"]._spec
    real_stats = store.stats()
    device.complete_all()
    engine.close()

    queue = iter(routed)
    clock = _clock_runtime(
        spec, kept["shape"], EqualCosts(blocks), slots=plan.host.slots,
        reads=lambda key: store.supply.part_reads(key).reads,
        num_keys=Counter(key.part for key in store.supply.layout.parts), depth=device.num_lanes + 1,
        router=CountingRouter(lambda layer, rows: next(queue), num_experts(spec)),
        overlap=overlap,
    )  # fmt: skip
    assert len(passes) > 4
    for batch, expected in passes:
        notes: list[Any] = []
        run_pass(Recorder(clock, notes, lambda: None), kept["shape"], batch)
        assert notes == expected
    clock_stats = clock._weights.cache.stats()
    for name in ("bytes_read", "reads", "requests", "hits", "evictions", "prefetch_issued",
                 "prefetch_used", "prefetch_cancelled"):  # fmt: skip
        assert getattr(real_stats, name) == getattr(clock_stats, name), name
    if slots != "64":
        assert real_stats.evictions > 0
        assert (real_stats.prefetch_used > 0) == overlap


def _note_routing(monkeypatch):
    """What the engine routes: rows per expert, layer by layer, group by group. Its forecast is one
    that needs no more than that, as the clock's."""
    monkeypatch.setitem(FORECASTS, "usage", lambda setting: UsageForecast(setting.table))
    routed = []
    tell = RoutingReport.tell

    def told(self, *what):
        routed.append(tell(self, *what))
        return routed[-1]

    monkeypatch.setattr(RoutingReport, "tell", told)
    return routed


# --- a device above its host ----------------------------------------------------------------------

OP_S, JOB_S = 1.3, 2.9  # of an operation of the device, of a job of the host's worker
BLOCKS_S = {"disk": 1.0, "down": 0.37}
OF_ALL = {part: 999 for part in Part}
FEW_ABOVE = {**OF_ALL, Part.EXPERT: 3, Part.BLOCK: 2}
FEW_BELOW = {**OF_ALL, Part.EXPERT: 9}


class TimedCosts:
    """The same of the clock's lanes. Nothing is asked of links besides weights."""

    def attention(self, layer, rows):
        return self._by_host() if rows.home is Home.HOST else self._work()

    def block(self, key, num_bytes):
        return ((DISK_TO_HOST, BLOCKS_S["disk"]), (HOST_TO_DEVICE, BLOCKS_S["down"]))

    def host_experts(self, layer, num_rows):
        return self._by_host()

    def _by_host(self):
        return LaneWork(LaneJob("device", 0.0), ((LaneJob("host", JOB_S),),))

    def _work(self):
        return LaneWork(LaneJob("device", OP_S))

    def __getattr__(self, name):
        return lambda *_: self._work()


class OnDevice(Recorder):
    """Of an engine on a device. `looks`: how often the host has waited for what that has found;
    routing takes its time when it is told."""

    def __init__(self, inner, notes, device):
        super().__init__(inner, notes, lambda: device.spend(OP_S))
        self._device = device

    def _op(self, *note):
        self._ended()  # first, as on the clock: links go on meanwhile
        self._notes.append(note)

    def attend(self, layer, weights, hidden, rows):
        begun = self._inner.attend(layer, weights, hidden, rows)
        if rows.home is not Home.HOST:
            self._ended()
        self._notes.append(("attend", layer, rows.first_token, rows.num_tokens))
        return begun

    def enter_experts(self, layer, weights, hidden, group):
        waits = self._device.order.waits
        before = waits["up"]
        routed = self._inner.enter_experts(layer, weights, hidden, group)
        looks = waits["up"] > before
        self._notes.append(("route", layer, group.first_token, routed.experts, looks))
        return routed


class OnClock(Recorder):
    def enter_experts(self, layer, weights, hidden, group):
        routed = self._inner.enter_experts(layer, weights, hidden, group)
        looks = layer not in self._inner._unseen
        self._notes.append(("route", layer, group.first_token, routed.experts, looks))
        return routed


def _note_copies(queue, notes, label):
    """Blocks as they are sent, by where they go."""
    move = queue._move

    def moved(ticket, block):
        notes.append((f"to {ticket.route.destination}", label(block)))
        move(ticket, block)

    queue._move = moved


def _on_two_tiers(own, plan, monkeypatch, requests):
    """Passes of an engine on a device with streams: batches, and what was done; what it routed."""
    monkeypatch.setattr(batches, "MOST_CAPTURED", 0)
    monkeypatch.setitem(FORECASTS, "usage", lambda setting: UsageForecast(setting.table))
    device = TimedCuda(block_s=BLOCKS_S, job_s=JOB_S)
    monkeypatch.setattr(homes, "ThreadPoolExecutor", lambda *_: device.worker)
    notes: list[Any] = []
    passes: list[Any] = []
    routed: list[Any] = []
    kept: dict[Any, Any] = {}
    tell = RoutingReport.tell

    def told(self, layer, rows, residual_TD):
        with device._quiet():
            counts = enumerate(rows.groups.counts_E.tolist())
            routed.append({expert: count for expert, count in counts if count})
        found = tell(self, layer, rows, residual_TD)
        device.spend(OP_S)
        return found

    def recorded(runtime, shape, batch):
        kept.update(shape=shape)
        notes.clear()
        outcome = run_pass(OnDevice(runtime, notes, device), shape, batch)
        passes.append((batch, list(notes)))
        return outcome

    monkeypatch.setattr(RoutingReport, "tell", told)
    monkeypatch.setattr("windlass.engine.engine.run_pass", recorded)
    with device.watched(), own.open(
        plan, device=device.below, above=device, expert_forecast="usage", expert_usage="off"
    ) as engine:  # fmt: skip
        store = engine._weights
        store._queue.changed.wait = device.wait
        _note_copies(store._queue, notes, lambda copy: copy.label)
        run_all(engine, requests)
        kept.update(store=store, stats=store.stats(), below=store.supply.below.stats())
    assert not device.memory.races
    return passes, routed, kept


def _parts_of(store, plan):
    """Parts of the host, and of the device above it."""
    supply = store.supply
    num_keys = Counter(key.part for key in supply.layout.parts)

    def reads(key):
        return supply.store.supply.part_reads(key).reads

    def moves(key):
        return [Read("", 0, move.num_bytes, 0) for move in supply._learn(key)[0].moves]

    return (
        SimulatedParts(num_keys, plan.host.slots, reads),
        SimulatedParts(num_keys, plan.above.slots, moves),
    )


def _clock_of_tiers(spec, shape, plan, parts, router, policy=pool):
    forecast = UsageForecast(ExpertTable.of(spec))
    lanes, costs, (host, above) = Lanes(Clock(), LANES), TimedCosts(), parts
    table, num_keys = forecast.outlook.table, host.num_keys
    kept = {part for part, count in plan.above.slots.items() if count >= num_keys[part]}
    lower = LowerPolicy(
        policy(forecast, plan.host.slots), takers(kept, table.num_experts, plan.host_experts)
    )
    below = SimulatedWeights(lanes, costs, host, policy=lower, depth=FakePinned.num_lanes + 1)
    weights = SimulatedWeights(
        lanes, costs, above, policy=UpperPolicy(policy(forecast, plan.above.slots), lower),
        depth=TimedCuda.num_lanes + 1, tier_below=below,
    )  # fmt: skip
    weights.cache.feed.tell(lower.came_above)
    prefetcher = Prefetcher(shape, weights.cache, forecast, below=below.cache)
    runtime = SimulatedRuntime(
        lanes, costs, weights, prefetcher=prefetcher if plan.overlap else None, forecast=forecast,
        router=router,
    )  # fmt: skip
    runtime.runs_ahead = True
    if plan.host_experts:
        prefetcher.leave_to_host(plan.host_experts)
        runtime.host = SimulatedHostExperts(
            lanes, below, table.num_experts, plan.host_experts, costs.host_experts
        )
    return runtime


@pytest.fixture(scope="module")
def of_family(tmp_path_factory):
    return cache(lambda family: Model(tmp_path_factory.mktemp(family), family))


@pytest.mark.parametrize(
    ("family", "groups", "attends", "experts", "overlap", "below"),
    [
        ("qwen3_moe", 1, 0.0, 0.0, True, OF_ALL),
        ("qwen3_moe", 2, 0.0, 0.0, True, FEW_BELOW),
        ("deepseek_v3", 2, 0.5, 0.0, True, FEW_BELOW),
        ("qwen3_moe", 1, 0.0, 0.5, True, FEW_BELOW),
        ("gpt_oss", 2, 0.5, 0.5, True, FEW_BELOW),
        ("qwen3_moe", 2, 0.5, 1.0, False, {**OF_ALL, Part.EXPERT: 3}),
    ],
)
def test_the_clock_does_what_an_engine_on_a_device_does(
    of_family, monkeypatch, family, groups, attends, experts, overlap, below
):
    """Attention of each group, here and on the host; copies from disk and to the device as they are
    sent; experts as they arrive, those of the host; and where the host waits for routing."""
    own = of_family(family)
    plan = own.plan_for(
        attends, FEW_ABOVE, groups=groups, micro_batch_tokens=64, host_experts=experts,
        overlap=overlap,
    )  # fmt: skip
    host = tier_with(own.plan.host, HOST, below, None)
    plan = replace(plan, tiers=(host, plan.tiers[1]))
    given = [request(f"r{i}", p, max_tokens=4 + i) for i, p in enumerate(prompts((70, 3, 60, 9)))]
    passes, routed, kept = _on_two_tiers(own, plan, monkeypatch, given)
    spec, queue = read_spec(read_config(own.path))[0], iter(routed)
    router = CountingRouter(lambda layer, rows: next(queue), num_experts(spec))
    clock = _clock_of_tiers(spec, kept["shape"], plan, _parts_of(kept["store"], plan), router)
    notes: list[Any] = []
    _note_copies(clock._weights._queue, notes, lambda block: str(block.key))
    looks = set()
    for batch, expected in passes:
        notes.clear()
        run_pass(OnClock(clock, notes, lambda: None), kept["shape"], batch)
        assert notes == expected
        looks |= {note[-1] for note in notes if note[0] == "route"}
    assert looks == {False, True} and len(passes[0][0].groups) == groups
    stats = [clock._weights.cache.stats(), clock._weights.tier_below.cache.stats()]
    for name in ("requests", "hits", "evictions", "prefetch_issued", "prefetch_used"):
        found = [getattr(one, name) for one in stats]
        assert found == [getattr(kept["stats"], name), getattr(kept["below"], name)], name
    assert kept["stats"].evictions > 0


def least_recent(forecast, slots):
    return LeastRecentlyUsed(forecast.outlook.table, None)


@pytest.mark.parametrize(
    ("above", "slots", "policy"),
    [(OF_ALL, 5, pool), (OF_ALL, 9, pool), (FEW_ABOVE, 5, least_recent), (OF_ALL, 9, least_recent)],
)
def test_a_host_that_computes_all_experts_keeps_what_one_without_a_device_does(
    of_family, above, slots, policy
):
    """Of a replay of generated rows, whose experts change slowly: as many hits, whether the device
    has all experts, for prompts, or few."""
    own = of_family("qwen3_moe")
    spec = read_spec(read_config(own.path))[0]
    plan = own.plan_for(0.0, above, host_experts=1.0, overlap=False)
    host = tier_with(own.plan.host, HOST, {**OF_ALL, Part.EXPERT: slots}, None)
    plan = replace(plan, tiers=(host, plan.tiers[1]))
    num_keys = {one.part: one.num_parts for one in plan.host.parts}
    shape = PassShape.of(spec, num_keys[Part.HEAD])

    def reads(key):
        return [Read("", 0, 4096, 0)]

    def router():
        chance, liked = random.Random(slots), {}

        def route(layer, num_rows):
            if layer not in liked or chance.random() < 0.1:
                liked[layer] = chance.sample(range(8), 4)
            return dict.fromkeys(sorted(chance.sample(liked[layer], 3)), 1)

        return CountingRouter(route, num_experts(spec))

    parts = [SimulatedParts(num_keys, tier.slots, reads) for tier in plan.tiers]
    chained = _clock_of_tiers(spec, shape, plan, parts, router(), policy)
    alone = _clock_runtime(
        spec, shape, EqualCosts(0), slots=plan.host.slots, reads=reads, num_keys=num_keys,
        depth=4, router=router(), overlap=False, policy=policy,
    )  # fmt: skip
    in_one = alone._weights.arrivals  # as the host demands them
    alone._weights.arrivals = lambda keys, **_: in_one(keys)
    below = chained._weights.tier_below.cache
    if above is OF_ALL:  # prompts have taken all
        for key in ExpertTable.of(spec).keys:
            below._resident._policy.came_above(key)
    for _ in range(60):
        for clock in (chained, alone):
            run_pass(clock, shape, rows(1))
    found, expected = below.stats(), alone._weights.cache.stats()
    assert found.requests[Part.EXPERT] == expected.requests[Part.EXPERT] == 60 * 2 * 3
    assert found.hits[Part.EXPERT] == expected.hits[Part.EXPERT] > 50
    assert found.evictions == expected.evictions > 0


# --- the clock itself -----------------------------------------------------------------------------


def test_lanes_serve_in_order_and_chains_run_beside_each_other():
    clock = Clock()
    lanes = Lanes(clock, ("link", "host", "device"), keeps_spans=True)
    work = LaneWork(
        LaneJob("device", 1.0),
        ((LaneJob("link", 2.0), LaneJob("host", 3.0)), (LaneJob("link", 1.0),)),
    )
    waits = lanes.start(work, "a"), lanes.start(LaneWork(LaneJob("device", 4.0)), "b")
    waits[1]()
    assert clock.now == 4.0  # others go on
    waits[0]()
    spans = {(span.lane, span.label, span.begin, span.end) for span in lanes.spans}
    assert spans == {
        ("link", "a", 0.0, 2.0), ("link", "a", 2.0, 3.0), ("host", "a", 2.0, 5.0),
        ("device", "b", 0.0, 4.0), ("device", "a", 5.0, 6.0),
    }  # fmt: skip
    assert clock.now == 6.0
    assert lanes.busy() == {"link": 3.0, "host": 3.0, "device": 5.0}


def test_a_clock_without_events_does_not_wait_for_ever():
    with pytest.raises(AssertionError, match="will not happen"):
        Clock().wait()
