"""What will be wanted soon, in order, kind by kind. Names only, no torch."""

from collections import deque
from collections.abc import Collection, Sequence
from typing import NamedTuple

from windlass.ids import Part, WeightKey


class Wish(NamedTuple):
    """A part that will be wanted. `next_use`: layers from now until its turn in the pass.
    `probability`: that it is used then; 1 means certain."""

    key: WeightKey
    next_use: float
    probability: float = 1.0


class WishList:
    """Wishes in their order; a kind of part that is stuck does not hold up the others."""

    def __init__(self, wishes: Sequence[Wish] = ()) -> None:
        self._by_part: dict[Part, deque[tuple[int, Wish]]] = {}  # with its rank among all
        for rank, wish in enumerate(wishes):
            self._by_part.setdefault(wish.key.part, deque()).append((rank, wish))

    def first(self, blocked: Collection[Part]) -> Wish | None:
        """The foremost wish whose kind is not in `blocked`."""
        best: tuple[int, Wish] | None = None
        for part, wishes in self._by_part.items():
            if part not in blocked and (best is None or wishes[0][0] < best[0]):
                best = wishes[0]
        return best[1] if best is not None else None

    def pop(self, part: Part) -> None:
        """Drops the foremost wish of `part`."""
        self._by_part[part].popleft()
        if not self._by_part[part]:
            del self._by_part[part]
