"""What other programs do: known answers of caches, and that what should be the same is."""

from dataclasses import replace

import numpy as np
import pytest

from routing import rows
from traces import cache_hits, topical_ids, trace_of, uniform_ids
from windlass.forecast.interface import Candidates, ExpertTable, Outlook
from windlass.forecast.registry import (
    FORECASTS,
    WITH_STATES,
    ForecastSetting,
    choose_forecast,
)
from windlass.ids import Part, WeightKey
from windlass.options import EXPERT_CACHE_POLICIES, EXPERT_FORECASTS
from windlass.prefetch.baselines import (
    LeastFrequentlyUsed,
    LeastFrequentRecent,
    LeastRecentlyUsed,
    RecentScores,
)
from windlass.prefetch.expert_pool import ExpectedNextUse
from windlass.prefetch.policies import FarthestNextUse
from windlass.prefetch.prefetcher import Prefetcher
from windlass.prefetch.registry import POLICIES, choose_policy
from windlass.replay.run import Deciders, TraceRun, ratio_machine
from windlass.schedule.observer import RoutedTokens

LAYERS, EXPERTS, TOP_K = 3, 12, 2
TABLE = ExpertTable([EXPERTS] * LAYERS, TOP_K)
PER_LAYER = (LeastRecentlyUsed, LeastFrequentlyUsed, LeastFrequentRecent, RecentScores)


def events_of(ids_RLA):
    return [(layer, ids.tolist()) for row in ids_RLA for layer, ids in enumerate(row)]


def expert(layer, index):
    return WeightKey(Part.EXPERT, layer, index)


@pytest.mark.parametrize("kind", PER_LAYER)
def test_uniform_routing_hits_by_the_share_that_is_kept_whatever_the_policy(kind):
    ids = uniform_ids(1, 1200, LAYERS, EXPERTS, TOP_K)
    assert cache_hits(kind(TABLE, 5 * LAYERS), events_of(ids), 5 * LAYERS) == pytest.approx(
        5 / EXPERTS, abs=0.02
    )


def test_a_cyclic_scan_is_the_worst_for_lru_and_a_frozen_set_hits_by_its_share():
    table = ExpertTable([EXPERTS, 0], 1)  # of two layers, one of them without experts
    events = [(0, [i % EXPERTS]) for i in range(20 * EXPERTS)]
    assert cache_hits(LeastRecentlyUsed(table, None), events, 8, num_layers=2) == 0
    frozen = RecentScores(table, None)
    frozen._scores[:] = -np.arange(EXPERTS)
    assert cache_hits(frozen, events, 8, num_layers=2) == pytest.approx(
        7 / EXPERTS, abs=0.04
    )  # one slot moves


def test_lru_lfu_and_lfru_give_up_what_their_names_say():
    events = [(0, [0]), (0, [0]), (0, [0]), (0, [1]), (0, [2]), (0, [2])]
    table = ExpertTable([4, 0], 1)
    found = {}
    for kind in (LeastRecentlyUsed, LeastFrequentlyUsed, LeastFrequentRecent):
        policy = kind(table, None)
        cache_hits(policy, events, 3, num_layers=2)
        found[kind] = policy.victim(expert(0, 3), None)
    assert found[LeastRecentlyUsed] == expert(0, 0)
    assert found[LeastFrequentlyUsed] == found[LeastFrequentRecent] == expert(0, 1)


def test_lfru_forgets_what_was_frequent_long_ago():
    table = ExpertTable([4, 1], 1)
    often, lately = [(0, [0])] * 6, [(0, [1]), (0, [1]), (0, [2])]
    events = [one for event in often + [(0, [2])] * 20 + lately for one in (event, (1, [0]))]
    counted, aged = (kind(table, None) for kind in (LeastFrequentlyUsed, LeastFrequentRecent))
    for policy in (counted, aged):
        cache_hits(policy, events, 4)
    assert counted.victim(expert(0, 3), None) == expert(0, 1)
    assert aged.victim(expert(0, 3), None) == expert(0, 0)


def test_every_layer_gets_its_share_back_after_a_prompt_that_one_took_all_of():
    policy = LeastRecentlyUsed(TABLE, 4 * LAYERS)
    for index in range(4 * LAYERS):
        policy.add(expert(0, index))
    events = events_of(uniform_ids(2, 30, LAYERS, EXPERTS, TOP_K))
    resident = {expert(0, index) for index in range(4 * LAYERS)}
    for layer, needed in events:
        keys = [expert(layer, index) for index in needed]
        for key in keys:
            policy.discard(key)
        for key in keys:
            if key not in resident:
                victim = policy.victim(key, None)
                assert victim is not None
                policy.discard(victim)
                resident.remove(victim)
                resident.add(key)
            policy.note_use(key)
        for key in keys:
            policy.add(key)
    assert [sum(key.layer == i for key in resident) for i in range(LAYERS)] == [4, 4, 4]


