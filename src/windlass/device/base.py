"""The seam between memory management and a device: its memory, tensors in it, and asynchronous
copies into it. Knows bytes and files, not weights."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol, Self

import torch

from windlass.device.streams import OVER, Event, Streams
from windlass.errors import BudgetError
from windlass.ids import DISK, Route

# Direct I/O wants file offsets, lengths and addresses on this boundary: the page size, and at
# least the logical block size of every disk we know.
ALIGN_BYTES = 4096


class ByteSource(Protocol):
    """Files that copies come from."""

    def read(self, file: str, offset: int, into: memoryview) -> None:
        """Fills `into` from `file` at `offset`; both multiples of ALIGN_BYTES. What lies beyond the
        end of the file is left undefined. Called from several threads at once."""
        ...


@dataclass(frozen=True, slots=True, eq=False)
class FileRange:
    """Bytes of a file; `offset` and `num_bytes` are multiples of ALIGN_BYTES."""

    source: ByteSource
    file: str
    offset: int
    num_bytes: int

    @property
    def tier(self) -> str:
        return DISK

    def part(self, begin: int, num_bytes: int) -> Self:
        """`num_bytes` of it from `begin` on."""
        return type(self)(self.source, self.file, self.offset + begin, num_bytes)


class DeviceMemory:
    """Memory of `device`: `num_bytes` from `begin` on of the contiguous uint8 tensor `whole`, all
    of it by default, inside what `allocate` gave. `last_use`: the end of the last work that was
    asked to read it; copies into it begin then."""

    __slots__ = ("device", "whole", "begin", "num_bytes", "last_use")

    def __init__(
        self, device: "Device", whole: torch.Tensor, begin: int = 0, num_bytes: int | None = None
    ) -> None:
        self.last_use: Event = OVER
        self.device = device
        self.whole = whole
        self.begin = begin
        self.num_bytes = whole.numel() if num_bytes is None else num_bytes

    @property
    def tier(self) -> str:
        return self.device.name

    @property
    def data(self) -> torch.Tensor:
        """As a tensor, made anew."""
        return self.whole[self.begin : self.begin + self.num_bytes]

    def part(self, begin: int, num_bytes: int) -> Self:
        """`num_bytes` of it from `begin` on."""
        part = type(self)(self.device, self.whole, self.begin + begin, num_bytes)
        part.last_use = self.last_use
        return part


class Copy:
    """Bytes to move, as many as the source has, between places that do not overlap. `label`: shown
    in the trace."""

    __slots__ = ("source", "destination", "label", "num_bytes")

    def __init__(
        self, source: FileRange | DeviceMemory, destination: DeviceMemory, label: str
    ) -> None:
        self.source = source
        self.destination = destination
        self.label = label
        self.num_bytes = source.num_bytes

    @property
    def route(self) -> Route:
        return Route(self.source.tier, self.destination.tier)

    @property
    def parts(self) -> Sequence["Copy"]:
        """What is moved in one piece each."""
        return (self,)

    def part(self, begin: int, num_bytes: int) -> "Copy":
        """The copy of `num_bytes` from `begin` on."""
        source = self.source.part(begin, num_bytes)
        return Copy(source, self.destination.part(begin, num_bytes), self.label)


class Copies(Copy):
    """Several between the same two memories that are begun, and have ended, as one: they are small,
    and all wait for the same last use."""

    __slots__ = ("_parts",)

    def __init__(self, parts: Sequence[Copy]) -> None:
        """`parts`: at least one."""
        super().__init__(parts[0].source, parts[0].destination, parts[0].label)
        self._parts = parts
        self.num_bytes = sum(one.num_bytes for one in parts)

    @property
    def parts(self) -> Sequence[Copy]:
        return self._parts

    def part(self, begin: int, num_bytes: int) -> Copy:
        raise AssertionError("made to fit into a block")


Done = Callable[[Exception | None], None]


@contextmanager
def room_on_device(what: str) -> Iterator[None]:
    """BudgetError where a device has no room for `what`, in place of torch's error."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        reason = " ".join(str(error).split(". ")[:2])
        raise BudgetError(
            f"device memory: no room for {what}: give less to others, or another"
            f" --device-memory ({reason})"
        ) from error


class Allocator(Protocol):
    """Makes tensors in the memory of one device."""

    @property
    def streams(self) -> Streams:
        """What orders work on them."""
        ...

    def empty(self, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """An uninitialised tensor."""
        ...

    def zeros(self, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """A tensor of zeros."""
        ...

    def tensor(
        self, values: Sequence[int] | Sequence[bool] | torch.Tensor, *, dtype: torch.dtype
    ) -> torch.Tensor:
        """`values`, numbers or a tensor of the host, in this memory. A tensor that already lies
        there is not copied."""
        ...


class Device(Allocator, Protocol):
    """Memory of one device and the lanes that fill it."""

    @property
    def name(self) -> str:
        """Of the tier that its memory is."""
        ...

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

    def allocate(self, num_bytes: int) -> DeviceMemory:
        """Page-aligned memory; contents undefined. Freed with the last tensor in it."""
        ...

    def submit(self, copy: Copy, done: Done) -> None:
        """Starts `copy`, whose destination is of this device, and returns at once. `done(error or
        None)` is called exactly once, from another thread and never before `submit` has returned to
        a caller that holds a lock `done` needs; in any order among copies. The destination must not
        be read before, nor the source be changed. Reads of the destination that were asked for
        earlier end first (`DeviceMemory.last_use`)."""
        ...

    def synchronize(self) -> None:
        """Returns when every submitted copy has ended and its `done` has returned."""
        ...

    def close(self) -> None:
        """Ends all copies and threads. Idempotent; nothing may be submitted afterwards."""
        ...
