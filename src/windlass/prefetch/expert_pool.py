"""Which resident expert to give up, of one pool over all layers: vectors over all experts, a few
operations for each victim. Other kinds of parts are given up by their turn (`policies.py`)."""

from abc import ABC, abstractmethod

import numpy as np

from windlass.forecast.interface import CERTAIN, ExpertTable, Floats, Outlook
from windlass.ids import Part, WeightKey
from windlass.prefetch.policies import FarthestNextUse

_LEAST_USAGE = 1e-4  # keeps the expected next use finite
_RANKED = 32  # experts to give up that are looked for at once


class ExpertPool(ABC):
    """Implements `EvictionPolicy`: keeps what may be evicted; who derives from it says what each
    expert's loss matters. A layer keeps `floor` experts that may be evicted while others have more,
    so that no layer starves."""

    def __init__(
        self, table: ExpertTable, *, floor: int = 0, groups: Outlook | None = None
    ) -> None:
        """`groups` knows in which layer a pass in several groups is: the next block is used before
        the last of them has left the layer."""
        self._table = table
        self._groups = groups
        self._floor = floor
        self._num_layers = len(table.num_experts)
        self._others = FarthestNextUse(self._num_layers)
        self._may_go = np.zeros(len(table), bool)
        self._in_layer = np.zeros(self._num_layers, np.int64)  # that may be evicted
        self._added = np.zeros(len(table), np.int64)  # when it became evictable
        self._num_added = 0
        self._ranked: list[int] | None = (
            None  # places to give up, in this order, as long as it holds
        )
        self.now = 0  # layers since the start, over all passes

    # --- what kinds of pools differ in ------------------------------------------------------------

    @abstractmethod
    def losses(self) -> Floats:
        """Of all experts: the largest is given up first; among equals, the one added last."""

    def changed(self) -> bool:
        """Whether losses may have changed since this was asked last."""
        return True

    def loss_of(self, entering: int, layers: int) -> float:
        """Of the expert at this place, which a hint would bring for its turn in so many layers:
        only what has a larger one makes room."""
        return -np.inf

    def used(self, place: int) -> None:  # noqa: B027  most kinds of pools want to know
        """The expert at this place is used now."""

    # --- the policy -------------------------------------------------------------------------------

    def note_use(self, key: WeightKey) -> None:
        layer = None if self._groups is None else self._groups.layer
        if layer is None:
            layer = key.layer if 0 <= key.layer < self._num_layers else self._num_layers - 1
        self.now += (layer - self.now) % self._num_layers
        if key.part is Part.EXPERT:
            self.used(self._table.place(key))
        else:
            self._others.note_use(key)

    def add(self, key: WeightKey) -> None:
        if key.part is not Part.EXPERT:
            self._others.add(key)
            return
        place = self._table.place(key)
        self._in_layer[key.layer] += not self._may_go[place]
        self._may_go[place] = True
        self._ranked = None
        self._num_added += 1
        self._added[place] = self._num_added

    def discard(self, key: WeightKey) -> None:
        if key.part is not Part.EXPERT:
            self._others.discard(key)
            return
        place = self._table.place(key)
        self._in_layer[key.layer] -= bool(self._may_go[place])
        self._may_go[place] = False

    def __contains__(self, key: WeightKey) -> bool:
        if key.part is not Part.EXPERT:
            return key in self._others
        return bool(self._may_go[self._table.place(key)])

    def victim(self, entering: WeightKey, layers: int | None) -> WeightKey | None:
        if entering.part is not Part.EXPERT:
            return self._others.victim(entering, layers)
        at = None if self._groups is None else self._groups.layer  # once: another thread sets it
        if at is not None:
            self.now += (at - self.now) % self._num_layers
        place = self._foremost(is_demand=layers is None)
        if place is None:
            return None
        if layers is not None:
            own = self.loss_of(self._table.place(entering), layers)
            if self.losses()[place] <= own:
                return None
        return self._table.keys[place]

    def is_starved(self, layer: int) -> bool:
        """Whether this layer has as few experts that may go as it keeps."""
        return bool(self._in_layer[layer] <= self._floor)

    def _foremost(self, *, is_demand: bool) -> int | None:
        """Place of the expert to give up. Several are ranked at once: a layer misses several."""
        if self._ranked is None or self.changed():
            self._ranked = self._rank(_RANKED)
        place = self._first_of(self._ranked)
        if place is None:
            self._ranked = self._rank(len(self._table))
            place = self._first_of(self._ranked)
        if place is None and is_demand:  # all layers are down to what they keep
            place = next((one for one in self._ranked if self._may_go[one]), None)
        return place

    def _first_of(self, ranked: list[int]) -> int | None:
        for place in ranked:
            if self._may_go[place] and not self.is_starved(int(self._table.layer_of[place])):
                return place
        return None

    def _rank(self, most: int) -> list[int]:
        places = self._may_go.nonzero()[0]
        own = self.losses()[places]
        if places.size > most:
            least = np.partition(own, -most)[-most]
            best = own >= least  # with all that are equal
            places, own = places[best], own[best]
        order = np.lexsort((self._added[places], own))[::-1]
        ranked: list[int] = places[order].tolist()
        return ranked


