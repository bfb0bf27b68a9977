"""What the operating system says of the memory of this process and machine. Linux; bytes
throughout; no torch."""

from pathlib import Path
from typing import NamedTuple

from windlass.device.cgroups import PROC, groups_of, lines_of, number_of


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


def machine_bytes(proc: Path = PROC) -> int:
    """All that the machine has for processes."""
    return _field(proc / "meminfo", "MemTotal")


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
