"""Which resident expert to give up, of one pool over all layers: vectors over all experts, a few
operations for each victim. Other kinds of parts are given up by their turn (`policies.py`)."""

from abc import ABC, abstractmethod

import numpy as np
from numpy.typing import NDArray

from windlass.forecast.interface import CERTAIN, ExpertTable, Floats, Outlook
from windlass.ids import Part, WeightKey
from windlass.prefetch.policies import FarthestNextUse

_LEAST_USAGE = 1e-4  # keeps the expected next use finite


class ExpertPool(ABC):
    """Implements `EvictionPolicy`: keeps what may be evicted; who derives from it says what each
    expert's loss matters. A layer keeps `floor` experts that may be evicted while others have more,
    so that no layer starves."""

    def __init__(self, table: ExpertTable, *, floor: int = 0) -> None:
        self._table = table
        self._floor = floor
        self._num_layers = len(table.num_experts)
        self._others = FarthestNextUse(self._num_layers)
        self._may_go = np.zeros(len(table), bool)
        self._in_layer = np.zeros(self._num_layers, np.int64)  # that may be evicted
        self._added = np.zeros(len(table), np.int64)  # when it became evictable
        self._num_added = 0
        self.now = 0  # layers since the start, over all passes

    # --- what kinds of pools differ in ------------------------------------------------------------

    @abstractmethod
    def losses(self) -> Floats:
        """Of all experts: the largest is given up first; among equals, the one added last."""

    def loss_of(self, entering: int, layers: int) -> float:
        """Of the expert at this place, which a hint would bring for its turn in so many layers:
        only what has a larger one makes room."""
        return -np.inf

    def used(self, place: int) -> None:  # noqa: B027  most kinds of pools want to know
        """The expert at this place is used now."""

    # --- the policy -------------------------------------------------------------------------------

    def note_use(self, key: WeightKey) -> None:
        layer = key.layer if key.layer >= 0 else self._num_layers - 1
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
        losses = self.losses()
        place = self._largest(losses, self._above_floor())
        if place is None and layers is None:
            place = self._largest(losses, self._may_go)
        if place is None:
            return None
        if layers is not None:
            own = self.loss_of(self._table.place(entering), layers)
            if losses[place] <= own:
                return None
        return self._table.keys[place]

    def _above_floor(self) -> NDArray[np.bool_]:
        if not self._floor:
            return self._may_go
        return self._may_go & np.repeat(self._in_layer > self._floor, self._table.num_experts)

    def _largest(self, losses: Floats, among: NDArray[np.bool_]) -> int | None:
        places = among.nonzero()[0]
        if not places.size:
            return None
        own = losses[places]
        best = places[own == own.max()]
        return int(best[self._added[best].argmax()])


def floor_of(table: ExpertTable, slots: int) -> int:
    """Experts that every layer keeps in a pool of so many slots: those of a token and one more, or
    as many as there are slots for."""
    return min(table.top_k + 1, slots // max(1, len(table.layers)))


class ExpectedNextUse(ExpertPool):
    """Gives up the expert whose next use is expected last: in `E = d + (1 - p0) * L / pbar` layers,
    where its next turn comes in d layers and has the probability p0 of a use, and each of the turns
    that follow, one every L layers, has pbar. Where all are certain it is the streaming order: what
    was just used goes first.

    p0 is the outlook's `now` for turns of the pass under way, its `next` for those of the next
    pass; pbar is its `usage`.
    """

    def __init__(self, outlook: Outlook, *, floor: int = 0) -> None:
        super().__init__(outlook.table, floor=floor)
        self._outlook = outlook
        self._used_at = np.full(len(outlook.table), -1, np.int64)
        self._known: tuple[int, int] | None = None  # the state that `_losses` are of
        self._losses: Floats = np.zeros(len(outlook.table))

    def used(self, place: int) -> None:
        self._used_at[place] = self.now
        self._known = None

    def losses(self) -> Floats:
        state = (self.now, self._outlook.version)
        if state != self._known:
            outlook, num_layers = self._outlook, self._num_layers
            ahead = self._table.layer_of - self.now % num_layers
            is_next = (ahead < 0) | ((ahead == 0) & (self._used_at == self.now))
            chance = np.where(is_next, outlook.next, outlook.now)
            later = num_layers / np.maximum(outlook.usage, _LEAST_USAGE)
            self._losses = ahead + is_next * num_layers + (1.0 - chance) * later
            self._known = state
        return self._losses

    def _above_floor(self) -> NDArray[np.bool_]:
        # a scan over all layers starves none, and its order is the best there is
        is_scan = self._outlook.usage.min() >= CERTAIN
        return self._may_go if is_scan else super()._above_floor()

    def loss_of(self, entering: int, layers: int) -> float:
        outlook = self._outlook
        ahead = int(self._table.layer_of[entering]) - self.now % self._num_layers
        is_next = ahead < 0 or (ahead == 0 and layers > 0)
        chance = float((outlook.next if is_next else outlook.now)[entering])
        later = self._num_layers / max(float(outlook.usage[entering]), _LEAST_USAGE)
        return layers + (1.0 - chance) * later
