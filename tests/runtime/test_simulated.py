"""The schedule on the clock and on the device: the same operations on the same keys in the same
order, for every family; and the clock itself."""

from collections import Counter
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest

from engines import FAMILIES, engine_for, make_model, prompts, request, run_all
from fakes import FakeDevice
from routing import CountingRouter
from windlass.forecast.interface import ExpertTable
from windlass.forecast.registry import FORECASTS
from windlass.forecast.usage import UsageForecast
from windlass.ids import DISK_TO_HOST, Part
from windlass.prefetch.expert_pool import ExpectedNextUse, floor_of
from windlass.prefetch.prefetcher import Prefetcher
from windlass.runtime.clock import Clock, LaneJob, Lanes, LaneWork
from windlass.runtime.routing_report import RoutingReport
from windlass.runtime.simulated import SimulatedParts, SimulatedRuntime, SimulatedWeights
from windlass.schedule import batch as batches
from windlass.schedule.passes import run_pass

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


def _clock_runtime(spec, shape, costs, *, slots, reads, num_keys, depth, router, overlap):
    forecast = UsageForecast(ExpertTable.of(spec))
    lanes = Lanes(Clock(), ("disk", "host"))
    weights = SimulatedWeights(
        lanes, costs, SimulatedParts(num_keys, slots, reads), depth=depth,
        policy=pool(forecast, slots),
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
