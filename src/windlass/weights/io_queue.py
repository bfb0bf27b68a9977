"""A priority queue for each route. Cuts what is to be moved into blocks, keeps a few in flight and
always issues the most urgent block next, so that a demand overtakes speculation block by block.
Decides only: who derives from it moves the blocks, or has a clock pretend to. Knows bytes, not
weights."""

import heapq
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from enum import Enum, IntEnum
from typing import Any, Generic, Protocol, Self, TypeVar

from windlass.ids import DISK, DISK_TO_HOST, Route
from windlass.units import MIB

# Direct reads of 1, 4, 16 MiB by 4 threads ran at 1.7, 1.7, 1.8 GB/s (virtual disk, 2 cores busy
# with other work, 2026-11-22). Smaller blocks cost more interpreter time per byte, larger ones make
# a demand wait longer for what is in flight.
BLOCK_BYTES = 4 * MIB
# Of speculation, which is given up at the border of a block as soon as routing is known: whole
# experts that cannot be given up lose up to 6 % of the speed where the link binds (by simulation).
SPECULATIVE_BYTES = 1 * MIB


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


class Movable(Protocol):
    """Bytes that are to be moved along a route."""

    @property
    def num_bytes(self) -> int: ...

    def part(self, begin: int, num_bytes: int) -> Self:
        """`num_bytes` of it from `begin` on."""
        ...


B = TypeVar("B", bound=Movable)


class Listener(Protocol):
    """Whoever has more to submit."""

    def pump(self) -> None:
        """A block has arrived: there may be room on its route."""
        ...


