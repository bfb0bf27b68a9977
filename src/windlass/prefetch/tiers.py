"""Eviction policies of two tiers, of which the lower holds what is copied to the upper: uses happen
in the upper one alone, and both policies follow them. Names only."""

from collections.abc import Container

from windlass.ids import Part, WeightKey
from windlass.weights.eviction import EvictionPolicy


class LowerPolicy:
    """Implements `EvictionPolicy` by another's judgement, except that what stays in the tier above
    for good goes first: nobody will ask for it again. That a part is taken is no use of it."""

    def __init__(self, own: EvictionPolicy, kept_above: Container[Part]) -> None:
        """`kept_above`: kinds of parts that all have slots above."""
        self._own = own
        self._kept_above = kept_above
        self._taken: set[WeightKey] = set()  # to stay above
        self._needless: dict[Part, dict[WeightKey, None]] = {}  # of those, what may be evicted here

    def follow(self, key: WeightKey) -> None:
        """`key` is used above."""
        self._own.note_use(key)

    def note_use(self, key: WeightKey) -> None:
        if key.part in self._kept_above:
            self._taken.add(key)

    def add(self, key: WeightKey) -> None:
        if key in self._taken:
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
        self._lower.follow(key)

    def __contains__(self, key: WeightKey) -> bool:
        return key in self._own
