"""Where the parts of a weight store come from: ranges of files, read into slots as they lie on
disk. (Or the tier below: `tier_supply.py`.) Knows keys, files and slots, not who wants what."""

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import torch

from windlass.checkpoint.part_reads import PartReads, make_part_reads, slot_bytes
from windlass.checkpoint.reader import WeightSource
from windlass.checkpoint.views import copied_bytes
from windlass.device.base import Copy, Device, DeviceMemory, FileRange
from windlass.ids import DISK, Part, Route, WeightKey
from windlass.models.names import Layout
from windlass.trace import Tracer
from windlass.weights.cache import WeightCache
from windlass.weights.io_queue import Priority, Ticket
from windlass.weights.row_reader import RowReader
from windlass.weights.transfer import Carrier, TransferQueue


class Rows(Protocol):
    """A (V, D) table that has no slot here."""

    def read(self, rows: Sequence[int]) -> torch.Tensor:
        """(len(rows), D) in the stored type, in the store's memory."""
        ...


class Supply(Protocol):
    """Brings parts into the slots of one tier."""

    layout: Layout
    device: Device  # whose memory the slots are
    queue: TransferQueue
    route: Route
    below: WeightCache | None  # that parts come from, if it is no file
    slot_bytes: Mapping[Part, int]
    one_by_one: bool  # whether views of a part own memory outside its slot, planned for one part

    def part_reads(self, key: WeightKey) -> PartReads:
        """How the tensors of `key` lie in its slot."""
        ...

    def fetch(
        self, key: WeightKey, into: DeviceMemory, *, priority: Priority, on_done: Callable[[], None]
    ) -> Ticket[Copy]:
        """Begins to bring `key` into a slot; as `Mover.fetch`."""
        ...

    def rows(self, key: WeightKey) -> Rows:
        """The `weight` of `key`, an embedding without a slot."""
        ...

    def check(self) -> None:
        """What is under way agrees with the tier below."""
        ...


class FileSupply:
    """Implements `Supply` from the files of a checkpoint."""

    def __init__(
        self, layout: Layout, source: WeightSource, disk: Carrier, *, tracer: Tracer | None = None
    ) -> None:
        """`disk`: who carries parts from disk into memory of its device."""
        self.layout = layout
        self.device = disk.device
        self.route = Route(DISK, disk.device.name)
        self.queue = TransferQueue({self.route: disk}, tracer=tracer)
        self.below: WeightCache | None = None
        self.slot_bytes: Mapping[Part, int] = slot_bytes(layout, source.tensors)
        self.one_by_one = bool(copied_bytes(layout, source.tensors))
        self._source = source
        # reads of a part, where in the slot they go, and its name
        self._known: dict[WeightKey, tuple[list[tuple[FileRange, int]], str]] = {}

    def part_reads(self, key: WeightKey) -> PartReads:
        return make_part_reads(key, self.layout, self._source.tensors)

    def fetch(
        self, key: WeightKey, into: DeviceMemory, *, priority: Priority, on_done: Callable[[], None]
    ) -> Ticket[Copy]:
        ranges, label = self._known.get(key) or self._learn(key)
        copies = [Copy(source, into.part(at, source.num_bytes), label) for source, at in ranges]
        return self.queue.enqueue(self.route, copies, priority=priority, on_done=on_done)

    def rows(self, key: WeightKey) -> Rows:
        (piece,) = self.layout.parts[key]
        info = self._source.tensors[piece.tensor]
        assert not piece.ops and piece.shape == info.shape, f"{key}: rows of {piece}"
        return RowReader(info, self._source, self.queue, self.device)

    def check(self) -> None:
        """Files do not change."""

    def _learn(self, key: WeightKey) -> tuple[list[tuple[FileRange, int]], str]:
        ranges = [
            (FileRange(self._source, read.file, read.offset, read.num_bytes), read.at)
            for read in self.part_reads(key).reads
        ]
        known = self._known[key] = ranges, str(key)
        return known
