"""Experts of a layer that drafts beside those that a policy ranks."""

from windlass.forecast.interface import ExpertTable
from windlass.forecast.usage import UsageForecast
from windlass.ids import Part, WeightKey
from windlass.prefetch.draft_experts import DraftExperts
from windlass.prefetch.registry import POLICIES, choose_policy

LAYERS, DRAFT = 3, 3


def _expert(layer: int, index: int) -> WeightKey:
    return WeightKey(Part.EXPERT, layer, index)


def _policy(name: str = "lru-pool", *, slots: int = 8, share: int = 2) -> DraftExperts:
    outlook = UsageForecast(ExpertTable([8] * LAYERS, 2)).outlook
    return DraftExperts(choose_policy(name, outlook, slots).policy, DRAFT, slots=slots, share=share)


def _use(policy: DraftExperts, *keys: WeightKey) -> None:
    for key in keys:
        policy.discard(key)
        policy.note_use(key)
        policy.add(key)


def test_the_layer_keeps_its_share_and_gives_up_what_it_used_longest_ago():
    policy = _policy()
    _use(policy, _expert(0, 0), _expert(DRAFT, 5), _expert(DRAFT, 1))
    assert policy.victim(_expert(1, 0), None) == _expert(0, 0)
    assert policy.victim(_expert(DRAFT, 7), None) == _expert(DRAFT, 5)
    policy.note_use(_expert(DRAFT, 5))
    assert policy.victim(_expert(DRAFT, 7), None) == _expert(DRAFT, 1)
    _use(policy, _expert(DRAFT, 7))  # it has come to more than its share
    assert policy.victim(_expert(1, 0), 2) == _expert(DRAFT, 1)
    policy.discard(_expert(DRAFT, 1))
    assert _expert(DRAFT, 1) not in policy and _expert(DRAFT, 7) in policy
    assert policy.victim(_expert(1, 0), None) == _expert(0, 0) and _expert(0, 0) in policy


def test_less_than_its_share_takes_from_the_others():
    policy = _policy()
    _use(policy, _expert(0, 0), _expert(DRAFT, 5))
    assert policy.victim(_expert(DRAFT, 7), None) == _expert(0, 0)
    policy.discard(_expert(0, 0))
    assert policy.victim(_expert(1, 0), None) == _expert(DRAFT, 5)  # all that may go
    assert policy.victim(_expert(1, 0), 1) is None  # not for a hint


def test_a_layer_that_rests_gives_its_experts_up():
    policy = _policy(slots=8)
    _use(policy, _expert(DRAFT, 5))
    given_up = []
    for turn in range(20):
        _use(policy, _expert(turn % LAYERS, turn % 8))
        victim = policy.victim(_expert((turn + 1) % LAYERS, 0), None)
        assert victim is not None
        given_up.append(victim)
        policy.discard(victim)
    assert given_up.count(_expert(DRAFT, 5)) == 1 and given_up[9] == _expert(DRAFT, 5)


def test_any_policy_may_be_asked():
    for name in POLICIES:
        policy = _policy(name)
        for part in (Part.BLOCK, Part.JOIN):
            _use(policy, WeightKey(part, 0), WeightKey(part, DRAFT))
            assert policy.victim(WeightKey(part, 1), None) is not None
        for layer in range(LAYERS):
            _use(policy, WeightKey(Part.BLOCK, layer), _expert(layer, 0), _expert(layer, 1))
        _use(policy, WeightKey(Part.HEAD, -1, 0), _expert(DRAFT, 0))
        victim = policy.victim(_expert(DRAFT, 1), None)
        assert victim is not None and victim.layer < DRAFT
