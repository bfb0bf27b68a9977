"""A plain CPU: anonymous memory in huge pages, and reader threads as lanes. Knows no weights."""

import mmap
import threading
import time
from queue import SimpleQueue

import torch

from windlass.device.base import ALIGN_BYTES, Copy, DeviceMemory, Done, FileRange
from windlass.device.host_memory import HostAllocator
from windlass.ids import HOST
from windlass.trace import Tracer
from windlass.units import round_up


class CpuDevice(HostAllocator):
    """`Device` of host memory. `num_threads` copies are in flight at once."""

    name = HOST

    def __init__(self, num_threads: int, *, tracer: Tracer | None = None) -> None:
        assert num_threads >= 1, f"num_threads: got {num_threads}, allowed at least 1"
        self._tracer = tracer or Tracer()
        self._jobs: SimpleQueue[tuple[Copy, Done] | None] = SimpleQueue()
        self._changed = threading.Condition()
        self._under_way = 0
        self._reading = 0  # threads that read now, since `_since` at least one
        self._since = self._busy_s = 0.0
        self._closed = False
        self._allocated_bytes = 0
        self._threads = [
            threading.Thread(target=self._serve, args=(f"disk {i}",), name=f"disk {i}", daemon=True)
            for i in range(num_threads)
        ]
        for thread in self._threads:
            thread.start()

    @property
    def num_lanes(self) -> int:
        return len(self._threads)

    @property
    def allocated_bytes(self) -> int:
        return self._allocated_bytes

    @property
    def busy_s(self) -> float:
        with self._changed:
            running = time.perf_counter() - self._since if self._reading else 0.0
            return self._busy_s + running

    def allocate(self, num_bytes: int) -> DeviceMemory:
        """Private anonymous memory, so that it is counted as this process's and freed for good."""
        size = max(round_up(num_bytes, ALIGN_BYTES), ALIGN_BYTES)
        memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        memory.madvise(mmap.MADV_HUGEPAGE)
        self._allocated_bytes += size
        return DeviceMemory(self, torch.frombuffer(memory, dtype=torch.uint8)[:num_bytes])

    def submit(self, copy: Copy, done: Done) -> None:
        with self._changed:
            if self._closed:
                raise RuntimeError(f"copy of {copy.label} submitted to a closed device")
            self._under_way += 1
        self._jobs.put((copy, done))

    def synchronize(self) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self._under_way == 0)

    def close(self) -> None:
        with self._changed:
            if self._closed:
                return
            self._closed = True
        for _ in self._threads:
            self._jobs.put(None)  # behind every copy already submitted
        for thread in self._threads:
            thread.join()

    def _serve(self, lane: str) -> None:
        while (job := self._jobs.get()) is not None:
            copy, done = job
            error: Exception | None = None
            with self._changed:
                begin = time.perf_counter()
                self._since = self._since if self._reading else begin
                self._reading += 1
            try:
                _make(copy)
            except Exception as caught:  # noqa: BLE001  thread boundary: `done` hands it on
                error = caught
            with self._changed:
                end = time.perf_counter()
                self._reading -= 1
                self._busy_s += 0.0 if self._reading else end - self._since
            self._tracer.record(copy.label, lane, begin, end, bytes=copy.num_bytes)
            try:
                done(error)
            finally:
                with self._changed:
                    self._under_way -= 1
                    self._changed.notify_all()


def _make(copy: Copy) -> None:
    """Moves the bytes, on the caller's thread."""
    source, into = copy.source, copy.destination.data
    if isinstance(source, FileRange):
        source.source.read(source.file, source.offset, into.numpy().data)
    else:
        into.copy_(source.data)
