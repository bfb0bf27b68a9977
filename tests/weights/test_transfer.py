"""The transfer queue: order, limits, promotion, cancellation, errors, and no thread left behind."""

import threading
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fakes import FakeDevice, FakeSource
from windlass.checkpoint.part_reads import Read
from windlass.device.base import Copy, DeviceMemory, FileRange
from windlass.device.cpu import CpuDevice
from windlass.errors import CheckpointError
from windlass.ids import DISK_TO_HOST, HOST, Route
from windlass.units import MIB
from windlass.weights.io_queue import Priority, Ticket, TicketState
from windlass.weights.transfer import Carrier, TransferQueue, block_bytes_of, file_copies

PAGE = 4096
DATA = torch.arange(64 * 1024, dtype=torch.float32)  # 64 pages


SOURCE = FakeSource({"data": DATA})


def make_queue(device, depth: int | None = None) -> TransferQueue:
    return TransferQueue({DISK_TO_HOST: Carrier(device, PAGE, depth)})


def put(
    queue: TransferQueue, device, label: str, priority: Priority, *, pages: int = 1, first: int = 0
) -> tuple[Ticket[Copy], torch.Tensor, list[str]]:
    into = device.allocate(pages * PAGE)
    read = Read("fake", first * PAGE, pages * PAGE, 0)
    ends: list[str] = []
    with queue.changed:
        ticket = queue.submit(
            file_copies(SOURCE, [read], into, label), priority=priority,
            on_done=lambda: ends.append(label),
        )  # fmt: skip
    return ticket, into.data, ends


def test_the_most_urgent_block_goes_next_and_equals_in_order():
    device = FakeDevice(manual=True)
    queue = make_queue(device, depth=1)
    for label, priority in [
        ("guess", Priority.SPECULATIVE), ("guess 2", Priority.SPECULATIVE), ("soon", Priority.SOON),
        ("now", Priority.DEMAND), ("now 2", Priority.DEMAND),
    ]:  # fmt: skip
        put(queue, device, label, priority, pages=2)
    device.complete_all()
    order = [copy.label for copy in device.submitted]
    expected = ["guess", "now", "now", "now 2", "now 2", "soon", "soon", "guess", "guess 2"]
    assert order == [*expected, "guess 2"]


def test_no_more_blocks_than_the_depth_are_in_flight():
    device = FakeDevice(manual=True)
    queue = make_queue(device, depth=3)
    ticket, into, ends = put(queue, device, "a", Priority.DEMAND, pages=8)
    while device.pending:
        assert len(device.pending) <= 3
        assert queue.bytes_in_flight == len(device.pending) * PAGE
        assert not ends
        device.complete()
        queue.check()
    assert ends == ["a"] and ticket.state is TicketState.DONE
    assert torch.equal(into.view(torch.float32), DATA[: 8 * 1024])
    assert queue.bytes_read == 8 * PAGE and queue.num_reads == 8


def test_promotion_moves_what_is_left():
    device = FakeDevice(manual=True)
    queue = make_queue(device, depth=1)
    slow, _, _ = put(queue, device, "slow", Priority.SPECULATIVE, pages=3)
    put(queue, device, "other", Priority.SOON, pages=1)
    with queue.changed:
        queue.promote(slow, Priority.DEMAND)
        queue.promote(slow, Priority.SPECULATIVE)  # never downwards
    device.complete_all()
    assert [copy.label for copy in device.submitted] == ["slow", "slow", "slow", "other"]


def test_cancelled_speculation_is_not_read():
    device = FakeDevice(manual=True)
    queue = make_queue(device, depth=1)
    put(queue, device, "first", Priority.DEMAND)
    queued, _, ends = put(queue, device, "queued", Priority.SPECULATIVE)
    with queue.changed:
        assert queue.cancel(queued)
        assert not queue.cancel(queued)
    assert queued.state is TicketState.CANCELLED and ends == ["queued"]
    device.complete_all()
    assert [copy.label for copy in device.submitted] == ["first"]


def test_cancelling_what_has_begun_drops_the_rest_and_waits_for_the_block_in_flight():
    device = FakeDevice(manual=True)
    queue = make_queue(device, depth=1)
    begun, _, ends = put(queue, device, "begun", Priority.SPECULATIVE, pages=5)
    with queue.changed:
        assert queue.cancel(begun)
    assert not ends, "the block in flight still writes"
    device.complete_all()
    assert ends == ["begun"] and begun.state is TicketState.CANCELLED
    assert len(device.submitted) == 1
    whole, _, _ = put(queue, device, "issued", Priority.DEMAND)
    with queue.changed:
        assert not queue.cancel(whole)
    device.complete_all()
    assert whole.state is TicketState.DONE


def test_room_is_told_by_urgency():
    device = FakeDevice(manual=True)
    queue = make_queue(device, depth=2)
    assert all(queue.has_room(priority) for priority in Priority)
    put(queue, device, "a", Priority.SOON, pages=3)  # one block waits
    assert [queue.has_room(priority) for priority in Priority] == [True, False, False]
    put(queue, device, "b", Priority.DEMAND)
    assert not any(queue.has_room(priority) for priority in Priority)
    device.complete_all()
    assert all(queue.has_room(priority) for priority in Priority)


