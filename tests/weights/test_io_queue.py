"""The queue by itself, without devices: whatever is asked of it and in whichever order blocks
arrive or fail, what it promises holds after every step."""

from dataclasses import dataclass, field
from typing import NamedTuple

import pytest
from hypothesis import note, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from windlass.ids import DISK_TO_HOST, HOST, Route
from windlass.weights.io_queue import IoQueue, Link, Priority, Ticket, TicketState

TO_DEVICE = Route(HOST, "device")
ROUTES = (DISK_TO_HOST, TO_DEVICE)
BLOCK = 10
SMALL = 4  # of speculation


class Bytes(NamedTuple):
    num_bytes: int

    def part(self, begin: int, num_bytes: int) -> "Bytes":
        assert 0 <= begin and 0 < num_bytes and begin + num_bytes <= self.num_bytes
        return Bytes(num_bytes)


class NoLock:
    """The lock of a single thread, which nobody may wait for."""

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        pass

    def wait(self):
        raise AssertionError("nobody else is there to change anything")

    def notify_all(self):
        pass


@dataclass(eq=False)
class Job:
    """A ticket as whoever submitted it knows it."""

    route: Route
    sizes: tuple[int, ...]
    priority: Priority
    ticket: Ticket | None = None
    is_cancelled: bool = False
    block: int = BLOCK  # most bytes of one, as it was submitted
    ends: int = 0
    is_reserved: bool = False
    sent: list[int] = field(default_factory=list)
    arrived: int = 0

    @property
    def num_blocks(self) -> int:
        return sum(-(-size // self.block) for size in self.sizes)

    @property
    def num_waiting(self) -> int:
        nothing = self.is_cancelled or self.is_reserved
        return 0 if nothing else self.num_blocks - len(self.sent)


def block_of(priority: Priority) -> int:
    return SMALL if priority == Priority.SPECULATIVE else BLOCK


def depth_of(link: Link, priority: Priority) -> int:
    """Blocks of this kind are not added to as many."""
    return max(1, link.depth // 2) if priority == Priority.SPECULATIVE else link.depth


class Moves(IoQueue[Bytes]):
    """Notes every block, and that it was the right one to send."""

    def __init__(self, links):
        super().__init__(NoLock(), links)
        self.links = links
        self.jobs: list[Job] = []
        self.in_flight: list[tuple[Job, int]] = []
        self.is_over = False
        self.pumped = 0

    def pump(self):
        self.pumped += 1

    def job_of(self, ticket: Ticket) -> Job:
        for job in self.jobs:
            if job.ticket in (ticket, None):  # None: it is being submitted
                job.ticket = ticket
                return job
        raise AssertionError("a ticket that nobody submitted")

    def _move(self, ticket, block):
        job = self.job_of(ticket)
        assert not self.is_over, "sent after an error or the end"
        assert not job.is_cancelled, "sent after it was cancelled"
        assert block.num_bytes <= job.block
        urgent = [j for j in self.jobs if j.route == job.route and j.num_waiting]
        assert job in urgent, "more blocks than it has"
        assert job.priority == min(j.priority for j in urgent), "something more urgent waits"
        job.sent.append(block.num_bytes)
        self.in_flight.append((job, block.num_bytes))


class QueueMachine(RuleBasedStateMachine):
    @initialize(depths=st.tuples(st.integers(1, 4), st.integers(1, 4)))
    def begin(self, depths):
        links = zip(ROUTES, depths, strict=True)
        self.queue = Moves({route: Link(depth, BLOCK, SMALL) for route, depth in links})
        self.queue.listen(self.queue)
        self.bytes = dict.fromkeys(ROUTES, 0)
        self.error = None
        self.num_arrived = 0

    @precondition(lambda self: not self.queue._closed)
    @rule(
        route=st.sampled_from(ROUTES),
        sizes=st.lists(st.integers(1, 5 * BLOCK), min_size=1, max_size=3),
        priority=st.sampled_from(Priority),
    )
    def submit(self, route, sizes, priority):
        job = Job(route, tuple(sizes), priority, block=block_of(priority))
        self.queue.jobs.append(job)

        def ended():
            job.ends += 1

        pieces = [Bytes(size) for size in sizes]
        job.ticket = self.queue.enqueue(route, pieces, priority=priority, on_done=ended)
        assert job.ticket.num_bytes == sum(sizes)

    @precondition(lambda self: not self.queue._closed)
    @rule(
        route=st.sampled_from(ROUTES),
        sizes=st.lists(st.integers(1, 5 * BLOCK), min_size=1, max_size=3),
        priority=st.sampled_from(Priority),
    )
    def reserve(self, route, sizes, priority):
        """Of a ticket that is named before its bytes are there."""
        job = Job(route, tuple(sizes), priority, is_reserved=True)
        self.queue.jobs.append(job)

        def ended():
            job.ends += 1

        job.ticket = self.queue.reserve(route, priority=priority, on_done=ended)

    @precondition(lambda self: any(j.is_reserved for j in self.queue.jobs))
    @rule(data=st.data())
    def supply(self, data):
        job = data.draw(st.sampled_from([j for j in self.queue.jobs if j.is_reserved]))
        job.is_reserved, job.block = False, block_of(job.priority)
        self.queue.supply(job.ticket, [Bytes(size) for size in job.sizes])

    @precondition(lambda self: self.queue.jobs)
    @rule(data=st.data(), priority=st.sampled_from(Priority))
    def promote(self, data, priority):
        job = data.draw(st.sampled_from(self.queue.jobs))
        job.priority = min(job.priority, priority)
        self.queue.promote(job.ticket, priority)
        assert job.ticket.priority == job.priority

    @precondition(lambda self: self.queue.jobs)
    @rule(data=st.data())
    def cancel(self, data):
        job = data.draw(st.sampled_from(self.queue.jobs))
        had_waiting = job.num_waiting > 0 or job.is_reserved
        job.is_reserved = False
        job.is_cancelled |= had_waiting
        assert self.queue.cancel(job.ticket) == had_waiting

    @precondition(lambda self: self.queue.in_flight)
    @rule(data=st.data())
    def arrive(self, data):
        self._ended(data, None)

    @precondition(lambda self: self.queue.in_flight and self.num_arrived > 4)
    @rule(data=st.data(), is_rare=st.integers(0, 3))
    def fail(self, data, is_rare):
        self._ended(data, None if is_rare else OSError(f"error {self.num_arrived}"))

    def _ended(self, data, error):
        job, num_bytes = block = data.draw(st.sampled_from(self.queue.in_flight))
        self.queue.in_flight.remove(block)
        self.num_arrived += 1
        pumped = self.queue.pumped
        if error is None:
            job.arrived += 1
            self.bytes[job.route] += num_bytes
        else:
            self.queue.is_over = True
            self.error = self.error or error
        self.queue.arrived(job.ticket, num_bytes, error)
        assert self.queue.pumped == pumped + (error is None)

    @precondition(lambda self: self.num_arrived > 8)
    @rule(is_rare=st.integers(0, 3))
    def close(self, is_rare):
        if not is_rare:
            self.queue._closed = self.queue._is_over = self.queue.is_over = True

    @invariant()
    def promises(self):
        queue = self.queue
        queue.check()
        for route, link in queue.links.items():
            flying = [num for job, num in queue.in_flight if job.route == route]
            waiting = [job.priority for job in queue.jobs if job.route == route and job.num_waiting]
            assert len(flying) <= link.depth
            if not queue.is_over and waiting:
                assert len(flying) >= depth_of(link, min(waiting)), "the link idles"
            for priority in Priority:
                first = not waiting or priority < min(waiting)
                fits = priority == Priority.DEMAND or len(flying) < depth_of(link, priority)
                fits = fits or bool(waiting)
                expected = bool(first and fits) and not queue.is_over
                assert queue.has_room(priority, route) == expected
        assert queue.bytes_in_flight == sum(num for _, num in queue.in_flight)
        assert queue.bytes_read == self.bytes[DISK_TO_HOST]
        for job in queue.jobs:
            self._check_job(job)
        if self.error is not None:
            with pytest.raises(OSError, match=str(self.error)):
                queue.raise_error()

    def _check_job(self, job):
        """It ends once, when all that was sent has arrived and nothing is left to send."""
        is_over = not job.is_reserved and not job.num_waiting and job.arrived == len(job.sent)
        assert job.ends == is_over
        if job.is_cancelled:
            assert job.ticket.state is TicketState.CANCELLED
        elif is_over:
            assert job.ticket.state is TicketState.DONE
            assert sum(job.sent) == sum(job.sizes)
        else:
            begun = TicketState.STARTED if job.sent else TicketState.QUEUED
            assert job.ticket.state is begun

    def teardown(self):
        """All that is in flight arrives; what has not failed is over then."""
        queue = getattr(self, "queue", None)
        while queue is not None and queue.in_flight:
            job, num_bytes = queue.in_flight.pop()
            job.arrived += 1
            self.bytes[job.route] += num_bytes
            queue.arrived(job.ticket, num_bytes)
            self.promises()
        if queue is not None and not queue.is_over:
            assert all(job.ends == 1 for job in queue.jobs if not job.is_reserved)
            note(f"{len(queue.jobs)} tickets")


def test_whatever_is_asked_the_queue_keeps_its_promises():
    some = settings(max_examples=60, stateful_step_count=40, deadline=None)
    run_state_machine_as_test(QueueMachine, settings=some)
