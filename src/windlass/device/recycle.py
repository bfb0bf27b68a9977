"""Memory of results that is used again: the layers of a pass make results of the same few sizes."""

import ctypes
import math
import mmap
import weakref
from collections import deque
from typing import NamedTuple

import torch

from windlass.device import host_memory as host
from windlass.units import round_up

# Below, malloc's memory. What lies in between is too large for it: freed among smaller pieces that
# live on, it leaves holes, and the heap grew by up to 34 MiB beyond what was in use.
_LEAST_BYTES = 512 << 10
_STEP_BYTES = 64 << 10  # that sizes below those of huge pages are rounded up to


class _Block(NamedTuple):
    """`size` bytes from `start` of `memory` on: huge pages where it is large."""

    memory: mmap.mmap
    start: int
    size: int


class Recycler:
    """Makes uninitialised fp32 tensors, of freed ones' memory where sizes match: fresh memory is
    cleared by the system on the caller's thread alone, at some GB/s. Never holds more than was once
    in use at the same time, so a peak stays what it was. Freed with the last of its tensors. Not
    thread-safe, but tensors may be freed by any thread."""

    def __init__(self) -> None:
        self._free: list[_Block] = []  # longest free first
        self._returned: deque[_Block] = deque()  # appended to by whoever frees a tensor
        self._held = self._in_use = self._peak = 0  # bytes

    @property
    def held_bytes(self) -> int:
        """Of blocks in use and free ones."""
        return self._held

    def empty(self, *shape: int) -> torch.Tensor:
        """(shape) fp32."""
        num_bytes = torch.float32.itemsize * math.prod(shape)
        if num_bytes < _LEAST_BYTES:
            return torch.empty(shape)
        is_large = num_bytes >= host.LARGE_BYTES
        size = round_up(num_bytes, host.HUGE_PAGE_BYTES if is_large else _STEP_BYTES)
        self._take_back()
        self._in_use += size
        self._peak = max(self._peak, self._in_use)
        block = self._used_before(size) or self._fresh(size)
        view = (ctypes.c_uint8 * size).from_buffer(block.memory, block.start)
        weakref.finalize(view, self._returned.append, block).atexit = False
        return torch.frombuffer(view, dtype=torch.float32, count=num_bytes // 4).view(shape)

    def _take_back(self) -> None:
        while self._returned:
            block = self._returned.popleft()
            self._in_use -= block.size
            self._free.append(block)

    def _used_before(self, size: int) -> _Block | None:
        for i in range(len(self._free) - 1, -1, -1):
            if self._free[i].size == size:
                return self._free.pop(i)
        return None

    def _fresh(self, size: int) -> _Block:
        while self._free and self._held + size > self._peak:
            self._held -= self._free.pop(0).size
        self._held += size
        if size < host.LARGE_BYTES:
            return _Block(mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS), 0, size)
        memory, start = host.huge_pages(size)
        return _Block(memory, start, size)
