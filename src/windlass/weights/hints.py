"""What will be wanted soon, in order, kind by kind. Names only, no torch."""

from collections.abc import Collection
from heapq import heappop, heappush
from typing import NamedTuple

from windlass.ids import Part, WeightKey


class Hint(NamedTuple):
    """A part that will be wanted. `rank`: its place among all hints, the lowest is read first.
    `turn`: when it is used, in layers since the first pass began. `is_certain`: it is not
    speculation."""

    rank: float
    key: WeightKey
    turn: int
    is_certain: bool = True


class HintQueue:
    """Hints by rank; a kind of part that is stuck does not hold up the others. A key has one hint
    at a time, the last that was added."""

    def __init__(self) -> None:
        self._heaps: dict[Part, list[Hint]] = {}
        self._ranks: dict[WeightKey, float] = {}  # of hints that hold

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
        if not self._ranks:
            return None
        best: Hint | None = None
        for part, heap in self._heaps.items():
            while heap and self._ranks.get(heap[0].key) != heap[0].rank:
                heappop(heap)
            if heap and part not in blocked and (best is None or heap[0].rank < best.rank):
                best = heap[0]
        return best
