"""Eviction policies by name, for the engine and for replay."""

from collections.abc import Callable, Mapping
from typing import NamedTuple

from windlass.forecast.interface import ExpertTable, Outlook
from windlass.forecast.usage import UsageForecast
from windlass.prefetch.baselines import (
    LeastFrequentlyUsed,
    LeastFrequentRecent,
    LeastRecentlyUsed,
    RecentScores,
)
from windlass.prefetch.expert_pool import ExpectedNextUse, floor_of
from windlass.prefetch.paper_pools import FineMoePool, MoeInfinityPool
from windlass.prefetch.policies import FarthestNextUse
from windlass.schedule.observer import RoutingObserver
from windlass.weights.eviction import EvictionPolicy

DEFAULT_POLICY = "next-use"


class ChosenPolicy(NamedTuple):
    """A policy, and who must be told of routing for it to work, the forecast aside."""

    policy: EvictionPolicy
    observers: tuple[RoutingObserver, ...] = ()


def _next_use(outlook: Outlook, slots: int) -> ChosenPolicy:
    return ChosenPolicy(ExpectedNextUse(outlook, floor=floor_of(outlook.table, slots)))


def _farthest(outlook: Outlook, slots: int) -> ChosenPolicy:
    """The distance over the share of all text that uses the expert: what was done before forecasts
    followed the sequence."""
    usage = UsageForecast(outlook.table)
    num_layers = len(outlook.table.num_experts)
    return ChosenPolicy(FarthestNextUse(num_layers, probability=usage.probability), (usage,))


def _finemoe(outlook: Outlook, slots: int) -> ChosenPolicy:
    return ChosenPolicy(FineMoePool(outlook))


def _moe_infinity(outlook: Outlook, slots: int) -> ChosenPolicy:
    return ChosenPolicy(MoeInfinityPool(outlook))


def _mrs(outlook: Outlook, slots: int) -> ChosenPolicy:
    policy = RecentScores(outlook.table, slots)
    return ChosenPolicy(policy, (policy,))


def _counting(
    kind: Callable[[ExpertTable, int | None], EvictionPolicy], *, per_layer: bool
) -> Callable[[Outlook, int], ChosenPolicy]:
    def make(outlook: Outlook, slots: int) -> ChosenPolicy:
        return ChosenPolicy(kind(outlook.table, slots if per_layer else None))

    return make


# `-pool`: one for all layers, where the plain name gives each layer its share
POLICIES: Mapping[str, Callable[[Outlook, int], ChosenPolicy]] = {
    DEFAULT_POLICY: _next_use,
    "lru": _counting(LeastRecentlyUsed, per_layer=True),
    "lfu": _counting(LeastFrequentlyUsed, per_layer=True),
    "lfru": _counting(LeastFrequentRecent, per_layer=True),
    "mrs": _mrs,
    "finemoe": _finemoe,
    "moe-infinity": _moe_infinity,
    "farthest": _farthest,
    "lru-pool": _counting(LeastRecentlyUsed, per_layer=False),
    "lfu-pool": _counting(LeastFrequentlyUsed, per_layer=False),
    "lfru-pool": _counting(LeastFrequentRecent, per_layer=False),
}


def choose_policy(name: str, outlook: Outlook, slots: int) -> ChosenPolicy:
    """The policy of that name over what a forecast expects, for a cache of so many experts."""
    return POLICIES[name](outlook, slots)
