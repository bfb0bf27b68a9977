"""What will be wanted soon, in order, kind by kind. Names only, no torch."""

from collections.abc import Collection
from heapq import heappop, heappush
from typing import NamedTuple

from windlass.ids import Part, WeightKey

_MIN_PROBABILITY = 1e-6  # keeps the expected distance finite


class Hint(NamedTuple):
    """A part that will be wanted. `rank`: its place among all hints. `turn`: when it is used, in
    layers since the first pass began. `probability`: that it is used then; 1 means certain."""

    rank: int
    key: WeightKey
    turn: int
    probability: float = 1.0

    def distance(self, now: int) -> float:
        """Layers from `now` until it is used, as expected: more where a use is less likely."""
        return (self.turn - now) / max(self.probability, _MIN_PROBABILITY)


class HintQueue:
    """Hints by rank; a kind of part that is stuck does not hold up the others. A key has one hint
    at a time, the last that was added."""

    def __init__(self) -> None:
        self._heaps: dict[Part, list[Hint]] = {}
        self._ranks: dict[WeightKey, int] = {}  # of hints that hold

    def __len__(self) -> int:
        return len(self._ranks)

    def add(self, hint: Hint) -> None:
        self._ranks[hint.key] = hint.rank
        heappush(self._heaps.setdefault(hint.key.part, []), hint)

    def drop(self, key: WeightKey) -> None:
        """`key` is hinted at no more; unknown keys are fine."""
        self._ranks.pop(key, None)

    def first(self, blocked: Collection[Part]) -> Hint | None:
        """The foremost hint whose kind is not in `blocked`."""
        best: Hint | None = None
        for part, heap in self._heaps.items():
            while heap and self._ranks.get(heap[0].key) != heap[0].rank:
                heappop(heap)
            if heap and part not in blocked and (best is None or heap[0].rank < best.rank):
                best = heap[0]
        return best