@dataclass(frozen=True, slots=True)
class Link:
    """What a route bears: blocks in flight at once, of speculation half as many (a demand waits for
    what is in flight), and the most bytes of one."""

    depth: int
    block_bytes: int = BLOCK_BYTES
    speculative_bytes: int = SPECULATIVE_BYTES

    def depth_of(self, priority: Priority) -> int:
        """Blocks in flight, at which none of this priority is added."""
        return max(1, self.depth // 2) if priority is Priority.SPECULATIVE else self.depth

    def block_of(self, priority: Priority) -> int:
        """Most bytes of a block."""
        if priority is not Priority.SPECULATIVE:
            return self.block_bytes
        return min(self.speculative_bytes, self.block_bytes)


class Ticket(Generic[B]):
    """Blocks under way on one route. Changed by its queue only."""

    __slots__ = (
        "route", "priority", "state", "num_bytes", "_blocks", "_left", "_on_done", "_is_reserved",
    )  # fmt: skip

    def __init__(
        self, route: Route, priority: Priority, blocks: list[B], on_done: Callable[[], None]
    ) -> None:
        self.route = route
        self.priority = priority
        self.state = TicketState.QUEUED
        self._on_done = on_done
        self._fill(blocks)

    def _fill(self, blocks: list[B]) -> None:
        self.num_bytes = sum([block.num_bytes for block in blocks])
        self._blocks = blocks[::-1]  # not yet issued; the next is last
        self._left = len(blocks)  # not yet arrived
        self._is_reserved = not blocks  # where its bytes come from is not known yet


class _Line(Generic[B]):
    """What waits for one route, and what is on it."""

    def __init__(self, link: Link) -> None:
        self.link = link
        self.num_arrived = self.bytes_arrived = 0
        self.blocks_in_flight = self.bytes_in_flight = 0
        self._heap: list[tuple[int, int, Ticket[B]]] = []
        self._pushed = 0
        self._depths = [link.depth_of(priority) for priority in Priority]
        self._steps = [link.block_of(priority) for priority in Priority]

    def is_full(self, priority: Priority) -> bool:
        """Whether nothing of `priority` may be sent now."""
        return self.blocks_in_flight >= self._depths[priority]

    @property
    def num_queued(self) -> int:
        return len(self._heap)

    def push(self, ticket: Ticket[B]) -> None:
        self._pushed += 1
        heapq.heappush(self._heap, (ticket.priority, self._pushed, ticket))

    def head(self) -> Ticket[B] | None:
        """The most urgent ticket with blocks to issue; drops entries that have none left. (Of a
        promoted ticket, the old entry comes up only after the new one, when it has none left.)"""
        while self._heap:
            ticket = self._heap[0][2]
            if ticket._blocks:
                return ticket
            heapq.heappop(self._heap)
        return None

    def has_room(self, priority: Priority) -> bool:
        head = self.head()
        if head is not None:
            return head.priority > priority
        return priority == Priority.DEMAND or not self.is_full(priority)

    def cut(self, pieces: Sequence[B], priority: Priority) -> list[B]:
        step = self._steps[priority]
        if all([piece.num_bytes <= step for piece in pieces]):
            return list(pieces)
        return [
            piece.part(i, min(step, piece.num_bytes - i))
            for piece in pieces
            for i in range(0, piece.num_bytes, step)
        ]

    def sent(self, num_bytes: int) -> None:
        self.blocks_in_flight += 1
        self.bytes_in_flight += num_bytes

    def ended(self, num_bytes: int, *, is_error: bool) -> None:
        self.blocks_in_flight -= 1
        self.bytes_in_flight -= num_bytes
        if not is_error:
            self.num_arrived += 1
            self.bytes_arrived += num_bytes

    def clear(self) -> None:
        self._heap.clear()

    def check(self) -> None:
        assert 0 <= self.blocks_in_flight <= self.link.depth, self.blocks_in_flight
        assert (self.blocks_in_flight == 0) == (self.bytes_in_flight == 0), self.bytes_in_flight


class IoQueue(ABC, Generic[B]):
    """Issues blocks of each route, as many in flight as its link bears; `arrived` must follow for
    each.

    `changed` is the one lock of everything that shares this queue; all methods want it held, except
    `arrived`. Calls to others run under it, on the thread that says `arrived`: `on_done` of a
    ticket when its last block is there, listeners whenever a block has arrived. `changed` is
    notified when a ticket ends. The first error of any block ends the queue: `raise_error` raises
    it from then on, and nothing further is issued.
    """

    def __init__(self, changed: Changed, links: Mapping[Route, Link]) -> None:
        self.changed = changed
        self._lines: dict[Route, _Line[B]] = {route: _Line(link) for route, link in links.items()}
        self._listeners: list[Listener] = []
        self._error: Exception | None = None
        self._closed = False
        self._is_over = False  # failed or closed

    @abstractmethod
    def _move(self, ticket: Ticket[B], block: B) -> None:
        """Starts to move `block`. `arrived` follows."""

    def _issued(self) -> None:
        """What fits has been sent."""

    def add(self, route: Route, link: Link) -> None:
        """Serves `route` too from now on."""
        assert route not in self._lines, f"{route}: served twice"
        self._lines[route] = _Line(link)

    def block_bytes(self, route: Route) -> int:
        """Most that is moved along `route` at once."""
        return self._lines[route].link.block_bytes

    def listen(self, listener: Listener) -> None:
        """`listener` is told from now on, after those before it."""
        self._listeners.append(listener)

    @property
    def link_bytes(self) -> dict[Route, int]:
        """Of blocks that have arrived, by their route."""
        return {route: line.bytes_arrived for route, line in self._lines.items()}

    @property
    def bytes_read(self) -> int:
        """Of blocks that have arrived from disk."""
        return sum(line.bytes_arrived for line in self._from_disk())

    @property
    def num_reads(self) -> int:
        """Blocks that have arrived from disk."""
        return sum(line.num_arrived for line in self._from_disk())

    @property
    def bytes_in_flight(self) -> int:
        """On all routes."""
        return sum(line.bytes_in_flight for line in self._lines.values())

    @property
    def num_queued(self) -> int:
        """Entries that wait, on all routes."""
        return sum(line.num_queued for line in self._lines.values())

    def has_room(self, priority: Priority, route: Route = DISK_TO_HOST) -> bool:
        """Whether a ticket of `priority` would be served next on `route`: nothing as urgent waits,
        and, for anything but a demand, the link is not full with such blocks."""
        return not self._is_over and self._lines[route].has_room(priority)

    def enqueue(
        self,
        route: Route,
        pieces: Sequence[B],
        *,
        priority: Priority,
        on_done: Callable[[], None],
    ) -> Ticket[B]:
        """Queues `pieces` and starts what fits. `on_done`: tickets of one queue belong to different
        owners (parts, rows of tables), so a single listener could not tell whose has ended."""
        assert not self._closed, "submitted to a closed queue"
        line = self._lines[route]
        ticket = Ticket(route, priority, line.cut(pieces, priority), on_done)
        self._start(ticket, line)
        return ticket

    def reserve(
        self, route: Route, *, priority: Priority, on_done: Callable[[], None]
    ) -> Ticket[B]:
        """A ticket for pieces that are named later, by `supply`: until then it takes no room, and
        ends at once where it is cancelled."""
        return Ticket(route, priority, [], on_done)

    def supply(self, ticket: Ticket[B], pieces: Sequence[B]) -> None:
        """Queues the `pieces` of a ticket that was reserved, and not cancelled."""
        assert ticket._is_reserved, "supplied twice"
        line = self._lines[ticket.route]
        ticket._fill(line.cut(pieces, ticket.priority))
        self._start(ticket, line)

    def promote(self, ticket: Ticket[B], priority: Priority) -> None:
        """Makes `ticket` more urgent; nothing happens where it already is, or has been issued."""
        if priority >= ticket.priority:
            return
        ticket.priority = priority
        if ticket._blocks:
            line = self._lines[ticket.route]
            line.push(ticket)
            self._issue(line)

    def cancel(self, ticket: Ticket[B]) -> bool:
        """Drops what has not been issued of `ticket`; `on_done` follows when the rest has arrived,
        perhaps before this returns. False: all is issued, it will be DONE."""
        if not ticket._blocks and not ticket._is_reserved:
            return False
        ticket.state = TicketState.CANCELLED
        ticket._is_reserved = False
        ticket._left -= len(ticket._blocks)
        ticket._blocks.clear()
        if not ticket._left:
            self._end(ticket)
        return True

    def raise_error(self) -> None:
        """Raises the first error of any block, the same to everyone who asks."""
        if self._error is not None:
            raise self._error
        if self._closed:
            raise RuntimeError("the transfer queue is closed")

    def wait(self, is_over: Callable[[], bool]) -> None:
        """Blocks until `is_over()`; raises the first error of any block instead."""
        while not is_over():
            self.raise_error()
            self.changed.wait()

    def arrived(self, ticket: Ticket[B], num_bytes: int, error: Exception | None = None) -> None:
        """A block that was sent is there, or has failed."""
        with self.changed:
            line = self._lines[ticket.route]
            line.ended(num_bytes, is_error=error is not None)
            try:
                if error is not None:
                    raise error
                ticket._left -= 1
                if not ticket._left:
                    self._end(ticket)
                self._issue(line)
                for listener in self._listeners:
                    listener.pump()
            except Exception as caught:  # noqa: BLE001  thread boundary: raised at every waiter
                self._error = self._error or caught
                self._is_over = True
            if self._is_over:
                self.changed.notify_all()

    def check(self) -> None:
        """What is counted in flight is what the tickets miss."""
        for line in self._lines.values():
            line.check()
            head = line.head()
            if not self._is_over and head is not None:
                assert line.is_full(head.priority), "a block waits although the link has room"

    def _from_disk(self) -> list[_Line[B]]:
        return [line for route, line in self._lines.items() if route.source == DISK]

    def _start(self, ticket: Ticket[B], line: _Line[B]) -> None:
        """Queues what is new, and starts what fits."""
        if line.num_queued:
            line.push(ticket)
            self._issue(line)
        else:
            self._issue_of(ticket, line)
            if ticket._blocks:
                line.push(ticket)
            self._issued()

    def _issue(self, line: _Line[B]) -> None:
        while (ticket := line.head()) is not None:
            self._issue_of(ticket, line)
            if ticket._blocks:
                break
        self._issued()

    def _issue_of(self, ticket: Ticket[B], line: _Line[B]) -> None:
        """Blocks of the most urgent ticket, as many as fit."""
        while ticket._blocks and not self._is_over and not line.is_full(ticket.priority):
            block = ticket._blocks.pop()
            ticket.state = TicketState.STARTED
            line.sent(block.num_bytes)
            self._move(ticket, block)

    def _end(self, ticket: Ticket[B]) -> None:
        if ticket.state is not TicketState.CANCELLED:
            ticket.state = TicketState.DONE
        ticket._on_done()
        self.changed.notify_all()
