"""Equal slots in one stretch of memory. Knows bytes, not what lies in them."""

import torch

from windlass.device.base import ALIGN_BYTES
from windlass.weights.slots import Slots


class Arena(Slots):
    """`num_slots` slots of `slot_bytes` in `memory` (uint8). One owner; not thread-safe."""

    def __init__(self, memory: torch.Tensor, slot_bytes: int, num_slots: int) -> None:
        assert slot_bytes > 0 and slot_bytes % ALIGN_BYTES == 0, f"slot_bytes: got {slot_bytes}"
        assert memory.dtype == torch.uint8 and memory.is_contiguous(), memory.dtype
        assert memory.numel() >= slot_bytes * num_slots, (memory.numel(), slot_bytes, num_slots)
        super().__init__(num_slots)
        self.slot_bytes = slot_bytes
        self._memory = memory

    def bytes_of(self, slot: int) -> torch.Tensor:
        """The memory of a held slot: (slot_bytes,) uint8."""
        assert slot in self._held, f"slot {slot} is not held"
        return self._memory[slot * self.slot_bytes : (slot + 1) * self.slot_bytes]
