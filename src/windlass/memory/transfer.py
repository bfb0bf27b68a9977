"""One priority queue for one link. Cuts reads into blocks, keeps a few in flight and always issues
the most urgent block next, so that a demand overtakes speculation block by block. Knows files and
bytes, not weights."""

import heapq
import threading
from collections.abc import Callable, Sequence
from enum import Enum, IntEnum
from functools import partial

import torch

from windlass.device.base import ALIGN_BYTES, Copy, Device, Source
from windlass.memory.recipe import Read
from windlass.trace import Tracer
from windlass.units import MIB

# Direct reads of 1, 4, 16 MiB by 4 threads ran at 1.7, 1.7, 1.8 GB/s (virtual disk, 2 cores busy
# with other work, 2026-11-22). Smaller blocks cost more interpreter time per byte, larger ones make
# a demand wait longer for what is in flight.
BLOCK_BYTES = 4 * MIB


class Priority(IntEnum):
    """Smaller is more urgent."""

    DEMAND = 0
    SOON = 1
    SPECULATIVE = 2


class State(Enum):
    """Life of a ticket."""

    QUEUED = "queued"
    STARTED = "started"  # some block has been issued
    DONE = "done"
    CANCELLED = "cancelled"  # blocks may still be in flight; over when `on_done` is called


class Ticket:
    """Reads under way into one piece of memory. Changed by its queue only."""

    __slots__ = ("label", "priority", "state", "num_bytes", "_blocks", "_left", "_on_done")

    def __init__(
        self, label: str, priority: Priority, blocks: list[Read], on_done: Callable[[], None]
    ) -> None:
        self.label = label
        self.priority = priority
        self.state = State.QUEUED
        self.num_bytes = sum(block.num_bytes for block in blocks)
        self._blocks = blocks[::-1]  # not yet issued; the next is last
        self._left = len(blocks)  # not yet arrived
        self._on_done = on_done


