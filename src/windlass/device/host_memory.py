"""Memory of the host: tensors in it, and what the operating system says of this process and
machine. Linux; bytes throughout."""

import ctypes
import math
import mmap
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import torch

from windlass.device.cgroups import PROC, groups_of, lines_of, number_of
from windlass.device.streams import HostStreams
from windlass.units import round_up

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # from malloc.h
LARGE_BYTES = 4 << 20
_TRIM_THRESHOLD_BYTES = (
    16 << 20
)  # of the heap's end that may stay free: else each tensor is faulted in
_MADV_POPULATE_WRITE = 23  # from mman.h, Linux 5.14
HUGE_PAGE_BYTES = 2 << 20


class MemoryLimit(NamedTuple):
    """A memory cgroup above this process. `free`: up to the limit, counting what the kernel would
    drop first (file pages not used lately) as free; never negative."""

    limit: int
    free: int


class _Files(NamedTuple):
    """How a version of cgroups calls what we read."""

    limits: tuple[str, ...]
    usage: str
    reclaimable: str  # in memory.stat, with the groups below


_V1 = _Files(("memory.limit_in_bytes",), "memory.usage_in_bytes", "total_inactive_file")
_V2 = _Files(("memory.max", "memory.high"), "memory.current", "inactive_file")


def resident_bytes() -> int:
    """Memory of this process that is in RAM now."""
    return _field(PROC / "self/status", "VmRSS")


def peak_resident_bytes() -> int:
    """The most that was ever in RAM at once."""
    return _field(PROC / "self/status", "VmHWM")


def available_bytes(proc: Path = PROC) -> int:
    """What this process could take in addition: without swapping, and within the limits of its
    memory cgroup and those above."""
    frees = [limit.free for limit in memory_limits(proc)]
    return min([_field(proc / "meminfo", "MemAvailable"), *frees])


def memory_limits(proc: Path = PROC) -> list[MemoryLimit]:
    """All limits that bind this process, of either version; empty where there is none."""
    found = []
    for folder, is_v1 in groups_of("memory", proc):
        files = _V1 if is_v1 else _V2
        limits = [n for name in files.limits if (n := number_of(folder / name)) is not None]
        usage = number_of(folder / files.usage)
        if limits and usage is not None:
            used = usage - _stat(folder / "memory.stat", files.reclaimable)
            found.append(MemoryLimit(min(limits), max(0, min(limits) - used)))
    return found


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


def _stat(path: Path, name: str) -> int:
    """An entry of memory.stat; 0 where there is none."""
    for line in lines_of(path):
        key, _, value = line.partition(" ")
        if key == name:
            return int(value)
    return 0


def _field(path: Path, name: str) -> int:
    for line in path.read_text().splitlines():
        if line.startswith(name + ":"):
            return int(line.split()[1]) * 1024
    raise AssertionError(f"{path} has no {name}")
