"""Equal slots, by number. Knows no memory."""


class Slots:
    """`num_slots` slots, each free or held. One owner; not thread-safe."""

    def __init__(self, num_slots: int) -> None:
        self.num_slots = num_slots
        self._free = list(range(num_slots - 1, -1, -1))  # the lowest first: touches least memory
        self._held: set[int] = set()

    @property
    def num_free(self) -> int:
        return len(self._free)

    def allocate(self) -> int | None:
        """A free slot's number, now held; None where there is none."""
        if not self._free:
            return None
        slot = self._free.pop()
        self._held.add(slot)
        return slot

    def free(self, slot: int) -> None:
        """Gives a held slot back."""
        assert slot in self._held, f"slot {slot} is not held"
        self._held.remove(slot)
        self._free.append(slot)

    def held(self) -> frozenset[int]:
        """Numbers of the held slots."""
        return frozenset(self._held)

    def check(self) -> None:
        """Every slot is either free or held, once."""
        assert len(set(self._free)) == len(self._free), "a slot is free twice"
        assert not self._held.intersection(self._free), "a slot is free and held"
        assert self._held.union(self._free) == set(range(self.num_slots)), "a slot is lost"