def test_mrs_averages_the_largest_scores_of_all_rows():
    table = ExpertTable([8], 1)
    policy = RecentScores(table, None)
    for index in range(4):
        policy.add(expert(0, index))
    scores_TE = np.array([[0.5, 0.3, 0.1, 0.05, 0.05, 0, 0, 0], [0, 0.15, 0, 0.85, 0, 0, 0, 0]])
    policy.observe(RoutedTokens(0, rows(2), np.zeros(8), None, scores_TE))
    # means: 0.25, 0.225, 0.05, 0.45: TopP keeps the two largest, the second of one row among them
    shares = 0.5 * 0.125 + 0.5 * np.array([0.25, 0, 0, 0.45, 0, 0, 0, 0])
    assert policy._scores == pytest.approx(shares)
    assert policy.victim(expert(0, 7), None) in (expert(0, 1), expert(0, 2))
    policy.discard(expert(0, 2))
    assert policy.victim(expert(0, 7), None) == expert(0, 1)
    logits_TE = np.log(np.maximum(scores_TE, 1e-9))
    other = RecentScores(table, None)
    other.observe(RoutedTokens(0, rows(2), np.zeros(8), None, logits_TE))
    assert other._scores == pytest.approx(policy._scores, abs=1e-6)


class Certain:
    """A forecast that takes every use for certain."""

    wants_scores = wants_states = False
    threshold: float | None = None
    speculates: bool = True

    def __init__(self, table):
        self.outlook = Outlook(table)
        for each in (self.outlook.now, self.outlook.next, self.outlook.usage):
            each[:] = 1.0

    def begin(self, batch, embedded_TD):
        pass

    observe = end = lambda self, given: None

    def work(self):
        return False

    def candidates(self, layer):
        return Candidates(np.zeros(0, np.int64), np.zeros(0))


@pytest.mark.parametrize("seed", range(5))
def test_where_all_is_certain_expected_next_use_decides_as_the_farthest_does(seed):
    """The same reads in the same order, hints included."""
    random = np.random.default_rng(seed)
    layers, experts = int(random.integers(2, 5)), int(random.integers(6, 12))
    per_pass = int(random.integers(1, 5))
    ids = uniform_ids(seed, 25 * per_pass, layers, experts, 2)
    trace = trace_of(ids, experts, rows_per_pass=per_pass)
    slots = int(random.integers(2 * per_pass + 2, layers * experts - 1))
    rho = float(random.choice([0.5, 3.0]))
    logs = []
    for name in ("expected", "farthest"):
        forecast = Certain(trace.table())
        policy = (
            ExpectedNextUse(forecast.outlook, floor=3)
            if name == "expected"
            else FarthestNextUse(layers)
        )
        log: list[WeightKey] = []
        machine = ratio_machine(trace, slots, rho)
        machine = replace(machine, costs=Logging(machine.costs, log))
        run = TraceRun(trace, machine, Deciders(forecast, policy, prefetcher=Prefetcher))
        counts = run.run()
        logs.append((log, counts.values["seconds"].tolist(), counts.values["hits"].tolist()))
    assert len(logs[0][0]) > 40
    assert logs[0] == logs[1]


class Logging:
    """Costs that note what is read."""

    def __init__(self, costs, log):
        self._costs, self._log = costs, log

    def __getattr__(self, name):
        return getattr(self._costs, name)

    def block(self, key, num_bytes):
        self._log.append(key)
        return self._costs.block(key, num_bytes)


def test_names_of_flags_are_those_of_the_registries():
    assert tuple(POLICIES) == EXPERT_CACHE_POLICIES
    assert tuple(FORECASTS) == EXPERT_FORECASTS


def test_who_wants_states_is_known_before_a_trace_is_read():
    setting = ForecastSetting(TABLE, 4)
    made = {name: choose_forecast(name, setting) for name in EXPERT_FORECASTS}
    assert tuple(name for name, one in made.items() if one.wants_states) == WITH_STATES


@pytest.mark.parametrize("name", EXPERT_CACHE_POLICIES)
def test_every_policy_runs_a_trace_and_its_books_agree(name):
    trace = trace_of(topical_ids(3, 40, LAYERS, EXPERTS, TOP_K), EXPERTS, num_prompt=1)
    forecast = choose_forecast("usage", ForecastSetting(TABLE, 0))
    chosen = choose_policy(name, forecast.outlook, 12)
    run = TraceRun(trace, ratio_machine(trace, 12, 2.0), Deciders(forecast, *chosen))
    counts = run.run()
    run.weights.cache.check()
    assert counts.values["requests"].sum() == 40 * LAYERS * TOP_K
    assert 0.2 < counts.values["hits"].sum() / counts.values["requests"].sum() < 0.9


def test_what_other_groups_may_want_is_kept_until_the_last_has_passed():
    """Of a pass in several groups, the next block is used while the layer is still open."""
    table = ExpertTable((2, 2, 2, 2), 2)  # all are certain
    outlook = Outlook(table)
    pool = ExpectedNextUse(outlook)
    here, ahead = WeightKey(Part.EXPERT, 1, 0), WeightKey(Part.EXPERT, 2, 0)
    missing = WeightKey(Part.EXPERT, 1, 1)
    pool.note_use(WeightKey(Part.BLOCK, 1))
    outlook.layer, outlook.is_open = 1, True  # the first group has routed
    pool.note_use(here)
    pool.add(here)
    pool.note_use(WeightKey(Part.BLOCK, 2))  # its attention in the next layer
    assert pool.now == 1
    assert pool.victim(ahead, 1) is None, "a hint takes the place of what the next group wants"
    assert pool.victim(missing, None) == here, "a demand must have one"
    outlook.is_open = False
    assert pool.victim(ahead, 1) is None, "the last group has not used it yet"
    pool.note_use(here)
    pool.add(here)
    assert pool.now == 1 and pool.victim(ahead, 1) == here
    outlook.layer = 2
    pool.add(ahead)
    assert pool.victim(missing, None) == here and pool.now == 2
