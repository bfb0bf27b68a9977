"""FineMoE: its formulas against plain forms of them, and, by number, the traps that its public
program fell into."""

import threading
import time
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from planning import SPECS
from remembered import HIDDEN, Machine, Topics, chunks, cosine, play
from routing import rows
from windlass.errors import UsageError
from windlass.forecast.expert_map_store import ExpertMapStore
from windlass.forecast.finemoe import FineMoeForecast, FineMoeSettings, MapFile, choose
from windlass.forecast.gate_shares import are_logits, merged, shares_of
from windlass.forecast.interface import Candidates, ExpertTable
from windlass.forecast.moe_infinity import MoeInfinityForecast
from windlass.ids import Part, WeightKey
from windlass.models.spec import Moe, SigmoidTopK, TopKSoftmax
from windlass.prefetch.paper_pools import FineMoePool, MoeInfinityPool
from windlass.schedule.passes import run_pass

LAYERS, EXPERTS, TOP_K = 6, 8, 2
TABLE = ExpertTable([EXPERTS] * LAYERS, TOP_K)
AT_ONCE = FineMoeSettings(delay=0)


def finemoe(table=TABLE, **changed):
    return FineMoeForecast(table, HIDDEN, replace(AT_ONCE, **changed))


def store(**options):
    return ExpertMapStore(HIDDEN, [EXPERTS] * LAYERS, **options)


def expert(layer, index):
    return WeightKey(Part.EXPERT, layer, index)


# --- the formulas, against plain forms ------------------------------------------------------------


class Plain:
    """FineMoE for passes of one token, as its formulas read."""

    def __init__(self, capacity, distance, top_k):
        self.capacity, self.d, self.top_k = capacity, distance, top_k
        self.entries = []

    def chosen(self, p, score):
        delta = min(max(1 - score, 0), 1)
        best: list[int] = []
        total = 0.0
        for j in sorted(range(len(p)), key=lambda j: -p[j]):
            if total >= delta and len(best) >= self.top_k:
                break
            best.append(j)
            total += p[j]
        return best

    def wanted(self, routing, l_now):
        """(layer, expert) -> PRI: all layers ahead whose search is done; layers from 1."""
        layers = routing.shares_TLE.shape[1]
        wanted = {}
        for target in range(l_now + 1, layers + 1):
            if not self.entries:
                continue
            if target <= self.d:
                scores = [cosine(routing.embedded_TD[0], e) for e, _ in self.entries]
            elif target - self.d <= l_now:
                seen = routing.shares_TLE[0, : target - self.d]
                scores = [cosine(seen, m[: target - self.d]) for _, m in self.entries]
            else:
                continue
            best = int(np.argmax(scores))
            p = self.entries[best][1][target - 1]
            for j in self.chosen(p, scores[best]):
                wanted[target - 1, j] = p[j] / (target - l_now)
        return wanted

    def keep(self, routing):
        new = (routing.embedded_TD[0], routing.shares_TLE[0])
        if len(self.entries) < self.capacity:
            self.entries.append(new)
            return
        share = min(1.0, self.d / len(new[1]))
        redundancy = [
            share * cosine(new[0], e) + (1 - share) * cosine(new[1], m) for e, m in self.entries
        ]
        self.entries[int(np.argmax(redundancy))] = new


@pytest.mark.parametrize(("distance", "capacity"), [(1, 100), (3, 12), (2, 5), (9, 20)])
def test_candidates_and_their_values_are_those_of_the_plain_form(distance, capacity):
    topics = Topics(LAYERS, EXPERTS, noise=1.0, seed=distance)
    forecast = finemoe(distance=distance, capacity=capacity)
    plain = Plain(capacity, distance, TOP_K)
    compared = 0
    for routing in topics.walk(40):
        told = play(forecast, TABLE, routing, rows(1))
        for l_now, (places, values) in enumerate(told):
            expected = plain.wanted(routing, l_now)
            keys = [(TABLE.keys[i].layer, TABLE.keys[i].index) for i in places]
            assert dict(zip(keys, values, strict=True)) == pytest.approx(expected, rel=1e-4)
            compared += len(expected)
        plain.keep(routing)
    assert compared > 400


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 1 << 30), st.floats(0, 1), st.integers(1, 8))
def test_the_width_is_the_smallest_set_that_reaches_delta(seed, score, top_k):
    """T2: a set that stops one expert short of delta fails."""
    shares_BE = np.random.default_rng(seed).dirichlet([0.3] * EXPERTS, 3).astype(np.float32)
    plain = Plain(1, 1, top_k)
    chosen_BE = choose(shares_BE, np.full(3, score), top_k)
    for own_E, p in zip(chosen_BE, shares_BE.astype(float), strict=True):
        assert own_E.nonzero()[0].tolist() == sorted(plain.chosen(p, score))


