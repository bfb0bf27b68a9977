"""What will be wanted soon, in order, kind by kind. Names only, no torch."""

from collections import deque
from collections.abc import Collection, Sequence
from typing import NamedTuple

from windlass.ids import Part, WeightKey


class Hint(NamedTuple):
    """A part that will be wanted. `next_use`: layers from now until its turn in the pass.
    `probability`: that it is used then; 1 means certain."""

    key: WeightKey
    next_use: float
    probability: float = 1.0


class HintList:
    """Hints in their order; a kind of part that is stuck does not hold up the others."""

    def __init__(self, hints: Sequence[Hint] = ()) -> None:
        self._by_part: dict[Part, deque[tuple[int, Hint]]] = {}  # with its rank among all
        for rank, hint in enumerate(hints):
            self._by_part.setdefault(hint.key.part, deque()).append((rank, hint))

    def first(self, blocked: Collection[Part]) -> Hint | None:
        """The foremost hint whose kind is not in `blocked`."""
        best: tuple[int, Hint] | None = None
        for part, hints in self._by_part.items():
            if part not in blocked and (best is None or hints[0][0] < best[0]):
                best = hints[0]
        return best[1] if best is not None else None

    def pop(self, part: Part) -> None:
        """Drops the foremost hint of `part`."""
        self._by_part[part].popleft()
        if not self._by_part[part]:
            del self._by_part[part]
