"""What knows the future: known answers, and that nobody who does not know it is faster."""

import numpy as np
import pytest

from traces import cache_hits, topical_ids, trace_of, uniform_ids
from windlass.forecast.registry import ForecastSetting, choose_forecast
from windlass.prefetch.registry import POLICIES, choose_policy
from windlass.replay.bounds import Misses, NextUses, belady, oracle
from windlass.replay.run import Deciders, TraceRun, ratio_machine


def seconds_of(trace, slots, rho, by):
    run = TraceRun(trace, ratio_machine(trace, slots, rho), by)
    counts = run.run()
    run.weights.cache.check()
    return counts


def deciders(trace, policy, slots, forecast="off"):
    made = choose_forecast(forecast, ForecastSetting(trace.table(), 0))
    return Deciders(made, *choose_policy(policy, made.outlook, slots))


def test_the_next_use_of_every_expert_is_known_layer_by_layer():
    ids = np.array([[[0], [1]], [[2], [1]], [[0], [0]]])
    uses = NextUses(trace_of(ids, 3))
    assert uses.next_N[[0, 2, 3, 4]].tolist() == [0, 2, 5, 1]
    assert uses.next_N[1] == uses.next_N[5] > 1 << 50, "never"
    assert uses.needed(0, 0).tolist() == [0] and uses.needed(0, 1).tolist() == [4]
    uses.passed(uses.needed(0, 0))
    assert uses.next_N[0] == 4


def test_belady_of_a_cyclic_scan_freezes_a_set_or_moves_one_slot():
    ids = np.arange(12)[None].repeat(40, 0).reshape(-1, 1, 1)
    found = belady(trace_of(ids, 12), 8)
    cold = 8 / len(ids)
    assert found.belady == pytest.approx(1 - 8 / 12 + cold, abs=0.005)
    assert found.forced == pytest.approx(1 - 7 / 11, abs=0.02)


def test_what_a_layer_needs_is_served_together():
    """One after the other, of 0, 1 and then 1, 2, LRU would lose 1 to 0 before it is used."""
    ids = np.array([[[0, 1]], [[1, 2]]] * 30)
    trace = trace_of(ids, 3)
    assert belady(trace, 2).forced == pytest.approx(61 / 120)
    events = [(0, row[0].tolist()) for row in ids]
    assert cache_hits(deciders(trace, "lru", 2).policy, events, 2) == 59 / 120
    counts = seconds_of(trace, 2, 1.0, deciders(trace, "lru", 2))
    assert counts.values["hits"].sum() == 59


@pytest.mark.parametrize("slots", [6, 14])
def test_belady_misses_no_more_than_any_policy(slots):
    trace = trace_of(topical_ids(5, 50, 2, 10, 2), 10)
    found = belady(trace, slots)
    assert found.belady <= found.forced
    for name in POLICIES:
        values = seconds_of(trace, slots, 1.0, deciders(trace, name, slots)).values
        assert found.forced <= 1 - values["hits"].sum() / values["requests"].sum() + 1e-9, name


def test_shares_of_the_gap_add_up():
    shares = Misses(belady=0.2, forced=0.25).shares(0.4)
    assert shares == pytest.approx({"gap": 0.5, "admission": 0.25, "victim": 0.75})
    unforced = Misses(belady=0.2, forced=0.5).shares(0.4)
    assert unforced == pytest.approx({"gap": 0.5, "admission": None, "victim": None})
    assert Misses(0.0, 0.0).shares(0.0) == {"gap": None, "admission": None, "victim": None}


def test_who_knows_all_never_waits_for_a_link_that_takes_no_time():
    trace = trace_of(uniform_ids(1, 60, 3, 8, 2), 8)
    counts = seconds_of(trace, 9, 1e-9, oracle(trace, None))
    assert counts.values["wait_s"].sum() < 1e-6
    assert counts.values["seconds"].sum() == pytest.approx(60 * 3 * 1.108, rel=1e-6)


@pytest.mark.parametrize("rho", [0.7, 6.0])
def test_the_oracle_is_never_slower_than_any_policy(rho):
    trace = trace_of(topical_ids(7, 40, 3, 10, 2), 10)
    best = min(
        seconds_of(trace, 12, rho, oracle(trace, sees)).values["seconds"].sum()
        for sees in (1, None)
    )
    for name in POLICIES:
        by = deciders(trace, name, 12, "usage")
        assert best <= seconds_of(trace, 12, rho, by).values["seconds"].sum() + 1e-9, name


def test_an_oracle_that_sees_further_is_faster_where_the_link_binds():
    trace = trace_of(topical_ids(8, 60, 4, 10, 2), 10)
    seconds = [
        seconds_of(trace, 16, 6.0, oracle(trace, sees)).values["seconds"].sum()
        for sees in (1, 2, 4)
    ]
    assert seconds[0] > seconds[1] > seconds[2]


def test_an_oracle_reads_nothing_in_vain():
    trace = trace_of(topical_ids(9, 80, 3, 10, 2), 10)
    values = seconds_of(trace, 14, 2.0, oracle(trace, 2)).values
    assert values["issued"].sum() > 20
    assert values["used"].sum() == pytest.approx(values["issued"].sum(), abs=2)  # the last ones