def test_delta_widens_only_what_is_not_alike_and_ends_at_all_experts():
    even_BE = np.full((1, 8), 0.125)
    sizes = [int(choose(even_BE, np.array([s]), 2).sum()) for s in (1.0, 0.75, 0.5, 0.2, 0, -1)]
    assert sizes == [2, 2, 4, 7, 8, 8]


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 1 << 30), st.integers(1, LAYERS))
def test_searches_layer_by_layer_find_what_a_whole_one_does(seed, length):
    random = np.random.default_rng(seed)
    kept = store(capacity=30)
    maps = [random.dirichlet([0.5] * EXPERTS, 20).astype(np.float32) for _ in range(LAYERS)]
    meanings = random.normal(size=(20, HIDDEN)).astype(np.float32)
    kept.add(meanings, maps)
    seen = [random.dirichlet([0.5] * EXPERTS, 3).astype(np.float32) for _ in range(LAYERS)]
    search = kept.by_trajectory(3)
    for layer in range(length):
        search.extend(layer, seen[layer])
    expected = [
        [cosine([m[b] for m in seen[:length]], [m[c] for m in maps[:length]]) for c in range(20)]
        for b in range(3)
    ]
    np.testing.assert_allclose(search.scores(), expected, atol=1e-6)
    found = kept.by_meaning(meanings[4:6] * 3)
    assert found.entries_B.tolist() == [4, 5]
    assert found.scores_B == pytest.approx(1, abs=1e-6)


def test_rows_merge_as_independent_uses():
    q = np.array([[0.3, 0.0, 1.0], [0.3, 0.5, 0.0]])
    assert merged(q[:1], [1]) == pytest.approx(q[0], abs=1e-5), "one row: itself"
    assert merged(q, [1, 1])[:2] == pytest.approx([1 - 0.7**2, 0.5])
    assert merged(q, [2, 5])[:2] == pytest.approx([1 - 0.7**7, 1 - 0.5**5])


def test_shares_of_every_kind_of_gate_have_the_sum_one():
    logits = np.array([[1.0, -30.0, 2.0]])
    softmax = np.exp(logits) / np.exp(logits).sum()
    assert shares_of(logits, are_logits=True) == pytest.approx(softmax)
    assert shares_of(softmax, are_logits=False) == pytest.approx(softmax)
    assert shares_of([[0.5, 0.25, 0.25, 1.0]], are_logits=False).tolist() == [
        [0.25, 0.125, 0.125, 0.5]
    ]
    assert shares_of([[0.0, 0.0]], are_logits=False).tolist() == [[0, 0]]
    spec = SPECS["olmoe-1b-7b"]
    assert not are_logits(spec)
    block = spec.blocks[0]
    assert isinstance(block.ffn, Moe)
    for routing, expected in ((TopKSoftmax(), True), (SigmoidTopK(renorm_eps=None), False)):
        other = replace(block, ffn=replace(block.ffn, routing=routing))
        assert are_logits(replace(spec, blocks=(other,) * len(spec.blocks))) == expected


# --- T1 to T22 ------------------------------------------------------------------------------------


@pytest.mark.parametrize("distance", [1, 2, 3, 5, 6, 7])
def test_t1_every_layer_is_predicted(distance):
    table = ExpertTable([0, *[EXPERTS] * 3, 0, *[EXPERTS] * 3], TOP_K)
    forecast, topics = finemoe(table, distance=distance), Topics(6, EXPERTS)
    for routing in topics.walk(2):
        told = play(forecast, table, routing, rows(1))
    predicted = {table.keys[place].layer for places, _ in told for place in places}
    assert predicted == set(table.layers)


