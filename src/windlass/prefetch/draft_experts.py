"""Which experts of a layer that drafts stay, beside those that a policy ranks: no forecast knows
when that layer runs, and what it guesses is worth no more memory than any other layer has."""

from windlass.ids import Part, WeightKey
from windlass.weights.eviction import EvictionPolicy


class DraftExperts:
    """Implements `EvictionPolicy`: `policy`, which knows the layers below `layer`, and for that
    layer its own order. It may keep `share` experts; of more, and of all that it has not used while
    `slots` others were given up, the one used longest ago goes first."""

    def __init__(self, policy: EvictionPolicy, layer: int, *, slots: int, share: int) -> None:
        self._policy = policy
        self._layer = layer
        self._slots = slots
        self._share = share
        self._own: dict[WeightKey, None] = {}  # that may be evicted, used longest ago first
        self._given_up = 0  # others, since the layer ran

    def _is_own(self, key: WeightKey) -> bool:
        return key.part is Part.EXPERT and key.layer == self._layer

    def note_use(self, key: WeightKey) -> None:
        if not self._is_own(key):
            self._policy.note_use(key)
            return
        self._given_up = 0
        if key in self._own:
            self.add(key)

    def add(self, key: WeightKey) -> None:
        if not self._is_own(key):
            self._policy.add(key)
            return
        self._own.pop(key, None)
        self._own[key] = None

    def discard(self, key: WeightKey) -> None:
        if self._is_own(key):
            self._own.pop(key, None)
        else:
            self._policy.discard(key)

    def __contains__(self, key: WeightKey) -> bool:
        return key in self._own if self._is_own(key) else key in self._policy

    def victim(self, entering: WeightKey, layers: int | None) -> WeightKey | None:
        if entering.part is not Part.EXPERT:
            return self._policy.victim(entering, layers)
        oldest = next(iter(self._own), None)
        most = self._share - self._is_own(entering)
        if oldest is not None and (len(self._own) > most or self._given_up > self._slots):
            return oldest
        # what is demanded asks nothing of its own place but a layer that the policy knows
        asked = WeightKey(Part.EXPERT, self._layer - 1, 0) if self._is_own(entering) else entering
        other = self._policy.victim(asked, layers)
        self._given_up += other is not None
        return oldest if other is None and layers is None else other