class TransferQueue:
    """Moves bytes from `source` into memory of `device`, at most `depth` blocks in flight.

    `changed` is the one lock of everything that shares this queue; all methods want it held, except
    `close`. Callbacks run under it, on the device's threads: `on_done` of a ticket when its last
    block is there, `on_room` whenever a block has arrived. `changed` is notified when a ticket
    ends. The first error of any read ends the queue: `raise_error` raises it from then on, and
    nothing further is issued.
    """

    def __init__(
        self,
        source: Source,
        device: Device,
        *,
        depth: int | None = None,
        block_bytes: int = BLOCK_BYTES,
        on_room: Callable[[], None] = lambda: None,
        tracer: Tracer | None = None,
    ) -> None:
        assert block_bytes > 0 and block_bytes % ALIGN_BYTES == 0, f"block_bytes: {block_bytes}"
        self.changed = threading.Condition(threading.RLock())
        self.bytes_read = 0
        self.num_reads = 0
        self._source = source
        self._device = device
        # One block waits behind those being read: a lane never idles for our lock.
        self._depth = depth or device.num_lanes + 1
        self._block_bytes = block_bytes
        self._on_room = on_room
        self._tracer = tracer or Tracer()
        self._heap: list[tuple[int, int, Ticket, torch.Tensor]] = []
        self._submitted = 0
        self._blocks_in_flight = 0
        self._bytes_in_flight = 0
        self._error: Exception | None = None
        self._closed = False

    @property
    def bytes_in_flight(self) -> int:
        return self._bytes_in_flight

    def has_room(self, priority: Priority) -> bool:
        """Whether a ticket of `priority` would be served next: nothing as urgent waits, and, for
        anything but a demand, the link is not full with such blocks."""
        if self._error is not None or self._closed:
            return False
        head = self._head()
        if head is not None:
            return head.priority > priority
        return priority == Priority.DEMAND or self._blocks_in_flight < self._depth

    def submit(
        self,
        reads: Sequence[Read],
        into: torch.Tensor,
        *,
        priority: Priority,
        label: str,
        on_done: Callable[[], None],
    ) -> Ticket:
        """Queues `reads` into `into` (uint8) and starts what fits."""
        assert not self._closed, f"{label}: submitted to a closed queue"
        blocks = [block for read in reads for block in self._cut(read)]
        ticket = Ticket(label, priority, blocks, on_done)
        self._push(ticket, into)
        self._issue()
        return ticket

    def promote(self, ticket: Ticket, priority: Priority) -> None:
        """Makes `ticket` more urgent; nothing happens where it already is, or has been issued."""
        if priority >= ticket.priority:
            return
        ticket.priority = priority
        into = next((entry[3] for entry in self._heap if entry[2] is ticket), None)
        if into is not None:
            self._push(ticket, into)
            self._issue()

    def cancel(self, ticket: Ticket) -> bool:
        """Drops what has not been issued of `ticket`; `on_done` follows when the rest has arrived,
        perhaps before this returns. False: all is issued, it will be DONE."""
        if not ticket._blocks:
            return False
        ticket.state = State.CANCELLED
        ticket._left -= len(ticket._blocks)
        ticket._blocks.clear()
        if not ticket._left:
            self._end(ticket)
        return True

    def raise_error(self) -> None:
        """Raises the first error of any read, the same to everyone who asks."""
        if self._error is not None:
            raise self._error
        if self._closed:
            raise RuntimeError("the transfer queue is closed")

    def wait(self, is_over: Callable[[], bool]) -> None:
        """Blocks until `is_over()`; raises the first error of any read instead."""
        while not is_over():
            self.raise_error()
            self.changed.wait()

    def close(self) -> None:
        """Issues nothing more and returns when nothing is in flight. Idempotent."""
        with self.changed:
            self._closed = True
            self.changed.notify_all()
            self.changed.wait_for(lambda: self._blocks_in_flight == 0)
            self._heap.clear()

    def check(self) -> None:
        """What is counted in flight is what the tickets miss."""
        assert 0 <= self._blocks_in_flight <= self._depth, self._blocks_in_flight
        assert (self._blocks_in_flight == 0) == (self._bytes_in_flight == 0), self._bytes_in_flight
        if self._error is None and not self._closed and self._blocks_in_flight < self._depth:
            assert self._head() is None, "a block waits although the link has room"

    def _cut(self, read: Read) -> list[Read]:
        step = self._block_bytes
        return [
            Read(read.file, read.offset + i, min(step, read.num_bytes - i), read.at + i)
            for i in range(0, read.num_bytes, step)
        ]

    def _push(self, ticket: Ticket, into: torch.Tensor) -> None:
        self._submitted += 1
        heapq.heappush(self._heap, (ticket.priority, self._submitted, ticket, into))

    def _head(self) -> Ticket | None:
        """The most urgent ticket with blocks to issue; drops entries that have none left. (Of a
        promoted ticket, the old entry comes up only after the new one, when it has none left.)"""
        while self._heap:
            ticket = self._heap[0][2]
            if ticket._blocks:
                return ticket
            heapq.heappop(self._heap)
        return None

    def _issue(self) -> None:
        if self._error is not None or self._closed:
            return
        while self._blocks_in_flight < self._depth and (ticket := self._head()) is not None:
            into = self._heap[0][3]
            block = ticket._blocks.pop()
            ticket.state = State.STARTED
            self._blocks_in_flight += 1
            self._bytes_in_flight += block.num_bytes
            memory = into[block.at : block.at + block.num_bytes]
            self._device.submit(
                Copy(self._source, block.file, block.offset, memory, ticket.label),
                partial(self._arrived, ticket, block.num_bytes),
            )
        self._tracer.counter(
            "transfers", queued=len(self._heap), mib_in_flight=self._bytes_in_flight / MIB
        )

    def _arrived(self, ticket: Ticket, num_bytes: int, error: Exception | None) -> None:
        with self.changed:
            self._blocks_in_flight -= 1
            self._bytes_in_flight -= num_bytes
            try:
                if error is not None:
                    raise error
                self.bytes_read += num_bytes
                self.num_reads += 1
                ticket._left -= 1
                if not ticket._left:
                    self._end(ticket)
                self._issue()
                self._on_room()
            except Exception as caught:  # noqa: BLE001  thread boundary: raised at every waiter
                self._error = self._error or caught
            if self._error is not None or self._closed:
                self.changed.notify_all()

    def _end(self, ticket: Ticket) -> None:
        if ticket.state is not State.CANCELLED:
            ticket.state = State.DONE
        ticket._on_done()
        self.changed.notify_all()
