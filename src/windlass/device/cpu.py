"""A plain CPU: anonymous memory in huge pages, and reader threads as lanes. Knows no weights."""

import mmap
import threading
import time
from collections import deque

import torch

from windlass.device.base import ALIGN_BYTES, Copy, DeviceMemory, Done, FileRange
from windlass.device.host_memory import HostAllocator
from windlass.ids import HOST
from windlass.trace import Tracer
from windlass.units import round_up


class CpuDevice(HostAllocator):
    """`Device` of host memory. `num_threads` copies are in flight at once. By another name than
    the host's it stands in for a device above it."""

    def __init__(self, num_threads: int, *, tracer: Tracer | None = None, name: str = HOST) -> None:
        assert num_threads >= 1, f"num_threads: got {num_threads}, allowed at least 1"
        self._name = name
        lane = "disk" if name == HOST else f"to {name}"
        self._tracer = tracer or Tracer()
        self._jobs: deque[tuple[Copy, Done]] = deque()
        self._lock = threading.Lock()
        self._ended = threading.Condition(self._lock)
        self._idle: list[threading.Lock] = []  # of threads that wait, to be released
        self._is_waking = False  # a thread that was woken has not looked yet
        self._under_way = 0
        self._reading = 0  # threads that read now, since `_since` at least one
        self._since = self._busy_s = 0.0
        self._closed = False
        self._allocated_bytes = 0
        self._threads = [
            threading.Thread(target=self._serve, args=(one,), name=one, daemon=True)
            for one in (f"{lane} {i}" for i in range(num_threads))
        ]
        for thread in self._threads:
            thread.start()

    @property
    def name(self) -> str:
        return self._name

    @property
    def num_lanes(self) -> int:
        return len(self._threads)

    @property
    def allocated_bytes(self) -> int:
        return self._allocated_bytes

    @property
    def busy_s(self) -> float:
        with self._lock:
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
        with self._lock:
            if self._closed:
                raise RuntimeError(f"copy of {copy.label} submitted to a closed device")
            self._under_way += 1
            self._jobs.append((copy, done))
            self._wake()

    def synchronize(self) -> None:
        with self._lock:
            self._ended.wait_for(lambda: self._under_way == 0)

    def close(self) -> None:
        with self._lock:
            if self._closed:
                return
            self._closed = True
            self._wake()
        for thread in self._threads:
            thread.join()

    def _wake(self) -> None:
        """Has one more thread look for a job. It wakes the next by itself: whoever submits a dozen
        copies pays for one switch of threads, not for a dozen."""
        if self._idle and not self._is_waking:
            self._is_waking = True
            self._idle.pop().release()

    def _next_job(self, sleep: threading.Lock) -> tuple[Copy, Done] | None:
        """The next copy, waiting for it; None at the end. `sleep`: the thread's own, held."""
        while True:
            with self._lock:
                if self._jobs:
                    job = self._jobs.popleft()
                    if self._jobs:
                        self._wake()
                    self._since = self._since if self._reading else time.perf_counter()
                    self._reading += 1
                    return job
                if self._closed:
                    self._wake()
                    return None
                self._idle.append(sleep)
            sleep.acquire()
            self._is_waking = False

    def _serve(self, lane: str) -> None:
        sleep = threading.Lock()
        sleep.acquire()
        while (job := self._next_job(sleep)) is not None:
            copy, done = job
            error: Exception | None = None
            begin = time.perf_counter()
            try:
                for one in copy.parts:
                    _make(one)
            except Exception as caught:  # noqa: BLE001  thread boundary: `done` hands it on
                error = caught
            end = time.perf_counter()
            with self._lock:
                self._reading -= 1
                self._busy_s += 0.0 if self._reading else end - self._since
            if self._tracer.writes:
                self._tracer.record(copy.label, lane, begin, end, bytes=copy.num_bytes)
            try:
                done(error)
            finally:
                with self._lock:
                    self._under_way -= 1
                    if not self._under_way:
                        self._ended.notify_all()


def _make(copy: Copy) -> None:
    """Moves the bytes, on the caller's thread."""
    source, into = copy.source, copy.destination
    if isinstance(source, FileRange):
        view = into.whole.numpy().data[into.begin : into.begin + into.num_bytes]
        source.source.read(source.file, source.offset, view)
    else:
        into.data.copy_(source.data)
