"""Equal slots, by number, and in one stretch of memory. Knows bytes, not what lies in them."""

from windlass.device.base import ALIGN_BYTES, DeviceMemory


class Slots:
    """`num_slots` slots, each free or held. One owner; not thread-safe."""

    def __init__(self, num_slots: int) -> None:
        self.num_slots = num_slots
        self._free = list(range(num_slots - 1, -1, -1))  # the lowest first: touches least memory
        self._is_held = [False] * num_slots

    @property
    def num_free(self) -> int:
        return len(self._free)

    def allocate(self) -> int | None:
        """A free slot's number, now held; None where there is none."""
        if not self._free:
            return None
        slot = self._free.pop()
        self._is_held[slot] = True
        return slot

    def free(self, slot: int) -> None:
        """Gives a held slot back."""
        assert self._is_held[slot], f"slot {slot} is not held"
        self._is_held[slot] = False
        self._free.append(slot)

    def held(self) -> frozenset[int]:
        """Numbers of the held slots."""
        return frozenset(slot for slot, is_held in enumerate(self._is_held) if is_held)

    def check(self) -> None:
        """Every slot is either free or held, once."""
        assert len(set(self._free)) == len(self._free), "a slot is free twice"
        held = self.held()
        assert not held.intersection(self._free), "a slot is free and held"
        assert held.union(self._free) == set(range(self.num_slots)), "a slot is lost"


class Arena(Slots):
    """`num_slots` slots of `slot_bytes` in `memory`."""

    def __init__(self, memory: DeviceMemory, slot_bytes: int, num_slots: int) -> None:
        assert slot_bytes > 0 and slot_bytes % ALIGN_BYTES == 0, f"slot_bytes: got {slot_bytes}"
        assert memory.num_bytes >= slot_bytes * num_slots, (memory.num_bytes, slot_bytes, num_slots)
        super().__init__(num_slots)
        self.slot_bytes = slot_bytes
        self._slots = [memory.part(i * slot_bytes, slot_bytes) for i in range(num_slots)]

    def memory_of(self, slot: int) -> DeviceMemory:
        """The memory of a held slot: `slot_bytes`."""
        assert self._is_held[slot], f"slot {slot} is not held"
        return self._slots[slot]
