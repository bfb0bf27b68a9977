"""Memory of the host: tensors in it, and what the operating system says of this process and
machine. Linux; bytes throughout."""

import ctypes
import math
import mmap
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import torch

from windlass.units import round_up

_PROC = Path("/proc")
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
    return _field(_PROC / "self/status", "VmRSS")


def peak_resident_bytes() -> int:
    """The most that was ever in RAM at once."""
    return _field(_PROC / "self/status", "VmHWM")


def available_bytes(proc: Path = _PROC) -> int:
    """What this process could take in addition: without swapping, and within the limits of its
    memory cgroup and those above."""
    frees = [limit.free for limit in memory_limits(proc)]
    return min([_field(proc / "meminfo", "MemAvailable"), *frees])


def memory_limits(proc: Path = _PROC) -> list[MemoryLimit]:
    """All limits that bind this process, of either version; empty where there is none."""
    found = []
    for folder, files in _groups(proc):
        limits = [n for name in files.limits if (n := _number(folder / name)) is not None]
        usage = _number(folder / files.usage)
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


def _groups(proc: Path) -> Iterator[tuple[Path, _Files]]:
    """The folders of this process's memory cgroups and of all above, as far as they are mounted
    here; in a container, its own group is often the topmost."""
    mine = _own_groups(proc)
    for line in _lines(proc / "self/mountinfo"):
        before, _, after = line.partition(" - ")
        root, mount = (_unescaped(word) for word in before.split()[3:5])
        kind, _, options = after.split(maxsplit=2)
        if kind == "cgroup2":
            files, path = _V2, mine.get("")
        elif kind == "cgroup" and "memory" in options.split(","):
            files, path = _V1, mine.get("memory")
        else:
            continue
        top = Path(mount)
        inside = Path(path).parts[1:] if path and _is_under(path, root) else ()
        names = inside[len(Path(root).parts) - 1 :]
        for count in range(len(names), -1, -1):
            yield top.joinpath(*names[:count]), files


def _own_groups(proc: Path) -> dict[str, str]:
    """Path of this process's group by controller; version 2 has the name ""."""
    groups = {}
    for line in _lines(proc / "self/cgroup"):
        _, controllers, path = line.split(":", 2)
        groups.update(dict.fromkeys(controllers.split(","), path))
    return groups


def _is_under(path: str, root: str) -> bool:
    """Whether the group `path` can be seen in a mount that begins at `root`. Outside of its own
    namespace a group has a path with `..`."""
    return ".." not in Path(path).parts and Path(path).is_relative_to(root)


def _unescaped(word: str) -> str:
    """mountinfo writes blanks as octal."""
    return word.replace("\\040", " ")


def _lines(path: Path) -> list[str]:
    return path.read_text().splitlines() if path.exists() else []


def _number(path: Path) -> int | None:
    """None where the file is absent or says `max`."""
    text = path.read_text().strip() if path.exists() else "max"
    return None if text == "max" else int(text)


def _stat(path: Path, name: str) -> int:
    """An entry of memory.stat; 0 where there is none."""
    for line in _lines(path):
        key, _, value = line.partition(" ")
        if key == name:
            return int(value)
    return 0


def _field(path: Path, name: str) -> int:
    for line in path.read_text().splitlines():
        if line.startswith(name + ":"):
            return int(line.split()[1]) * 1024
    raise AssertionError(f"{path} has no {name}")
