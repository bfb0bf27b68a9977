"""The link from a source into memory of a device: a `IoQueue` whose blocks are the device's
copies. Knows files and bytes, not weights."""

import threading
from collections.abc import Callable, Sequence
from functools import partial

import torch

from windlass.checkpoint.part_reads import Read
from windlass.device.base import ALIGN_BYTES, ByteSource, Copy, Device
from windlass.trace import Tracer
from windlass.units import MIB
from windlass.weights.io_queue import BLOCK_BYTES, IoQueue, Priority, Ticket


class TransferQueue(IoQueue):
    """Moves bytes from `source` into memory of `device`, at most `depth` blocks in flight.
    Callbacks run on the device's threads. `into` of `submit` is uint8."""

    def __init__(
        self,
        source: ByteSource,
        device: Device,
        *,
        depth: int | None = None,
        block_bytes: int = BLOCK_BYTES,
        on_room: Callable[[], None] = lambda: None,
        tracer: Tracer | None = None,
    ) -> None:
        assert block_bytes > 0 and block_bytes % ALIGN_BYTES == 0, f"block_bytes: {block_bytes}"
        tracer = tracer or Tracer()
        self._source = source
        self._device = device
        self._condition = threading.Condition(threading.RLock())
        super().__init__(
            self._copy,
            self._condition,
            # One block waits behind those being read: a lane never idles for our lock.
            depth=depth or device.num_lanes + 1,
            block_bytes=block_bytes,
            on_room=on_room,
            on_issue=lambda queued, in_flight: tracer.counter(
                "transfers", queued=queued, mib_in_flight=in_flight / MIB
            ),
        )

    def submit(
        self,
        reads: Sequence[Read],
        into: torch.Tensor,
        *,
        priority: Priority,
        label: str,
        on_done: Callable[[], None],
    ) -> Ticket:
        return super().submit(reads, into, priority=priority, label=label, on_done=on_done)

    def close(self) -> None:
        """Issues nothing more and returns when nothing is in flight. Idempotent."""
        with self._condition:
            self._closed = True
            self._condition.notify_all()
            self._condition.wait_for(lambda: self._blocks_in_flight == 0)
            self._heap.clear()

    def _copy(self, ticket: Ticket, block: Read) -> None:
        memory = ticket.into[block.at : block.at + block.num_bytes]
        self._device.submit(
            Copy(self._source, block.file, block.offset, memory, ticket.label),
            partial(self.arrived, ticket, block.num_bytes),
        )
