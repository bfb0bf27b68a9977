"""Memory of the host: tensors in it, and how malloc gives it back. Linux; bytes throughout."""

import ctypes
import math
import mmap
from collections.abc import Sequence
from contextlib import suppress

import torch

from windlass.device.streams import HostStreams
from windlass.units import round_up

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # from malloc.h
LARGE_BYTES = 4 << 20
_TRIM_THRESHOLD_BYTES = (
    16 << 20
)  # of the heap's end that may stay free: else each tensor is faulted in
_MADV_POPULATE_WRITE = 23  # from mman.h, Linux 5.14
HUGE_PAGE_BYTES = 2 << 20


def return_freed_memory() -> None:
    """Makes malloc give tensors above 4 MiB back to the system when they are freed. By default
    glibc raises that threshold after the first large free and then keeps fragmented heaps, so that
    the peak depends on history; a budget could not be kept."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):  # another C library: nothing to set
        return
    mallopt(_M_MMAP_THRESHOLD, LARGE_BYTES)
    mallopt(_M_TRIM_THRESHOLD, _TRIM_THRESHOLD_BYTES)


class HostAllocator:
    """`Allocator` of host memory. Large tensors lie in huge pages of their own: freed, they are
    given back at once, and made, they cost few page faults (4 KiB pages: 15 % of a large pass)."""

    streams = HostStreams()

    def empty(self, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        if _is_large(shape, dtype):
            return _own_pages(shape, dtype)
        return torch.empty(shape, dtype=dtype)

    def zeros(self, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """The system has cleared large ones already: nothing does so again."""
        if _is_large(shape, dtype):
            return _own_pages(shape, dtype)
        return torch.zeros(shape, dtype=dtype)

    def tensor(
        self, values: Sequence[int] | Sequence[bool] | torch.Tensor, *, dtype: torch.dtype
    ) -> torch.Tensor:
        return torch.as_tensor(values, dtype=dtype)


def _is_large(shape: tuple[int, ...], dtype: torch.dtype) -> bool:
    return dtype.itemsize * math.prod(shape) >= LARGE_BYTES


def _own_pages(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """A tensor in a new mapping, hence zero."""
    num_bytes = dtype.itemsize * math.prod(shape)
    memory, start = huge_pages(num_bytes)
    whole = torch.frombuffer(memory, dtype=torch.uint8)
    return whole[start : start + num_bytes].view(dtype).view(shape)


def huge_pages(num_bytes: int) -> tuple[mmap.mmap, int]:
    """Fresh memory, zeros, and where in it `num_bytes` of whole huge pages begin."""
    memory = mmap.mmap(-1, num_bytes + HUGE_PAGE_BYTES, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    start = -ctypes.addressof(ctypes.c_uint8.from_buffer(memory)) % HUGE_PAGE_BYTES
    memory.madvise(mmap.MADV_HUGEPAGE)
    with suppress(OSError):  # an older kernel: threads that write it wait for each other's faults
        memory.madvise(_MADV_POPULATE_WRITE, start, round_up(num_bytes, mmap.PAGESIZE))
    return memory, start
