"""Copies that a device makes by itself, and who is told of their end."""

import json
import threading

import pytest
import torch

from windlass.device.base import Copy
from windlass.device.cpu import CpuDevice
from windlass.device.lane import Lane
from windlass.device.streams import OVER, Event, HostStreams
from windlass.trace import Tracer


class Ends:
    """An `Event` that comes when the test says so, perhaps with an error."""

    def __init__(self, error: Exception | None = None) -> None:
        self.over = threading.Event()
        self._error = error

    def synchronize(self) -> None:
        self.over.wait()
        if self._error is not None:
            raise self._error


class Noting:
    """A `Stream` that hands out given events and notes what it waits for."""

    def __init__(self, events: list[Ends]) -> None:
        self._events = events
        self.waits: list[object] = []

    def record(self) -> Ends:
        return self._events.pop(0)

    def wait(self, event: object) -> None:
        self.waits.append(event)


def lane_with(*events: Ends) -> tuple[Lane, Noting]:
    streams = HostStreams()
    streams.down = Noting(list(events))  # type: ignore[misc, assignment]
    return Lane(streams), streams.down  # type: ignore[return-value]


def copy_of(device: CpuDevice, number: int, *, last_use: Event = OVER) -> Copy:
    source, into = device.allocate(4096), device.allocate(4096)
    source.data.fill_(number)
    into.last_use = last_use
    return Copy(source, into, f"copy {number}")


@pytest.fixture
def device():
    made = CpuDevice(1)
    yield made
    made.close()


def test_the_thread_of_a_lane_tells_of_each_copy_when_its_event_has_come(device):
    failure, last_use = RuntimeError("the device has failed"), Ends()
    events = Ends(), Ends(failure)
    lane, down = lane_with(*events)
    thread = threading.Thread(target=lane.serve, daemon=True)
    thread.start()
    told, both = [], threading.Semaphore(0)

    def done(error: Exception | None) -> None:
        told.append(error)
        both.release()

    copies = [copy_of(device, 1), copy_of(device, 2, last_use=last_use)]
    for copy in copies:
        lane.submit(copy, done)
    assert down.waits == [OVER, last_use] and not told
    events[0].over.set()
    assert both.acquire(timeout=60) and told == [None]
    events[1].over.set()
    assert both.acquire(timeout=60) and told == [None, failure]
    lane.close()
    thread.join(timeout=60)
    assert not thread.is_alive()
    assert [int(copy.destination.data[0]) for copy in copies] == [1, 2]


def test_a_part_of_a_copy_waits_as_the_whole_does(device):
    last_use = Ends()
    whole = copy_of(device, 1, last_use=last_use)
    assert whole.part(1024, 512).destination.last_use is last_use
    assert copy_of(device, 1).part(0, 4096).destination.last_use is OVER


def test_streams_of_the_host_cost_and_change_nothing():
    streams, x = HostStreams(), torch.ones(3)
    with streams.on(streams.up):
        assert streams.on_host(x, x) == (x, x) and streams.on_host(x)[0] is x
    event = streams.compute.record()
    streams.down.wait(event)
    event.synchronize()
    assert event is OVER


def test_no_copy_reaches_from_one_step_of_the_host_into_the_next(device):
    lane = Lane(HostStreams(), step_bytes=4096)
    source, into = device.allocate(20000), device.allocate(20000)
    source.data.copy_(torch.arange(20000) % 251)
    for begin, size, cuts in (
        (0, 4096, [4096]), (4096, 100, [100]), (3000, 6000, [1096, 4096, 808]), (4095, 2, [1, 1]),
    ):  # fmt: skip
        parts = list(lane._steps(source.part(begin, size), into.part(64, size)))
        assert [one.num_bytes for one, _ in parts] == cuts
        assert len({one.begin // 4096 for one, _ in parts}) == len(cuts)
        told: list[Exception | None] = []
        lane.submit(Copy(source.part(begin, size), into.part(64, size), "part"), told.append)
        assert lane.arrive() and told == [None]
        assert torch.equal(into.data[64 : 64 + size], source.data[begin : begin + size])


def test_a_copy_that_cannot_be_asked_for_is_told_of_like_others(device):
    lane, down = lane_with(Ends())
    told: list[Exception | None] = []
    copy = copy_of(device, 1)
    copy.destination.num_bytes = 100
    lane.submit(copy, told.append)
    assert not told
    assert lane.arrive() and isinstance(told[0], RuntimeError)
    lane.synchronize()
    lane.close()
    with pytest.raises(RuntimeError, match="copy of copy 1 submitted to a closed device"):
        lane.submit(copy, told.append)
    assert not lane.arrive()


def test_who_waits_for_all_waits_for_what_is_told_and_the_trace_has_each(device, tmp_path):
    tracer = Tracer(tmp_path / "trace.json")
    streams = HostStreams()
    events = Ends(), Ends()
    streams.down = Noting(list(events))  # type: ignore[misc, assignment]
    lane = Lane(streams, tracer=tracer, name="to device")
    thread = threading.Thread(target=lane.serve, daemon=True)
    thread.start()
    told: list[Exception | None] = []
    for number in (1, 2):
        lane.submit(copy_of(device, number), told.append)
    for event in events:
        event.over.set()
    lane.synchronize()
    assert told == [None, None] and lane.busy_s > 0
    lane.close()
    thread.join(timeout=10)
    tracer.close()
    spans = [one for one in json.loads((tmp_path / "trace.json").read_text()) if one["ph"] == "X"]
    assert [one["name"] for one in spans] == ["copy 1", "copy 2"]
    assert spans[1]["ts"] >= spans[0]["ts"] + spans[0]["dur"] - 0.2, "one after the other"