def floor_of(table: ExpertTable, slots: int) -> int:
    """Experts that every layer keeps in a pool of so many slots: those of a token and one more, or
    as many as there are slots for."""
    return min(table.top_k + 1, slots // max(1, len(table.layers)))


class ExpectedNextUse(ExpertPool):
    """Gives up the expert whose next use is expected last: in `E = d + (1 - p0) * L / pbar` layers,
    where its next turn comes in d layers and has the probability p0 of a use, and each of the turns
    that follow, one every L layers, has pbar. Where all are certain it is the streaming order: what
    was just used goes first; not while other groups of the pass are still to use the layer.

    p0 is the outlook's `now` for turns of the pass under way, its `next` for those of the next
    pass; pbar is its `usage`.
    """

    def __init__(self, outlook: Outlook, *, floor: int = 0) -> None:
        super().__init__(outlook.table, floor=floor, groups=outlook)
        self._outlook = outlook
        self._used_at = np.full(len(outlook.table), -1, np.int64)
        self._known: tuple[int, int] | None = None  # the state that `_losses` are of
        self._losses: Floats = np.zeros(len(outlook.table))
        self._later: Floats = np.zeros(len(outlook.table))
        self._is_scan = False
        layers = self._num_layers
        # layers until the turn of each expert, seen from each layer
        self._turns = [(outlook.table.layer_of - now) % layers for now in range(layers)]

    def used(self, place: int) -> None:
        if not self._outlook.is_open:  # else another group may use it in the same turn
            self._used_at[place] = self.now
            self._known = None

    def changed(self) -> bool:
        return self._known != (self.now, self._outlook.version)

    def losses(self) -> Floats:
        if self.changed():
            outlook, table = self._outlook, self._table
            now, losses = self.now % self._num_layers, self._losses
            first, part = table.first[now], table.slice(now)
            # experts lie in the order of their layers: of those before, the next pass is meant
            np.subtract(1.0, outlook.now[first:], out=losses[first:])
            np.subtract(1.0, outlook.next[:first], out=losses[:first])
            is_used = self._used_at[part] == self.now
            losses[part][is_used] = 1.0 - outlook.next[part][is_used]
            np.maximum(outlook.usage, _LEAST_USAGE, out=self._later)
            np.divide(self._num_layers, self._later, out=self._later)
            losses *= self._later
            losses += self._turns[now]
            losses[part][is_used] += self._num_layers
            # a scan over all layers starves none, and its order is the best there is
            self._is_scan = bool(outlook.usage.min() >= CERTAIN)
            self._known = (self.now, outlook.version)
        return self._losses

    def is_starved(self, layer: int) -> bool:
        return not self._is_scan and super().is_starved(layer)

    def loss_of(self, entering: int, layers: int) -> float:
        outlook = self._outlook
        ahead = int(self._table.layer_of[entering]) - self.now % self._num_layers
        is_next = ahead < 0 or (ahead == 0 and layers > 0)
        chance = float((outlook.next if is_next else outlook.now)[entering])
        later = self._num_layers / max(float(outlook.usage[entering]), _LEAST_USAGE)
        return layers + (1.0 - chance) * later
