"""The yardstick of eviction policies."""

from collections import OrderedDict

from windlass.ids import Part, WeightKey


class LeastRecentlyUsed:
    """Gives up what was used longest ago. The yardstick; in a cyclic pass it is always wrong."""

    def __init__(self) -> None:
        self._keys: dict[Part, OrderedDict[WeightKey, None]] = {
            part: OrderedDict() for part in Part
        }

    def note_use(self, key: WeightKey) -> None:
        if key in self._keys[key.part]:
            self._keys[key.part].move_to_end(key)

    def add(self, key: WeightKey) -> None:
        self._keys[key.part][key] = None

    def discard(self, key: WeightKey) -> None:
        self._keys[key.part].pop(key, None)

    def __contains__(self, key: WeightKey) -> bool:
        return key in self._keys[key.part]

    def victim(self, entering: WeightKey, layers: int | None) -> WeightKey | None:
        return next(iter(self._keys[entering.part]), None)