def test_t3_the_choice_survives_to_the_queue():
    topics, forecast = Topics(LAYERS, EXPERTS, noise=0.01), finemoe()
    machine = Machine(forecast, FineMoePool(forecast.outlook), slots=16)
    for _ in range(3):
        play(forecast, TABLE, topics.routing([1]), rows(1))
    routing = topics.routing([1])
    forecast.begin(rows(1), routing.embedded_TD)
    machine.prefetcher.enter(0)
    hinted = [key for key in machine.prefetcher._tiers[0].hinted if key.part is Part.EXPERT]
    assert len(hinted) == 3 * TOP_K, "top-k of each of the first d layers, of 24 experts"
    for layer in range(3):
        best = np.argsort(-routing.shares_TLE[0, layer])[:TOP_K].tolist()
        assert {key.index for key in hinted if key.layer == layer} == set(best)


def test_t4_predictions_are_shares_and_can_be_wrong():
    topics, forecast = Topics(LAYERS, EXPERTS, topics=2), finemoe()
    play(forecast, TABLE, topics.routing([0]), rows(1))
    strange = topics.routing([1])
    told = play(forecast, TABLE, strange, rows(1))
    assert len(set(np.round(forecast.outlook.next, 6))) > LAYERS * EXPERTS // 2
    predicted = {int(place) for places, _ in told for place in places}
    needed = {
        layer * EXPERTS + int(j)
        for layer in range(LAYERS)
        for j in np.argsort(-strange.shares_TLE[0, layer])[:TOP_K]
    }
    assert needed - predicted, "another path is not predicted by the only map there is"


def test_t5_the_queue_pops_by_priority():
    topics, forecast = Topics(LAYERS, EXPERTS), finemoe()
    machine = Machine(forecast, FineMoePool(forecast.outlook), slots=16)
    play(forecast, TABLE, topics.routing([0]), rows(1))
    forecast.begin(rows(1), topics.routing([0]).embedded_TD)
    places, values = forecast.candidates(0)
    by_priority = [TABLE.keys[places[i]] for i in np.argsort(-values)]
    assert [key.layer for key in by_priority] != sorted(key.layer for key in by_priority)
    begun: list[WeightKey] = []
    fetch = machine.weights.fetch

    def noted(entry, **how):
        begun.append(entry.key)
        return fetch(entry, **how)

    machine.weights.fetch = noted  # type: ignore[method-assign]
    machine.prefetcher.enter(0)
    while machine.lanes.clock._events:
        machine.lanes.clock.wait()
    assert [key for key in begun if key.part is Part.EXPERT] == by_priority


def pool_of(shares, *, uses, added=None):
    """A pool of one layer's experts with these shares, and so many uses of each."""
    table = ExpertTable([len(shares)], 1)
    forecast = finemoe(table)
    forecast.outlook.now[:] = forecast.outlook.next[:] = shares
    pool = FineMoePool(forecast.outlook)
    for j, count in enumerate(uses):
        for _ in range(count):
            pool.note_use(expert(0, j))
    for j in added or range(len(shares)):
        pool.add(expert(0, j))
    return pool


def order(pool, count):
    """Experts in the order in which they are given up."""
    gone = []
    for _ in range(count):
        key = pool.victim(expert(0, 0), None)
        pool.discard(key)
        gone.append(key.index)
    return gone


def test_t6_keys_between_0_and_1_have_an_order():
    assert order(pool_of([0.02, 0.25, 0.05, 0.1], uses=[3, 1, 4, 1]), 4) == [0, 3, 2, 1]
    shares = np.random.default_rng(1).dirichlet([1] * 20)
    uses = np.random.default_rng(2).integers(1, 9, 20)
    expected = np.argsort(shares * uses).tolist()
    assert order(pool_of(shares, uses=uses), 20) == expected, "1 / (p * freq), largest first"


def test_where_p_times_freq_is_zero_p_decides_then_freq():
    pool = pool_of([0.0, 0.3, 0.0, 0.2, 0.1, 0.0], uses=[2, 0, 1, 0, 1, 0])
    assert order(pool, 6) == [5, 2, 0, 3, 1, 4]


def test_without_a_map_all_experts_of_a_layer_share_alike():
    forecast = finemoe()
    assert forecast.outlook.now == pytest.approx(1 / EXPERTS)
    pool = FineMoePool(forecast.outlook)
    for j, count in enumerate([3, 1, 2]):
        for _ in range(count):
            pool.note_use(expert(0, j))
        pool.add(expert(0, j))
    assert order(pool, 3) == [1, 2, 0]


