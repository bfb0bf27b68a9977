"""Eviction policies of two tiers, of which the lower holds what is copied to the upper, and is told
of uses there. Names only."""

from collections import Counter
from collections.abc import Callable, Container, Sequence

from windlass.ids import Part, WeightKey
from windlass.schedule.expert_homes import host_experts
from windlass.weights.eviction import EvictionPolicy


def takers(
    kept: Container[Part], num_experts: Sequence[int], host_share: float
) -> Callable[[WeightKey], int]:
    """Of one tier above, which takes all parts of the kinds `kept` to stay. Experts that the host
    computes, a share of each layer's, are used below all the same."""

    def count(key: WeightKey) -> int:
        if key.part not in kept:
            return 0
        is_expert = key.part is Part.EXPERT
        return 1 - (
            is_expert and host_experts(key.layer, num_experts[key.layer], host_share)[key.index]
        )

    return count


class LowerPolicy:
    """Implements `EvictionPolicy` by another's judgement, except that what stays in the tiers above
    for good goes first: nobody will ask for it again. Uses are those above, and those of whoever
    computes from this tier itself; that a part is copied from here is none."""

    def __init__(self, own: EvictionPolicy, takers: Callable[[WeightKey], int]) -> None:
        """`takers`: how many tiers above take a key to stay, all that will ever read it here; 0
        where it does not stay, or others use it here."""
        self._own = own
        self._takers = takers
        self._taken: Counter[WeightKey] = Counter()  # to stay above
        self._needless: dict[Part, dict[WeightKey, None]] = {}  # of those, what may be evicted here
        self.note_use = own.note_use

    def came_above(self, key: WeightKey) -> None:
        """`key` is resident in a tier above, copied from here."""
        self._taken[key] += 1

    def add(self, key: WeightKey) -> None:
        if 0 < self._takers(key) <= self._taken[key]:
            self._needless.setdefault(key.part, {})[key] = None
        else:
            self._own.add(key)

    def discard(self, key: WeightKey) -> None:
        if key in self._needless.get(key.part, ()):
            del self._needless[key.part][key]
        else:
            self._own.discard(key)

    def __contains__(self, key: WeightKey) -> bool:
        return key in self._needless.get(key.part, ()) or key in self._own

    def victim(self, entering: WeightKey, layers: int | None) -> WeightKey | None:
        needless = self._needless.get(entering.part)
        return next(iter(needless)) if needless else self._own.victim(entering, layers)


class UpperPolicy:
    """Implements `EvictionPolicy` by another's judgement; tells the lower tier's of uses."""

    def __init__(self, own: EvictionPolicy, lower: LowerPolicy) -> None:
        self._own = own
        self._lower = lower
        self.add = own.add
        self.discard = own.discard
        self.victim = own.victim

    def note_use(self, key: WeightKey) -> None:
        self._own.note_use(key)
        self._lower.note_use(key)

    def __contains__(self, key: WeightKey) -> bool:
        return key in self._own
