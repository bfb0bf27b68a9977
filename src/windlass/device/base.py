"""The seam between memory management and a device: memory, and asynchronous copies into it. Knows
bytes and files, not weights."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch

# Direct I/O wants file offsets, lengths and addresses on this boundary: the page size, and at
# least the logical block size of every disk we know.
ALIGN_BYTES = 4096


class ByteSource(Protocol):
    """Where copies come from."""

    def read(self, file: str, offset: int, into: memoryview) -> None:
        """Fills `into` from `file` at `offset`; both multiples of ALIGN_BYTES. What lies beyond the
        end of the file is left undefined. Called from several threads at once."""
        ...


@dataclass(frozen=True, slots=True, eq=False)
class Copy:
    """One block to move. `into` is a contiguous uint8 tensor inside memory of `allocate`."""

    source: ByteSource
    file: str
    offset: int
    into: torch.Tensor
    label: str  # shown in the trace


Done = Callable[[Exception | None], None]


class Device(Protocol):
    """Memory of one device and the lanes that fill it."""

    @property
    def num_lanes(self) -> int:
        """Copies that make progress at the same time."""
        ...

    @property
    def allocated_bytes(self) -> int:
        """Sum of what `allocate` gave out."""
        ...

    @property
    def busy_s(self) -> float:
        """Seconds so far during which at least one copy was being made."""
        ...

    def allocate(self, num_bytes: int) -> torch.Tensor:
        """A page-aligned uint8 tensor of `num_bytes`; contents undefined. Freed with the tensor."""
        ...

    def submit(self, copy: Copy, done: Done) -> None:
        """Starts `copy` and returns at once. `done(error or None)` is called exactly once, from
        another thread and never before `submit` has returned to a caller that holds a lock `done`
        needs; in any order among copies. `into` must not be read before."""
        ...

    def synchronize(self) -> None:
        """Returns when every submitted copy has ended and its `done` has returned."""
        ...

    def close(self) -> None:
        """Ends all copies and threads. Idempotent; nothing may be submitted afterwards."""
        ...