def test_a_layer_that_has_routed_keeps_the_share_of_its_map():
    """Not the 0 or 1 of its gate: its next turn is that of the next pass."""
    forecast, topics = finemoe(), Topics(LAYERS, EXPERTS)
    for _ in range(2):
        play(forecast, TABLE, topics.routing([0]), rows(1))
    pool = FineMoePool(forecast.outlook)
    for j in range(EXPERTS):
        pool.note_use(expert(0, j))
        pool.add(expert(0, j))
    assert order(pool, EXPERTS) == np.argsort(forecast.outlook.next[:EXPERTS]).tolist()


def test_t7_visits_are_not_forgotten_at_eviction():
    pool = pool_of([0.25] * 4, uses=[5, 2, 3, 1])
    assert order(pool, 1) == [3]
    pool.discard(expert(0, 0))  # evicted, and read again
    pool.add(expert(0, 0))
    assert order(pool, 3) == [1, 2, 0]


def test_hints_enter_unconditionally_as_in_the_paper():
    pool = pool_of([0.9, 0.0], uses=[50, 0], added=[0])
    assert pool.victim(expert(0, 1), 3) == expert(0, 0)


class Held(ExpertMapStore):
    """Its searches wait."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.may_go = threading.Event()

    def by_meaning(self, embeddings_BH):
        assert self.may_go.wait(30)
        return super().by_meaning(embeddings_BH)


@pytest.fixture
def beside():
    """A forecast whose matcher is a thread, and what its store is to be."""
    made = []

    def make(kind=ExpertMapStore):
        forecast = FineMoeForecast(TABLE, HIDDEN)
        forecast._matcher.store = kind(HIDDEN, [EXPERTS] * LAYERS)
        made.append(forecast)
        return forecast

    yield make
    for forecast in made:
        forecast.close()


def until(done):
    end = time.monotonic() + 60
    while not done():
        assert time.monotonic() < end, "nothing came"
        time.sleep(0.001)


def test_t8_the_pass_does_not_wait_for_the_matcher_and_late_results_are_dropped(beside):
    forecast, topics = beside(Held), Topics(LAYERS, EXPERTS)
    forecast._matcher.store.may_go.set()
    play(forecast, TABLE, topics.routing([0]), rows(1))
    until(lambda: forecast.stats.kept == 1)
    forecast._matcher.store.may_go.clear()
    told = play(forecast, TABLE, topics.routing([0]), rows(1))  # would hang, if it waited
    assert not any(places.size for places, _ in told)
    forecast._matcher.store.may_go.set()
    until(lambda: forecast.stats.kept == 2)
    assert not forecast.work(), "the layers have passed"
    assert forecast.stats.found == forecast.stats.late == LAYERS

    routing = topics.routing([0])
    forecast.begin(rows(1), routing.embedded_TD)
    until(forecast.work)  # what waits for weights calls it, and then renews the hints
    assert forecast.candidates(0).places.size


def test_what_a_fast_matcher_finds_is_what_is_found_at_once(beside):
    forecast, expected = beside(), finemoe()
    for routing in Topics(LAYERS, EXPERTS, noise=1).walk(10):
        told = play(expected, TABLE, routing, rows(1))
        forecast.begin(rows(1), routing.embedded_TD)
        done = forecast.stats.found
        for l_now, (places, values) in enumerate(told):
            if forecast.stats.kept:
                done += 3 if not l_now else l_now + 3 <= LAYERS
            until(lambda done=done: forecast.stats.found == done)
            got = forecast.candidates(0)
            assert dict(zip(got.places, got.values, strict=True)) == pytest.approx(
                dict(zip(places, values, strict=True))
            )
            if l_now < LAYERS:
                forecast.observe(routing.tokens(l_now, rows(1), TOP_K))
        kept = forecast.stats.kept
        forecast.end(None)
        until(lambda kept=kept: forecast.stats.kept == kept + 1)


@pytest.mark.parametrize("delay", [1, 2, 4])
def test_a_delay_puts_the_same_results_off(delay):
    """In replay: what comes when its layer has routed is dropped."""
    now, later = finemoe(), finemoe(delay=delay)
    for routing in Topics(LAYERS, EXPERTS).walk(4):
        told = play(now, TABLE, routing, rows(1))
        put_off = play(later, TABLE, routing, rows(1))
    assert not put_off[0].places.size
    for l_now in range(delay, LAYERS):
        before = set(told[l_now - delay].places)
        expected = {place for place in before if place >= l_now * EXPERTS}
        assert set(put_off[l_now].places) == expected
    assert later.stats.late > 0 == now.stats.late


def test_an_error_of_the_matcher_reaches_a_call_soon():
    def fail(number):
        raise ZeroDivisionError

    forecast = FineMoeForecast(TABLE, HIDDEN)
    forecast.begin(rows(1), None)
    forecast._publish(fail)
    begin = time.monotonic()
    with pytest.raises(ZeroDivisionError):
        while time.monotonic() < begin + 60:
            forecast.work()
    with pytest.raises(ZeroDivisionError):
        forecast.begin(rows(1), None)
    forecast.close()


def test_a_matcher_that_falls_behind_loses_contexts_and_no_memory(beside):
    forecast, topics = beside(Held), Topics(LAYERS, EXPERTS)
    forecast._matcher.store.may_go.set()
    play(forecast, TABLE, topics.routing([0]), rows(1))
    until(lambda: forecast.stats.kept == 1)
    forecast._matcher.store.may_go.clear()
    for routing in topics.walk(60):
        play(forecast, TABLE, routing, rows(1))
    assert forecast.stats.dropped > 0
    assert forecast._worker._waiting.qsize() <= 256
    forecast._matcher.store.may_go.set()


def run(machine, routing, batch=None):
    machine.routing = routing
    before = machine.cache.stats()
    run_pass(machine.runtime, machine.shape, batch or rows(1))
    return before, machine.cache.stats()


def test_t9_t11_t18_reads_run_beside_computation_and_experts_without_tokens_cost_nothing():
    forecast = finemoe()
    pool = FineMoePool(forecast.outlook)
    machine = Machine(forecast, pool, slots=16)
    topics = Topics(LAYERS, EXPERTS, topics=3, noise=0.1)
    for routing in topics.walk(40):
        run(machine, routing)
    stats = machine.cache.stats()
    assert stats.evictions > 0 and stats.prefetch_used > 10
    disk = [span for span in machine.lanes.spans if span.lane == "disk"]
    host = [span for span in machine.lanes.spans if span.lane == "host"]
    assert any(a.begin < b.end and b.begin < a.end for a in disk for b in host)
    visits = pool._freq
    assert visits.sum() == 40 * LAYERS * TOP_K, "visits: experts with tokens, once a pass"

    nothing = Candidates(np.zeros(0, np.int64), np.zeros(0))
    forecast.candidates = lambda layer: nothing  # type: ignore[method-assign]
    before, after = run(machine, topics.routing([2]))
    misses = [one.requests[Part.EXPERT] - one.hits[Part.EXPERT] for one in (before, after)]
    assert 0 < (after.bytes_read - before.bytes_read) / 400 == misses[1] - misses[0], (
        "no read but of what was demanded"
    )


@pytest.mark.parametrize("events", range(6))
def test_t10_a_miss_waits_for_one_block_at_most(events):
    forecast, topics = finemoe(), Topics(LAYERS, EXPERTS, noise=0.01)
    machine = Machine(forecast, FineMoePool(forecast.outlook), slots=16, link_s=1.0)
    for block in range(LAYERS):
        with machine.weights.lease(WeightKey(Part.BLOCK, block)):
            pass
    with machine.weights.lease(WeightKey(Part.HEAD, -1, 0)):
        pass
    play(forecast, TABLE, topics.routing([0]), rows(1))
    forecast.begin(rows(1), topics.routing([0]).embedded_TD)
    machine.prefetcher.enter(0)
    for _ in range(events):
        machine.lanes.clock.wait()
    assert machine.cache._resident.loading()
    missed = expert(LAYERS - 1, 0)  # not of a layer whose reads its demand would give up
    begin = machine.lanes.clock.now
    assert list(machine.weights.arrivals([missed]))
    assert machine.lanes.clock.now - begin <= 4 + 1, "seconds: its own blocks, and one"


def test_t12_predictions_of_one_sequence_do_not_displace_another_s():
    topics = Topics(LAYERS, EXPERTS, topics=2, noise=0.01)
    forecast = finemoe()
    for topic in (0, 1):
        play(forecast, TABLE, topics.routing([topic]), rows(1))
    one, other = (
        play(finemoe_with(forecast), TABLE, topics.routing([topic]), rows(1)) for topic in (0, 1)
    )
    both = play(finemoe_with(forecast), TABLE, topics.routing([0, 1]), rows(2))
    for l_now in range(LAYERS):
        assert set(both[l_now].places) == set(one[l_now].places) | set(other[l_now].places)
    found = topics.logits_ZLE[:, 0]
    shares = np.exp(found) / np.exp(found).sum(-1, keepdims=True)
    value = dict(zip(both[0].places, both[0].values, strict=True))
    for place in (place for place in value if place < EXPERTS):
        expected = 1 - (1 - shares[0, place]) * (1 - shares[1, place])
        assert value[place] == pytest.approx(expected, abs=0.05)


def finemoe_with(other, **changed):
    """A forecast that knows what another one does."""
    forecast, known = finemoe(**changed), other._matcher.store
    forecast._matcher.store.add(
        known._unit_CH[: known.num_maps], [m[: known.num_maps] for m in known._maps_CE]
    )
    return forecast


def test_t13_t14_a_pass_sees_no_other_s_trajectory_and_leaves_none():
    topics, first = Topics(LAYERS, EXPERTS), finemoe(capacity=4)
    for routing in topics.walk(30):
        play(first, TABLE, routing, rows(1))
    strange = topics.routing([3])
    fresh = finemoe_with(first, capacity=4)
    forecast = finemoe_with(first, capacity=4)
    begun = topics.routing([5])
    forecast.begin(rows(1), begun.embedded_TD)  # a pass of another sequence, not to its end
    for layer in range(LAYERS - 1):
        forecast.observe(begun.tokens(layer, rows(1), TOP_K))
    got, expected = (play(f, TABLE, strange, rows(1)) for f in (forecast, fresh))
    for one, other in zip(got, expected, strict=True):
        assert one.places.tolist() == other.places.tolist()
        assert one.values == pytest.approx(other.values)
    assert len(forecast._map_BE) == LAYERS and len(forecast._matches) == 0
    assert forecast._matcher._search is None, "a trajectory ends with its pass"
    assert forecast._matcher.store.num_maps == 4


def test_t15_new_rows_of_a_pass_do_not_share_a_victim():
    kept = store(capacity=4)
    random = np.random.default_rng(0)
    one = [random.dirichlet([1] * EXPERTS, 4).astype(np.float32) for _ in range(LAYERS)]
    kept.add(random.normal(size=(4, HIDDEN)).astype(np.float32), one)
    same = np.repeat(kept._unit_CH[2:3], 3, 0), [np.repeat(m[2:3], 3, 0) for m in one]
    written = kept.add(*same)
    assert written[0] == 2 and len(set(written)) == 3
    assert kept.num_maps == 4
    assert (
        len(
            kept.add(np.ones((9, HIDDEN), np.float32), [np.ones((9, EXPERTS), np.float32)] * LAYERS)
        )
        == 4
    )


def test_t16_a_prompt_chunk_is_one_map_the_mean_of_its_tokens():
    topics, forecast = Topics(LAYERS, EXPERTS), finemoe()
    routing = topics.routing([0, 1, 2, 3, 4, 1])
    play(forecast, TABLE, routing, chunks([5, 1]))
    kept = forecast._matcher.store
    assert kept.num_maps == 2
    for layer in range(LAYERS):
        means = routing.shares_TLE[:5, layer].mean(0), routing.shares_TLE[5, layer]
        assert kept._maps_CE[layer][:2] == pytest.approx(np.stack(means))
    meaning = routing.embedded_TD[:5].mean(0)
    assert kept._unit_CH[0] == pytest.approx(meaning / np.linalg.norm(meaning), abs=1e-6)
    told = play(forecast, TABLE, routing, chunks([5, 1]))
    assert told[0].values.max() > forecast.outlook.next[told[0].places].min()
    p = np.float64(means[0]), np.float64(means[1])
    last = forecast.outlook.next[TABLE.slice(LAYERS - 1)]
    assert last == pytest.approx(1 - (1 - p[0]) ** 5 * (1 - p[1]), abs=1e-5)


def test_t17_a_pass_is_not_in_the_store_that_it_is_looked_up_in():
    topics, forecast = Topics(LAYERS, EXPERTS), finemoe()
    told = play(forecast, TABLE, topics.routing([0]), rows(1))
    assert not any(places.size for places, _ in told), "nothing is known before the first pass"
    counts = []
    for routing in topics.walk(3):
        forecast.begin(rows(1), routing.embedded_TD)
        for layer in range(LAYERS):
            counts.append(forecast._matcher.store.num_maps)
            forecast.observe(routing.tokens(layer, rows(1), TOP_K))
        forecast.end(None)
    assert counts == [n for n in (1, 2, 3) for _ in range(LAYERS)]


def test_t19_one_search_serves_one_layer():
    topics, forecast = Topics(LAYERS, EXPERTS), finemoe(semantic=False, distance=2)
    for _ in range(2):
        told = play(forecast, TABLE, topics.routing([0]), rows(1))
    layers = [sorted({int(p) // EXPERTS for p in places}) for places, _ in told]
    new = [set(after) - set(before) for before, after in zip(layers, layers[1:], strict=False)]
    assert new == [{2}, {3}, {4}, {5}, set(), set()]
    assert forecast.stats.found == LAYERS - 2


def test_t20_a_saved_store_comes_back_with_its_empty_rows_empty(tmp_path):
    path = tmp_path / "maps"
    settings = replace(AT_ONCE, capacity=50)
    forecast = FineMoeForecast(TABLE, HIDDEN, settings, file=MapFile(path, "model-1"))
    topics = Topics(LAYERS, EXPERTS)
    for routing in topics.walk(7):
        play(forecast, TABLE, routing, rows(1))
    assert not path.exists()
    forecast.close()
    assert sorted(tmp_path.iterdir()) == [path], "written whole, nothing beside it"
    again = FineMoeForecast(TABLE, HIDDEN, settings, file=MapFile(path, "model-1"))
    known = again._matcher.store
    assert known.num_maps == 7
    for a, b in zip(known._maps_CE, forecast._matcher.store._maps_CE, strict=True):
        assert a.tobytes() == b.tobytes()
    routing = topics.routing([2])
    got, expected = (play(f, TABLE, routing, rows(1)) for f in (again, forecast))
    assert [list(c.places) for c in got] == [list(c.places) for c in expected]
    smaller = FineMoeForecast(
        TABLE, HIDDEN, replace(settings, capacity=3), file=MapFile(path, "model-1")
    )
    assert smaller._matcher.store.num_maps == 3, "bounded"


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda data: b"", "format: got None"),
        (lambda data: b"\x80\x04PK something else\n" + data, "format: got None"),
        (lambda data: b"[1]\n", "format: got None"),
        (lambda data: data.replace(b"model-1", b"model-2"), "model: got model-2, allowed model-1"),
        (lambda data: data.replace(b'"version": 1', b'"version": 9'), "version: got 9, allowed 1"),
        (lambda data: data[:-1], "the file is damaged"),
        (lambda data: data.replace(b'"entries": 2', b'"entries": 9'), "the file is damaged"),
    ],
)
def test_a_foreign_or_damaged_file_is_one_clear_error(tmp_path, spoil, said):
    path = tmp_path / "maps"
    kept = store()
    kept.add(np.ones((2, HIDDEN), np.float32), [np.ones((2, EXPERTS), np.float32)] * LAYERS)
    kept.save(path, stamp="model-1")
    path.write_bytes(spoil(path.read_bytes()))
    with pytest.raises(UsageError) as caught:
        FineMoeForecast(TABLE, HIDDEN, AT_ONCE, file=MapFile(path, "model-1"))
    assert said in str(caught.value) and str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_t21_closing_ends_the_thread_and_may_be_repeated(tmp_path):
    before = threading.active_count()
    forecast = FineMoeForecast(TABLE, HIDDEN, file=MapFile(tmp_path / "maps", "m"))
    play(forecast, TABLE, Topics(LAYERS, EXPERTS).routing([0]), rows(1))
    assert threading.active_count() == before + 1
    forecast._publish(lambda number: time.sleep(0.05))
    forecast.close()
    forecast.close()
    assert threading.active_count() == before
    assert forecast.stats.kept == 1, "what waited was done"
    with pytest.raises(UsageError, match="cannot be written"):
        FineMoeForecast(TABLE, HIDDEN, AT_ONCE, file=MapFile(tmp_path / "no" / "maps", "m")).close()


def test_t22_it_can_be_measured():
    """And it predicts: a pass of a known path is read ahead of its gates."""
    forecast, topics = finemoe(), Topics(LAYERS, EXPERTS, noise=0.1)
    for topic in range(6):
        play(forecast, TABLE, topics.routing([topic]), rows(1))
    assert forecast.stats.found == 5 * LAYERS and forecast.stats.kept == 6
    routing = topics.routing([4])
    told = play(forecast, TABLE, routing, rows(1))
    hits = 0
    for layer in range(LAYERS):
        best = np.argsort(-routing.shares_TLE[0, layer])[:TOP_K] + layer * EXPERTS
        hits += len(set(best) & set(told[layer].places))
    assert hits >= 0.9 * LAYERS * TOP_K


# --- further traps --------------------------------------------------------------------------------


def test_a_clock_that_only_counts_is_no_error_and_predicts_nothing():
    for forecast in (finemoe(), MoeInfinityForecast(TABLE)):
        routing = Topics(LAYERS, EXPERTS).routing([0])
        for _ in range(3):
            forecast.begin(rows(1), None)
            for layer in range(LAYERS):
                told = routing.tokens(layer, rows(1), TOP_K)
                forecast.observe(told._replace(ids_TA=None, scores_TE=None))
                assert not forecast.candidates(layer).places.size
            forecast.end(None)


def test_layers_without_a_word_are_left_out_and_their_pass_is_not_kept():
    """Layers that are all in memory may be computed by captured calls."""
    topics, forecast = Topics(LAYERS, EXPERTS, noise=0.01), finemoe()
    play(forecast, TABLE, topics.routing([0]), rows(1))
    play(forecast, TABLE, topics.routing([1]), rows(1))
    routing = topics.routing([1])
    forecast.begin(rows(1), routing.embedded_TD)
    for layer in (1, 2, 4):
        forecast.observe(routing.tokens(layer, rows(1), TOP_K))
        places, values = forecast.candidates(layer + 1)
        assert (places >= (layer + 1) * EXPERTS).all() and (values > 0).all()
        if layer == 2:
            best = np.argsort(-routing.shares_TLE[0, 5])[:TOP_K] + 5 * EXPERTS
            assert set(best) <= set(places)
    forecast.end(None)
    assert forecast._matcher.store.num_maps == 2


def test_ablations():
    topics = Topics(LAYERS, EXPERTS, topics=3, noise=1.5)
    known = finemoe(widens=False)
    for routing in topics.walk(12):
        play(known, TABLE, routing, rows(1))
    routing = topics.routing([2])
    routing.embedded_TD[:] = 0.0  # like none: delta is 1
    whole, narrow, blind = (
        play(finemoe_with(known, **kind), TABLE, routing, rows(1))
        for kind in (dict(), dict(widens=False), dict(semantic=False, widens=False))
    )
    assert not blind[0].places.size and not blind[0].values.size
    assert {p for c in blind for p in c.places if p < 3 * EXPERTS} == set()
    for l_now in range(LAYERS):
        assert set(narrow[l_now].places) <= set(whole[l_now].places)
        assert len(narrow[l_now].places) % TOP_K == 0
    assert sum(len(c.places) for c in whole) > sum(len(c.places) for c in narrow)

    counting = finemoe(tracks="counts")
    for _ in range(2):
        told = play(counting, TABLE, routing, rows(1))
    assert set(np.unique(counting._matcher.store._maps_CE[0][0])) == {0, 0.5}, "winners alone"
    best = np.argsort(-routing.shares_TLE[0, LAYERS - 1])[:TOP_K] + (LAYERS - 1) * EXPERTS
    assert set(told[LAYERS - 1].places) == set(best)


def test_nonsense_settings_are_refused():
    for wrong in (dict(distance=0), dict(capacity=0), dict(delay=-1)):
        with pytest.raises(UsageError, match=f"got {next(iter(wrong.values()))}, allowed at least"):
            finemoe(**wrong)


@pytest.mark.parametrize("pool", [FineMoePool, MoeInfinityPool])
def test_nothing_is_given_up_where_nothing_may_be(pool):
    own = pool(finemoe().outlook)
    assert own.victim(expert(0, 0), None) is None
    assert own.victim(expert(0, 0), 2) is None