def test_the_first_error_ends_everything():
    device = FakeDevice(manual=True)
    queue = make_queue(device, depth=2)
    _, _, ends = put(queue, device, "a", Priority.DEMAND, pages=4)
    failure = CheckpointError("shard: truncated")
    device.complete(0, error=failure)
    device.complete(0, error=CheckpointError("a later one"))
    assert not device.pending and not ends
    for _ in range(2):
        with pytest.raises(CheckpointError) as caught:
            queue.wait(lambda: bool(ends))
        assert caught.value is failure
    assert not queue.has_room(Priority.DEMAND)
    queue.close()


def test_blocks_take_300_us_of_their_link_within_limits():
    rates = (1e8, 3e9, 6e9, 12e9, 25e9, 50e9, 900e9)
    assert [block_bytes_of(rate) // MIB for rate in rates] == [1, 1, 2, 4, 8, 16, 16]
    device = FakeDevice(manual=True, num_lanes=1)
    link = Carrier(device, block_bytes_of(50e9)).link
    assert (link.depth, link.block_bytes, link.speculative_bytes) == (2, 16 * MIB, 4 * MIB)
    assert Carrier(device).link.speculative_bytes == MIB


def test_closing_waits_for_blocks_in_flight_and_releases_waiters():
    device = FakeDevice(seed=3, delay_s=0.02)
    queue = make_queue(device, depth=2)
    _, _, ends = put(queue, device, "a", Priority.DEMAND, pages=60)
    problems: list[str] = []

    def wait() -> None:
        with queue.changed:
            try:
                queue.wait(lambda: bool(ends))
            except RuntimeError as error:
                problems.append(str(error))

    thread = threading.Thread(target=wait)
    thread.start()
    queue.close()
    thread.join(120)
    assert problems == ["the transfer queue is closed"]
    assert not device.pending
    device.close()


@settings(max_examples=40, deadline=None)
@given(
    jobs=st.lists(st.tuples(st.sampled_from(Priority), st.integers(1, 5), st.integers(0, 59))),
    depth=st.integers(1, 6),
    seed=st.integers(0, 99),
)
def test_whatever_the_order_every_byte_arrives_once(jobs, depth: int, seed: int):
    device = FakeDevice(seed=seed, manual=True)
    queue = make_queue(device, depth=depth)
    tickets = []
    for i, (priority, pages, first) in enumerate(jobs):
        made = put(queue, device, str(i), priority, pages=pages, first=first)
        tickets.append((*made, first, str(i)))
        if seed % 2 and device.pending:
            device.complete()
    with queue.changed:
        for ticket, *_ in tickets[::3]:
            queue.promote(ticket, Priority.DEMAND)
        for ticket, *_ in tickets[1::4]:
            queue.cancel(ticket)
        queue.check()
    device.complete_all()
    for ticket, into, ends, first, label in tickets:
        assert ends == [label]
        if ticket.state is TicketState.DONE:
            values = into.view(torch.float32)
            assert torch.equal(values, DATA[first * 1024 : first * 1024 + values.numel()])
        else:
            assert ticket.state is TicketState.CANCELLED
    queue.check()
    assert queue.bytes_in_flight == 0


TO_DEVICE = Route(HOST, "device")


def send(queue: TransferQueue, source: DeviceMemory, device, label: str, priority: Priority):
    """A copy of all of `source` into new memory of `device`."""
    into = device.allocate(source.num_bytes)
    ends: list[str] = []
    with queue.changed:
        ticket = queue.submit(
            [Copy(source, into, label)], priority=priority, on_done=lambda: ends.append(label)
        )
    return ticket, into.data, ends


def test_each_route_has_its_own_order_depth_and_device():
    host, device = FakeDevice(manual=True), FakeDevice(manual=True, name="device")
    carriers = {DISK_TO_HOST: Carrier(host, PAGE, 2), TO_DEVICE: Carrier(device, 2 * PAGE, 1)}
    queue = TransferQueue(carriers)
    ready = host.allocate(4 * PAGE)
    ready.data.view(torch.float32).copy_(DATA[: 4 * 1024])
    put(queue, host, "guess", Priority.SOON, pages=3)
    send(queue, ready, device, "guess", Priority.SOON)
    _, there, over = send(queue, ready, device, "now", Priority.DEMAND)
    assert host.pending == ["guess"] * 2 and device.pending == ["guess"]
    with queue.changed:
        rooms = [[queue.has_room(p, route) for p in Priority] for route in carriers]
    assert rooms == [[True, False, False], [False, False, False]]
    device.complete_all()
    assert [copy.label for copy in device.submitted] == ["guess", "now", "now", "guess"]
    assert [copy.num_bytes for copy in device.submitted] == [2 * PAGE] * 4
    assert over == ["now"] and torch.equal(there.view(torch.float32), DATA[: 4 * 1024])
    assert host.pending == ["guess"] * 2, "the other route has not moved"
    queue.check()
    host.complete_all()
    assert queue.bytes_read == 3 * PAGE, "of what came from disk"
    assert queue.bytes_in_flight == 0


def test_a_part_goes_from_its_file_over_the_host_to_a_device():
    """The end of one ticket begins the next: the callbacks come in that order, under one lock."""
    host, device = FakeDevice(seed=1), FakeDevice(seed=2, name="device")
    queue = TransferQueue({DISK_TO_HOST: Carrier(host, PAGE), TO_DEVICE: Carrier(device, PAGE)})
    staged, there = host.allocate(6 * PAGE), device.allocate(6 * PAGE)
    order: list[str] = []

    def on_host() -> None:
        order.append("host")
        onward = [Copy(staged, there, "onward")]
        queue.submit(onward, priority=Priority.DEMAND, on_done=lambda: order.append("device"))

    copies = file_copies(SOURCE, [Read("fake", 7 * PAGE, 6 * PAGE, 0)], staged, "part")
    with queue.changed:
        queue.submit(copies, priority=Priority.DEMAND, on_done=on_host)
        queue.wait(lambda: len(order) == 2)
        queue.check()
    assert order == ["host", "device"]
    assert torch.equal(there.data.view(torch.float32), DATA[7 * 1024 : 13 * 1024])
    queue.close()
    for one in (host, device):
        one.close()


def test_an_error_on_one_route_ends_the_others():
    host, device = FakeDevice(manual=True), FakeDevice(manual=True, name="device")
    queue = TransferQueue({DISK_TO_HOST: Carrier(host, PAGE), TO_DEVICE: Carrier(device, PAGE, 1)})
    put(queue, host, "a", Priority.DEMAND)
    _, _, over = send(queue, host.allocate(3 * PAGE), device, "b", Priority.DEMAND)
    host.complete(error=CheckpointError("shard: truncated"))
    device.complete()
    assert not device.pending and not over
    with queue.changed, pytest.raises(CheckpointError, match="truncated"):
        queue.wait(lambda: bool(over))


def test_a_cpu_copies_within_its_memory():
    device = CpuDevice(2)
    source, into = device.allocate(PAGE), device.allocate(PAGE)
    source.data.fill_(7)
    errors: list[Exception | None] = []
    device.submit(Copy(source, into, "within"), errors.append)
    device.close()
    assert errors == [None] and int(into.data.sum()) == 7 * PAGE


def test_one_woken_thread_wakes_the_next():
    """Copies that were submitted together are made by all threads, and each once."""
    gate = threading.Barrier(4, timeout=60)  # nobody goes on before all four read

    class Together(FakeSource):
        def read(self, file: str, offset: int, into: memoryview) -> None:
            gate.wait()
            super().read(file, offset, into)

    device = CpuDevice(4)
    into = device.allocate(8 * PAGE)
    source = Together({"data": DATA})
    for _ in range(3):
        errors: list[Exception | None] = []
        for i in range(8):
            copy = Copy(FileRange(source, "fake", i * PAGE, PAGE), into.part(i * PAGE, PAGE), "x")
            device.submit(copy, errors.append)
        device.synchronize()
        assert errors == [None] * 8
        assert torch.equal(into.data.view(torch.float32), DATA[: 8 * 1024])
        into.data.zero_()
    assert device.busy_s > 0
    device.close()


def test_reader_threads_end_with_the_device_and_a_bug_in_a_source_is_reported():
    class Broken(FakeSource):
        def read(self, file: str, offset: int, into: memoryview) -> None:
            raise ZeroDivisionError("source")

    before = threading.active_count()
    device = CpuDevice(3)
    queue = make_queue(device)
    reads = [Read("fake", 0, PAGE, 0)]
    copies = file_copies(Broken({"data": DATA}), reads, device.allocate(PAGE), "a")
    ends: list[str] = []
    with queue.changed:
        queue.submit(copies, priority=Priority.DEMAND, on_done=lambda: ends.append("a"))
    with pytest.raises(ZeroDivisionError, match="source"), queue.changed:
        queue.wait(lambda: bool(ends))
    device.synchronize()
    queue.close()
    device.close()
    device.close()
    assert threading.active_count() == before
    with pytest.raises(RuntimeError, match="closed device"):
        put(make_queue(device), device, "late", Priority.DEMAND)


def test_cpu_memory_is_aligned_counted_and_freed():
    device = CpuDevice(1)
    memory = device.allocate(5000).data
    assert memory.numel() == 5000 and memory.dtype == torch.uint8
    assert memory.data_ptr() % PAGE == 0
    assert device.allocated_bytes == 8192
    memory.fill_(7)
    assert int(memory.sum()) == 35000
    before = shared_kib()
    big = device.allocate(16 << 20).data.fill_(1)
    assert big.numel() and shared_kib() - before < 1024, (
        "counted as shared, not as this process's own"
    )
    device.close()


def shared_kib() -> int:
    status = Path("/proc/self/status").read_text()
    return int(status.split("RssShmem:")[1].split()[0])
