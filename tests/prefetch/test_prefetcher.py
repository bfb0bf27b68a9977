"""The prefetcher over a cache without bytes: what it hints at, in which order, what it costs."""

import random
import sys
from collections.abc import Callable, Iterator
from functools import partial

import numpy as np
import pytest

from routing import rows, told
from windlass.checkpoint.part_reads import Read
from windlass.forecast.interface import ExpertTable
from windlass.forecast.usage import UsageForecast
from windlass.ids import DISK_TO_HOST, Part, Route, WeightKey
from windlass.prefetch.expert_pool import ExpectedNextUse
from windlass.prefetch.prefetcher import Prefetcher
from windlass.runtime.clock import Clock, Lanes
from windlass.runtime.simulated import SimulatedParts, SimulatedWeights
from windlass.schedule.passes import LayerShape, PassShape
from windlass.weights.hints import Hint, HintQueue

LINK_S = 1.0  # of a part


class Costs:
    """One lane, as long for every part."""

    def block(self, key: WeightKey, num_bytes: int) -> list[tuple[Route, float]]:
        return [(DISK_TO_HOST, LINK_S)]


class Model:
    """Layers of experts whose blocks and head fit; experts have `slots`."""

    def __init__(self, layers: int, experts: int, slots: int, *, top_k: int = 2) -> None:
        self.layers, self.experts = layers, experts
        self.forecast = UsageForecast(ExpertTable([experts] * layers, top_k))
        self.lanes = Lanes(Clock(), ("disk",))
        self.weights = SimulatedWeights(
            self.lanes,
            Costs(),  # type: ignore[arg-type]  # nothing else is asked of it
            SimulatedParts(
                {Part.EXPERT: layers * experts, Part.BLOCK: layers, Part.HEAD: 1},
                {Part.EXPERT: slots, Part.BLOCK: layers, Part.HEAD: 1},
                lambda key: (Read("", 0, 100, 0),),
            ),
            policy=ExpectedNextUse(self.forecast.outlook),
            depth=2,
        )
        self.cache = self.weights.cache
        shape = PassShape((LayerShape(True, "experts"),) * layers, 1)
        self.prefetcher = Prefetcher(shape, self.cache, self.forecast)

    def observe(self, layer: int, counts: dict[int, int]) -> None:
        self.forecast.observe(told(layer, counts, self.experts))

    def layer(self, layer: int, experts: list[int]) -> None:
        """The rest of a layer, after the prefetcher has been told of it."""
        with self.weights.lease(WeightKey(Part.BLOCK, layer)):
            self.observe(layer, dict.fromkeys(experts, 1))
        for _ in self.weights.arrivals([expert(layer, i) for i in experts]):
            pass
        self.cache.check()

    def head(self) -> None:
        self.prefetcher.enter(self.layers)
        with self.weights.lease(WeightKey(Part.HEAD, -1, 0)):
            pass

    def settle(self) -> None:
        """All that is under way arrives."""
        while self.lanes.clock._events:
            self.lanes.clock.wait()


def expert(layer: int, index: int) -> WeightKey:
    return WeightKey(Part.EXPERT, layer, index)


@pytest.fixture
def hinted(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[int, list[Hint], list]]]:
    """What the cache is told, call by call."""
    calls: list[tuple[int, list[Hint], list]] = []

    def hint(cache, now, added, dropped):
        calls.append((now, list(added), list(dropped)))

    monkeypatch.setattr("windlass.weights.cache.WeightCache.hint", hint)
    yield calls


def test_with_many_tokens_the_hints_are_the_layers_in_order_and_only_what_is_new(hinted):
    model = Model(5, 40, slots=100)
    model.forecast.begin(rows(10_000))
    model.prefetcher.enter(0)
    now, added, dropped = hinted.pop()
    assert now == 0 and not dropped
    layers = [hint.key.layer for hint in added]
    assert layers == sorted(layers) == [0] * 41 + [1] * 41, "to the end of the layer of the 64th"
    assert all(hint.is_certain for hint in added)
    model.prefetcher.enter(1)
    now, added, dropped = hinted.pop()
    assert now == 1 and {hint.key.layer for hint in added} == {2}, "layer 1 is hinted at already"
    assert {key.layer for key in dropped} == {0}
    for layer in (2, 3, 4, 5):
        model.prefetcher.enter(layer)
    now, added, _ = hinted.pop()
    assert now == 5 and {hint.turn for hint in added} == {7}, "around the pass: the head is 5"


def test_the_tier_below_is_hinted_at_further_ahead_and_at_nothing_that_is_above(hinted):
    model, lower = Model(12, 40, slots=480), Model(12, 40, slots=480)
    shape = PassShape((LayerShape(True, "experts"),) * 12, 1)
    below = lower.cache
    prefetcher = Prefetcher(shape, model.cache, model.forecast, below=below)
    model.forecast.begin(rows(10_000))
    for index in (0, 3):
        model.layer(0, [index])
    above = [expert(0, index) for index in (0, 3)]
    assert all(map(model.cache.holds, above)) and not any(map(below.holds, above))
    model.forecast.begin(rows(10_000))
    prefetcher.enter(0)
    (_, first, _), (now, further, dropped) = hinted
    assert now == 0 and not dropped
    assert {hint.key.layer for hint in first} == {0, 1}
    assert {hint.key.layer for hint in further} == set(range(7)), "to the layer of the 256th"
    assert not {hint.key for hint in further} & {*above, WeightKey(Part.BLOCK, 0)}
    assert [hint for hint in further if hint.key.layer < 2] == first, "the same hints"


