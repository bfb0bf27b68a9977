"""Copies on the `down` stream of a device, and who says that they are there. Knows no weights."""

import threading
import time
from collections.abc import Iterator
from queue import SimpleQueue
from typing import NamedTuple

from windlass.device.base import Copy, DeviceMemory, Done
from windlass.device.streams import Event, Streams
from windlass.trace import Tracer


class _UnderWay(NamedTuple):
    """A copy that was begun at `begin`; `end`: of its last byte."""

    copy: Copy
    end: Event
    done: Done
    begin: float


class _Failed:
    """An `Event` in place of one that could not be asked for."""

    def __init__(self, error: Exception) -> None:
        self._error = error

    def synchronize(self) -> None:
        raise self._error


class Lane:
    """Copies from memory of the host, in the order in which they are submitted, by any thread.
    A device has a thread of its own in `serve`: the host computes while copies are made, and is
    told of each when it has ended."""

    def __init__(
        self,
        streams: Streams,
        *,
        step_bytes: int | None = None,
        tracer: Tracer | None = None,
        name: str = "down",
    ) -> None:
        """`step_bytes`: the host's memory was registered in steps of so many bytes, and no copy
        may cross from one into the next. `name`: of the lane in the trace."""
        self._streams = streams
        self._step_bytes = step_bytes
        self._tracer = tracer or Tracer()
        self._name = name
        self._under_way: SimpleQueue[_UnderWay | None] = SimpleQueue()
        self._changed = threading.Condition()
        self._closed = False
        self._num_open = 0
        self._busy_s = 0.0
        self._last_end = 0.0

    @property
    def busy_s(self) -> float:
        """Seconds during which a copy was under way, of those that have ended."""
        return self._busy_s

    def submit(self, copy: Copy, done: Done) -> None:
        """See `Device.submit`."""
        into, down = copy.destination, self._streams.down
        assert isinstance(copy.source, DeviceMemory), f"{copy.label}: a device copies from memory"
        with self._changed:
            if self._closed:
                raise RuntimeError(f"copy of {copy.label} submitted to a closed device")
            self._num_open += 1
        begin = time.perf_counter()
        try:
            down.wait(into.last_use)
            with self._streams.on(down):
                for one in copy.parts:
                    assert isinstance(one.source, DeviceMemory)
                    for source, target in self._steps(one.source, one.destination):
                        target.data.copy_(source.data, non_blocking=True)
            end: Event = down.record()
        except Exception as caught:  # noqa: BLE001  thread boundary: `done` hands it on
            end = _Failed(caught)
        self._under_way.put(_UnderWay(copy, end, done, begin))

    def arrive(self) -> bool:
        """Waits for the copy that was submitted first of those under way, and says `done`. False
        where there is none, and will be none: the lane is closed."""
        one = self._under_way.get()
        if one is None:
            return False
        error: Exception | None = None
        try:
            one.end.synchronize()
        except Exception as caught:  # noqa: BLE001  thread boundary: `done` hands it on
            error = caught
        begin, end = max(one.begin, self._last_end), time.perf_counter()
        self._busy_s += end - begin
        self._last_end = end
        if self._tracer.writes:
            self._tracer.record(one.copy.label, self._name, begin, end, bytes=one.copy.num_bytes)
        try:
            one.done(error)
        finally:
            self._ended()
        return True

    def serve(self) -> None:
        """Until the lane is closed and its last copy has ended."""
        while self.arrive():
            pass

    def synchronize(self) -> None:
        """Returns when every submitted copy has ended and its `done` has returned."""
        with self._changed:
            self._changed.wait_for(lambda: not self._num_open)

    def close(self) -> None:
        """Ends `serve`; nothing may be submitted afterwards."""
        with self._changed:
            self._closed = True
        self._under_way.put(None)

    def _ended(self) -> None:
        with self._changed:
            self._num_open -= 1
            self._changed.notify_all()

    def _steps(
        self, source: DeviceMemory, into: DeviceMemory
    ) -> Iterator[tuple[DeviceMemory, DeviceMemory]]:
        return steps(source, into, self._step_bytes)


def steps(
    source: DeviceMemory, into: DeviceMemory, step: int | None
) -> Iterator[tuple[DeviceMemory, DeviceMemory]]:
    """A copy of the host's memory in parts that each lie in one of its steps, of so many bytes:
    mostly one."""
    size = source.num_bytes
    if step is None or source.begin % step + size <= step:
        yield source, into
        return
    at = 0
    while at < size:
        part = min(size - at, step - (source.begin + at) % step)
        yield source.part(at, part), into.part(at, part)
        at += part
