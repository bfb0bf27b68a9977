"""What a replay comes to: its books add up, and its times have known answers."""

import numpy as np
import pytest

from traces import topical_ids, trace_of, uniform_ids
from windlass.forecast.interface import likely
from windlass.forecast.registry import ForecastSetting, choose_forecast
from windlass.forecast.usage import UsageForecast
from windlass.prefetch.prefetcher import Prefetcher
from windlass.prefetch.registry import choose_policy
from windlass.replay.bounds import oracle
from windlass.replay.metrics import measure
from windlass.replay.run import Deciders, PassCounts, TraceRun, ratio_machine


class Eager(UsageForecast):
    """Proposes what is hardly likely: much is read in vain."""

    def candidates(self, layer):
        return likely(self.outlook, layer, at_least=0.1)


def deciders(trace, policy, slots, forecast="off"):
    made = choose_forecast(forecast, ForecastSetting(trace.table(), 0))
    return Deciders(made, *choose_policy(policy, made.outlook, slots))


def measured(trace, slots, rho, by, **more):
    run = TraceRun(trace, ratio_machine(trace, slots, rho), by)
    counts = run.run()
    run.weights.cache.check()
    layers = len(trace.table().layers)
    return measure(
        trace, counts, num_bytes=run.machine.num_bytes, layer_slots=slots / layers, **more
    )


def test_with_room_for_all_only_first_uses_miss():
    ids = uniform_ids(3, 60, 2, 8, 2)
    found = measured(trace_of(ids, 8), 16, 3.0, deciders(trace_of(ids, 8), "lru", 16))
    assert (1 - found.resident_hits) * 60 * 4 == pytest.approx(16)
    assert found.prefetch_hits == 0 and found.operating_point == pytest.approx(2 / 8)


def test_on_demand_a_token_takes_its_computation_and_its_misses():
    trace = trace_of(topical_ids(1, 80, 2, 10, 2), 10)
    found = measured(trace, 8, 5.0, deciders(trace, "lfru", 8))
    misses = (1 - found.resident_hits) * 2 * 2
    assert found.useful_bytes == found.wasted_bytes == found.late == 0
    assert found.bytes == found.demand_bytes == pytest.approx(misses * (8 << 20))
    # reads overlap with nothing but experts that are there
    assert 2.216 + misses * 2.5 - 2 * (2 / 3) <= found.token_s <= 2.216 + misses * 2.5
    assert found.token_s - found.stall_s == pytest.approx(2.216)
    assert found.of_resident == pytest.approx(2.216 / found.token_s)


@pytest.mark.parametrize("policy", ["next-use", "lfru", "lru-pool"])
@pytest.mark.parametrize("rho", [0.6, 4.0])
def test_every_byte_is_demanded_useful_or_wasted(policy, rho):
    trace = trace_of(topical_ids(2, 70, 3, 10, 2), 10)
    eager = Eager(trace.table())
    chosen = choose_policy(policy, eager.outlook, 12)
    by = Deciders(eager, *chosen, prefetcher=Prefetcher)
    run = TraceRun(trace, ratio_machine(trace, 12, rho), by)
    counts = run.run()
    found = measure(trace, counts, num_bytes=8 << 20, layer_slots=4)
    total = {name: values.sum() for name, values in counts.values.items()}
    assert total["issued"] > 30 and total["used"] > 10 and found.wasted_bytes > 0
    assert found.bytes == pytest.approx(
        found.demand_bytes + found.useful_bytes + found.wasted_bytes
    )
    read = run.weights.cache.stats().bytes_read - _warmed(run)
    assert found.bytes * found.tokens == pytest.approx(read)
    assert found.good is not None
    assert 0 <= found.good < total["used"] / total["issued"] <= 1
    assert (found.prefetch_hits > 0) == (found.good > 0) == (rho < 1)  # else nothing is in time
    assert found.hits * total["requests"] == pytest.approx(total["hits"])


def _warmed(run):
    """Bytes of what was there before the first pass: one of each part that is no expert."""
    return 3 + 2 * len(run.machine.shape.layers) - len(run.machine.shape.layers)


def test_hits_of_what_was_read_ahead_are_told_apart():
    trace = trace_of(topical_ids(4, 80, 3, 10, 2), 10)
    found = measured(trace, 12, 1.5, oracle(trace, 2))
    demand = measured(trace, 12, 1.5, deciders(trace, "next-use", 12))
    assert found.prefetch_hits > 0.1 and demand.prefetch_hits == 0
    assert found.hits > demand.hits


def test_prompts_run_but_are_not_measured():
    ids = topical_ids(5, 40, 2, 10, 2)
    trace = trace_of(ids, 10, num_prompt=10)
    assert trace.num_decode_rows == 30
    found = measured(trace, 8, 3.0, deciders(trace, "lru", 8))
    assert found.tokens == 30


def counted(hits):
    """Passes of ten requests each."""
    hits = np.asarray(hits, float)
    values = {name: np.zeros(len(hits)) for name in ("bytes_read", "issued", "used", "late",
              "cancelled", "wait_s")}  # fmt: skip
    values |= {"hits": hits, "requests": np.full(len(hits), 10.0), "seconds": np.ones(len(hits))}
    return PassCounts(np.ones(len(hits), int), np.zeros(len(hits), bool), values)


def test_warm_is_when_hits_stay_near_what_they_are_later():
    trace = trace_of(np.zeros((400, 1, 1), int), 1)
    found = measure(trace, counted([0] * 100 + [8] * 300), num_bytes=1, layer_slots=1)
    assert found.warm_after is not None and 95 <= found.warm_after <= 100
    few = measure(
        trace_of(np.zeros((50, 1, 1), int), 1), counted([8] * 50), num_bytes=1, layer_slots=1
    )
    assert few.warm_after is None


def test_recovery_is_counted_from_changes_of_the_domain():
    sequences = np.repeat(np.arange(6), 40)
    trace = trace_of(np.zeros((240, 1, 1), int), 1, sequences=sequences)
    domains = {i: "ab"[i % 2] for i in range(6)}
    counts = counted(([2] * 12 + [8] * 28) * 6)
    found = measure(trace, counts, num_bytes=1, layer_slots=1, domains=domains)
    assert found.recovery == 12
    steady = measure(trace, counted([7] * 240), num_bytes=1, layer_slots=1, domains=domains)
    assert steady.recovery == 0
    same = measure(trace, counts, num_bytes=1, layer_slots=1, domains=dict.fromkeys(range(6), "a"))
    assert same.recovery is None