def test_with_one_token_only_likely_experts_are_hinted_at(hinted):
    model = Model(3, 8, slots=10)
    for _ in range(200):
        model.observe(1, {2: 1, 5: 1})
    model.prefetcher.enter(0)
    _, added, _ = hinted.pop()
    assert [hint.key for hint in added if hint.key.part is Part.EXPERT] == [
        expert(1, 2), expert(1, 5)
    ]  # fmt: skip
    assert not any(hint.is_certain for hint in added if hint.key.part is Part.EXPERT)


def test_hints_are_read_in_time_and_used():
    model = Model(4, 8, slots=12)
    for _ in range(300):
        for layer in range(4):
            model.observe(layer, {layer: 1, layer + 1: 1})
    for _ in range(6):
        for layer in range(4):
            model.prefetcher.enter(layer)
            model.settle()
            model.layer(layer, [layer, layer + 1])
        model.head()
    stats = model.cache.stats()
    assert stats.prefetch_issued > 0 and stats.prefetch_used == stats.prefetch_issued
    assert stats.prefetch_used_bytes == 100 * stats.prefetch_used
    assert stats.prefetch_late == stats.prefetch_cancelled == 0
    assert stats.hits[Part.EXPERT] == stats.requests[Part.EXPERT] == 48


def test_a_hint_that_comes_too_late_is_counted_and_a_wrong_one_given_up():
    model = Model(3, 8, slots=12)
    for _ in range(300):
        model.observe(1, {0: 1, 1: 1})
    model.prefetcher.enter(0)
    model.layer(0, [7])
    model.prefetcher.enter(1)
    model.layer(1, [0])  # demanded while it is read
    model.prefetcher.enter(2)
    model.settle()
    stats = model.cache.stats()
    assert stats.prefetch_late + stats.prefetch_used >= 1
    assert stats.prefetch_late_bytes == 100 * stats.prefetch_late
    assert stats.prefetch_issued >= stats.prefetch_used + stats.prefetch_cancelled


def test_a_model_that_is_all_there_costs_nothing_more(hinted, monkeypatch):
    model = Model(2, 3, slots=6)
    model.forecast.begin(rows(1000))
    experts = [expert(i, j) for i in range(2) for j in range(3)]
    blocks = [WeightKey(Part.BLOCK, i) for i in range(2)]
    for key in (*experts, *blocks, WeightKey(Part.HEAD, -1, 0)):
        with model.weights.lease(key):
            pass
    model.prefetcher.enter(0)
    hinted.clear()
    model.prefetcher.enter(1)
    assert not hinted


def num_calls(body: Callable[[], object]) -> int:
    """Calls that `body` makes, of Python and of C."""
    count = 0

    def profile(frame, event, argument):
        nonlocal count
        count += event in ("call", "c_call")

    sys.setprofile(profile)
    try:
        body()
    finally:
        sys.setprofile(None)
    return count


def test_a_layer_costs_a_few_calls_whatever_the_number_of_experts():
    """At 48 layers of 128 experts and one token, in the steady state of a third of the experts:
    the calls stand for the time, which `bench/prefetcher.py` measures."""
    model = Model(48, 128, slots=2048, top_k=8)
    chance = random.Random(0)
    counts = []
    for number in range(4):
        for layer in range(48):
            enter = num_calls(partial(model.prefetcher.enter, layer))
            counts.append(enter if number else 0)
            model.weights.cache.begin([])
            chosen = sorted(set(np.minimum(127, np.array(chance.choices(range(128), k=8)) // 2)))
            model.observe(layer, dict.fromkeys(map(int, chosen), 1))
            for _ in model.weights.arrivals([expert(layer, int(i)) for i in chosen]):
                pass
        model.prefetcher.enter(48)
    steady = sorted(counts[48:])
    assert steady[len(steady) // 2] <= 40 and steady[-1] <= 400, (steady[:3], steady[-3:])


def test_hints_come_in_order_and_a_stuck_kind_does_not_hold_up_others():
    block = WeightKey(Part.BLOCK, 2)
    hints = [Hint(1, expert(1, 0), 1), Hint(2, block, 2), Hint(3, expert(2, 1), 2)]
    queue = HintQueue()
    for hint in reversed(hints):
        queue.add(hint)
    assert queue.first(()) == hints[0]
    assert queue.first({Part.EXPERT}) == hints[1]
    queue.drop(expert(1, 0))
    assert queue.first(()) == hints[1]
    queue.drop(block)
    assert queue.first(()) == hints[2]
    assert queue.first({Part.EXPERT}) is None
    queue.add(Hint(0, expert(2, 1), 0))
    assert queue.first(()) == Hint(0, expert(2, 1), 0) and len(queue) == 1, "the last one holds"
    queue.drop(expert(2, 1))
    assert queue.first(()) is None and not len(queue)


def test_what_its_layer_does_not_need_is_hinted_at_no_more():
    queue = HintQueue()
    queue.add(Hint(0, expert(1, 0), 5))
    queue.add(Hint(1, expert(1, 1), 5))
    queue.add(Hint(2, expert(2, 0), 6))
    queue.add(Hint(3, expert(1, 2), 9))  # of the next pass
    queue.settle(1, {expert(1, 1)}, 5)
    left = []
    while (hint := queue.first(())) is not None:
        left.append(hint.key)
        queue.drop(hint.key)
    assert left == [expert(1, 1), expert(2, 0), expert(1, 2)]


def test_hints_that_change_their_rank_for_ever_take_no_more_memory():
    queue = HintQueue()
    queue.add(Hint(0, expert(0, 0), 1))
    for number in range(10_000):  # the foremost stays, so that nothing behind it comes up
        queue.add(Hint(1 + number, expert(1, number % 8), 1, is_certain=False))
    assert len(queue) == 9 and len(queue._heaps[Part.EXPERT]) < 200
    assert queue.first(()) == Hint(0, expert(0, 0), 1)
