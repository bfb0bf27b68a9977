"""What will be wanted soon, in order, kind by kind. Names only, no torch."""

from collections.abc import Collection, Container
from heapq import heapify, heappop, heappush
from typing import NamedTuple

from windlass.ids import Part, WeightKey

_MOST_STALE = 64


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
        self._hints: dict[WeightKey, Hint] = {}  # that hold

    def __len__(self) -> int:
        return len(self._hints)

    def add(self, hint: Hint) -> None:
        self._hints[hint.key] = hint
        heap = self._heaps.setdefault(hint.key.part, [])
        heappush(heap, hint)
        if len(heap) > 4 * len(self._hints) + _MOST_STALE:  # those that hold no more lie in it yet
            heap[:] = [one for one in self._hints.values() if one.key.part is hint.key.part]
            heapify(heap)

    def drop(self, key: WeightKey) -> None:
        """`key` is hinted at no more; unknown keys are fine."""
        self._hints.pop(key, None)

    def set_aside(self, hint: Hint) -> None:
        """`hint`, the foremost of its kind, is not looked at again until `recall`."""
        heap = self._heaps[hint.key.part]
        assert heap[0] is hint, f"{hint.key} is not the foremost"
        heappop(heap)

    def recall(self, key: WeightKey) -> None:
        """The hint of `key`, if there is one, is looked at again."""
        hint = self._hints.get(key)
        if hint is not None:
            heappush(self._heaps[key.part], hint)

    def settle(self, layer: int, needed: Container[WeightKey], now: int) -> None:
        """Experts of `layer` that are not `needed` are hinted at no more, unless for a turn after
        `now`."""
        for key, hint in list(self._hints.items()):
            is_guess = key.part is Part.EXPERT and key.layer == layer and hint.turn <= now
            if is_guess and key not in needed:
                del self._hints[key]

    def first(self, blocked: Collection[Part]) -> Hint | None:
        """The foremost hint whose kind is not in `blocked`."""
        if not self._hints:
            return None
        best: Hint | None = None
        for part, heap in self._heaps.items():
            while heap and self._hints.get(heap[0].key) is not heap[0]:
                heappop(heap)
            if heap and part not in blocked and (best is None or heap[0].rank < best.rank):
                best = heap[0]
        return best
