"""Eviction policies, replayed over lists of names."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lru import LeastRecentlyUsed
from windlass.ids import Part, WeightKey
from windlass.prefetch.policies import FarthestNextUse
from windlass.prefetch.tiers import LowerPolicy, UpperPolicy, takers
from windlass.schedule.expert_homes import host_experts
from windlass.weights.eviction import EvictionPolicy


def expert(layer: int, index: int) -> WeightKey:
    return WeightKey(Part.EXPERT, layer, index)


def cycle(num_layers: int, num_experts: int) -> list[WeightKey]:
    return [expert(i, j) for i in range(num_layers) for j in range(num_experts)]


def replay(policy: EvictionPolicy, trace: list[WeightKey], num_slots: int) -> int:
    """Misses of a cache of `num_slots` that sees `trace`."""
    resident: set[WeightKey] = set()
    misses = 0
    for key in trace:
        if key not in resident:
            misses += 1
            if len(resident) == num_slots:
                victim = policy.victim(expert(0, 0), None)
                assert victim in resident
                policy.discard(victim)
                resident.remove(victim)
            resident.add(key)
        policy.discard(key)
        policy.note_use(key)
        policy.add(key)
    return misses


@pytest.mark.parametrize(("layers", "experts", "slots"), [(6, 8, 20), (4, 1, 3), (10, 16, 155)])
def test_a_cyclic_pass_misses_what_does_not_fit_where_lru_misses_all(layers, experts, slots):
    once = cycle(layers, experts)
    cold = replay(FarthestNextUse(layers), once, slots)
    assert cold == len(once)
    for passes in (3, 6):
        misses = replay(FarthestNextUse(layers), once * passes, slots) - cold
        least = len(once) - slots  # Belady: all but one slot keep their part over a cycle
        assert (passes - 1) * least <= misses <= (passes - 1) * (least + 1)
        assert replay(LeastRecentlyUsed(), once * passes, slots) == len(once) * passes


def test_improbable_experts_go_first_and_probability_is_asked_again_each_pass():
    chance = {expert(i, j): 0.9 for i in range(3) for j in range(4)}
    policy = FarthestNextUse(3, probability=chance.__getitem__)
    for key in cycle(3, 4):
        policy.note_use(key)
        policy.add(key)
    chance[expert(1, 2)] = 0.01
    assert policy.victim(expert(0, 0), None) != expert(1, 2), "not asked yet"
    policy.note_use(expert(0, 0))
    policy.note_use(expert(1, 0))
    policy.note_use(expert(2, 0))  # the turn of layer 1 has passed
    assert policy.victim(expert(0, 0), None) == expert(1, 2)


def test_a_key_that_comes_back_counts_with_its_new_probability():
    chance = {expert(1, 0): 0.01, expert(1, 1): 0.5}
    policy = FarthestNextUse(3, probability=chance.__getitem__)
    for key in chance:
        policy.add(key)
    assert policy.victim(expert(0, 0), None) == expert(1, 0)
    policy.discard(expert(1, 0))
    chance[expert(1, 0)] = 0.9
    policy.add(expert(1, 0))
    assert policy.victim(expert(0, 0), None) == expert(1, 1)


def test_what_was_fetched_for_this_layer_is_kept_until_its_turn_is_over():
    policy = FarthestNextUse(4)
    policy.note_use(WeightKey(Part.BLOCK, 1))
    for index in (0, 1):
        policy.add(expert(1, index))  # fetched in advance, not used yet
    policy.add(expert(2, 0))
    assert policy.victim(expert(0, 0), None) == expert(2, 0)
    policy.note_use(expert(1, 0))
    assert policy.victim(expert(0, 0), None) == expert(1, 0), "used: a whole pass away"
    policy.note_use(WeightKey(Part.BLOCK, 2))
    policy.discard(expert(1, 0))
    assert policy.victim(expert(0, 0), None) == expert(1, 1), "its turn passed without a use"


def test_a_hint_never_takes_the_place_of_something_needed_sooner_or_as_soon():
    policy = FarthestNextUse(8)
    for layer in range(4):
        policy.note_use(expert(layer, 0))
        policy.add(expert(layer, 0))
    # Now at layer 3: its expert is 8 layers away, layer 2's 7, layer 0's 5.
    policy.discard(expert(3, 0))
    assert policy.victim(expert(0, 0), 2) == expert(2, 0)
    assert policy.victim(expert(0, 0), 8) is None
    assert policy.victim(expert(0, 0), 7) is None
    assert policy.victim(expert(0, 0), None) == expert(2, 0)
    assert policy.victim(WeightKey(Part.HEAD, -1, 0), None) is None


def test_lru_keeps_what_is_in_use_out_of_its_choice():
    policy = LeastRecentlyUsed()
    for index in range(3):
        policy.add(expert(0, index))
    policy.note_use(expert(0, 0))
    policy.discard(expert(0, 1))
    assert expert(0, 1) not in policy and expert(0, 2) in policy
    assert policy.victim(expert(0, 0), None) == expert(0, 2)


@given(
    operations=st.lists(
        st.tuples(st.sampled_from(["use", "add", "discard"]), st.integers(0, 4), st.integers(0, 3)),
        max_size=80,
    )
)
def test_the_buckets_agree_with_a_plain_scan(operations):
    """The victim is the farthest of all evictable keys, counted by hand."""
    policy = FarthestNextUse(5)
    now = 0
    turn: dict[WeightKey, int] = {}
    evictable: set[WeightKey] = set()
    for name, layer, index in operations:
        key = expert(layer, index)
        if name == "use":
            now += (layer - now) % 5
            turn[key] = now + 5
            policy.note_use(key)
        elif name == "add":
            evictable.add(key)
            policy.add(key)
        else:
            evictable.discard(key)
            policy.discard(key)
        distances = {
            k: (turn[k] if turn.get(k, -1) >= now else now + (k.layer - now) % 5) - now
            for k in evictable
        }
        victim = policy.victim(expert(0, 0), None)
        assert (victim is None) == (not evictable)
        if victim is not None:
            assert distances[victim] == max(distances.values())
        assert all((expert(i, j) in policy) == (expert(i, j) in evictable)
                   for i in range(5) for j in range(4))  # fmt: skip


def test_of_six_thousand_slots_few_are_asked_for_a_victim():
    layers, experts = 60, 128
    rng = random.Random(1)
    trace = [
        expert(i, j) for _ in range(3) for i in range(layers) for j in rng.sample(range(128), 40)
    ]
    asked = [0]

    def probability(key: WeightKey) -> float:
        asked[0] += 1
        return 0.1 + key.index / 200

    policy = FarthestNextUse(layers, probability=probability)
    for key in cycle(layers, experts)[:6000]:
        policy.add(key)
    asked[0] = 0
    for key in trace:
        victim = policy.victim(expert(0, 0), None)
        assert victim is not None
        policy.discard(victim)
        policy.note_use(key)
        policy.add(key)
    assert asked[0] <= 3 * len(trace) + 3 * 6000  # of a key that enters, and of all once a pass


def test_uses_above_and_below_are_what_the_tier_below_goes_by():
    keys = [WeightKey(Part.BLOCK, layer) for layer in range(4)]
    lower = LowerPolicy(FarthestNextUse(4), takers((), (), 0))
    upper = UpperPolicy(FarthestNextUse(4), lower)
    for key in (keys[2], keys[0], keys[3]):  # in whatever order they are copied up
        lower.came_above(key)
        lower.add(key)
    upper.note_use(keys[0])
    assert lower.victim(keys[1], None) == keys[0], "just used above: comes last"
    lower.note_use(keys[2])
    assert lower.victim(keys[1], None) == keys[2]
    assert keys[0] in lower and keys[1] not in lower


@pytest.mark.parametrize("num_takers", [1, 2])
def test_below_what_stays_above_for_good_goes_first(num_takers):
    """When all who will ever take it have it."""
    blocks = [WeightKey(Part.BLOCK, layer) for layer in range(3)]
    experts = [WeightKey(Part.EXPERT, layer, 0) for layer in range(3)]
    policy = LowerPolicy(FarthestNextUse(3), lambda key: num_takers * (key.part is Part.BLOCK))
    for key in (*blocks, *experts):
        policy.add(key)
    assert policy.victim(WeightKey(Part.BLOCK, 5), 0) != blocks[1]
    for taken in range(num_takers):
        assert not taken or policy.victim(WeightKey(Part.BLOCK, 5), 0) != blocks[1]
        for key in (blocks[1], experts[1]):
            policy.discard(key)
            policy.came_above(key)
            policy.add(key)
    assert policy.victim(WeightKey(Part.BLOCK, 5), 0) == blocks[1], "even for a hint"
    assert policy.victim(WeightKey(Part.EXPERT, 0, 9), None) == experts[2]
    assert blocks[1] in policy
    policy.discard(blocks[1])
    assert blocks[1] not in policy and policy.victim(blocks[1], None) == blocks[2]


def test_what_the_host_computes_is_not_needless_below_when_it_stays_above():
    share = takers({Part.EXPERT, Part.BLOCK}, [4, 4], 0.5)
    at_host = [key for key in cycle(2, 4) if host_experts(key.layer, 4, 0.5)[key.index]]
    assert len(at_host) == 4 and [key for key in cycle(2, 4) if not share(key)] == at_host
    assert share(WeightKey(Part.BLOCK, 0)) == 1 and not share(WeightKey(Part.HEAD, -1, 0))
