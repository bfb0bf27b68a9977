"""One priority queue for one link. Cuts reads into blocks, keeps a few in flight and always issues
the most urgent block next, so that a demand overtakes speculation block by block. Decides only:
whoever made the queue moves the blocks, or a clock pretends to. Knows bytes, not weights."""

import heapq
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from enum import Enum, IntEnum
from typing import Any, Protocol

from windlass.checkpoint.part_reads import Read
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


class TicketState(Enum):
    """Life of a ticket."""

    QUEUED = "queued"
    STARTED = "started"  # some block has been issued
    DONE = "done"
    CANCELLED = "cancelled"  # blocks may still be in flight; over when `on_done` is called


class Changed(AbstractContextManager[Any], Protocol):
    """The lock of everything that shares a queue, and the wait for a change: a
    `threading.Condition`, or a clock that goes on to its next event."""

    def wait(self) -> object: ...

    def notify_all(self) -> None: ...


class Ticket:
    """Reads under way into one piece of memory. Changed by its queue only."""

    __slots__ = ("label", "priority", "state", "num_bytes", "into", "_blocks", "_left", "_on_done")

    def __init__(
        self,
        label: str,
        priority: Priority,
        blocks: list[Read],
        into: Any,
        on_done: Callable[[], None],
    ) -> None:
        self.label = label
        self.priority = priority
        self.state = TicketState.QUEUED
        self.num_bytes = sum(block.num_bytes for block in blocks)
        self.into = into
        self._blocks = blocks[::-1]  # not yet issued; the next is last
        self._left = len(blocks)  # not yet arrived
        self._on_done = on_done


class IoQueue:
    """Issues blocks through `send`, at most `depth` in flight; `arrived` must follow for each.

    `changed` is the one lock of everything that shares this queue; all methods want it held, except
    `arrived` and `close`. Callbacks run under it, on the thread that says `arrived`: `on_done` of a
    ticket when its last block is there, `on_room` whenever a block has arrived. `changed` is
    notified when a ticket ends. The first error of any read ends the queue: `raise_error` raises it
    from then on, and nothing further is issued.
    """

    def __init__(
        self,
        send: Callable[[Ticket, Read], None],
        changed: Changed,
        *,
        depth: int,
        block_bytes: int = BLOCK_BYTES,
        on_room: Callable[[], None] = lambda: None,
        on_issue: Callable[[int, int], None] = lambda queued, in_flight: None,
    ) -> None:
        """`on_issue(tickets queued, bytes in flight)`: for the trace."""
        self.changed = changed
        self.bytes_read = 0
        self.num_reads = 0
        self._send = send
        self._depth = depth
        self._block_bytes = block_bytes
        self._on_room = on_room
        self._on_issue = on_issue
        self._heap: list[tuple[int, int, Ticket]] = []
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
        into: Any,
        *,
        priority: Priority,
        label: str,
        on_done: Callable[[], None],
    ) -> Ticket:
        """Queues `reads` into `into` and starts what fits."""
        assert not self._closed, f"{label}: submitted to a closed queue"
        blocks = [block for read in reads for block in self._cut(read)]
        ticket = Ticket(label, priority, blocks, into, on_done)
        self._push(ticket)
        self._issue()
        return ticket

    def promote(self, ticket: Ticket, priority: Priority) -> None:
        """Makes `ticket` more urgent; nothing happens where it already is, or has been issued."""
        if priority >= ticket.priority:
            return
        ticket.priority = priority
        if ticket._blocks:
            self._push(ticket)
            self._issue()

    def cancel(self, ticket: Ticket) -> bool:
        """Drops what has not been issued of `ticket`; `on_done` follows when the rest has arrived,
        perhaps before this returns. False: all is issued, it will be DONE."""
        if not ticket._blocks:
            return False
        ticket.state = TicketState.CANCELLED
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

    def arrived(self, ticket: Ticket, num_bytes: int, error: Exception | None = None) -> None:
        """A block that was sent is there, or has failed."""
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

    def _push(self, ticket: Ticket) -> None:
        self._submitted += 1
        heapq.heappush(self._heap, (ticket.priority, self._submitted, ticket))

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
            block = ticket._blocks.pop()
            ticket.state = TicketState.STARTED
            self._blocks_in_flight += 1
            self._bytes_in_flight += block.num_bytes
            self._send(ticket, block)
        self._on_issue(len(self._heap), self._bytes_in_flight)

    def _end(self, ticket: Ticket) -> None:
        if ticket.state is not TicketState.CANCELLED:
            ticket.state = TicketState.DONE
        ticket._on_done()
        self.changed.notify_all()
