"""What the operating system says of this process and machine. Linux; bytes throughout."""

import ctypes
from pathlib import Path

_STATUS = Path("/proc/self/status")
_MEMINFO = Path("/proc/meminfo")
_CGROUP_LIMITS = (
    Path("/sys/fs/cgroup/memory.max"),  # version 2
    Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"),  # version 1
)
_M_MMAP_THRESHOLD = -3  # from malloc.h
_MMAP_THRESHOLD_BYTES = 4 << 20


def resident_bytes() -> int:
    """Memory of this process that is in RAM now."""
    return _field(_STATUS, "VmRSS")


def peak_resident_bytes() -> int:
    """The most that was ever in RAM at once."""
    return _field(_STATUS, "VmHWM")


def available_bytes() -> int:
    """What a new process could take without swapping, within the memory cgroup's limit."""
    available = _field(_MEMINFO, "MemAvailable")
    for path in _CGROUP_LIMITS:
        if path.exists():
            text = path.read_text().strip()
            if text != "max":
                available = min(available, int(text))
    return available


def return_freed_memory() -> None:
    """Makes malloc give tensors above 4 MiB back to the system when they are freed. By default
    glibc raises that threshold after the first large free and then keeps fragmented heaps, so that
    the peak depends on history; a budget could not be kept."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):  # another C library: nothing to set
        return
    mallopt(_M_MMAP_THRESHOLD, _MMAP_THRESHOLD_BYTES)


def _field(path: Path, name: str) -> int:
    for line in path.read_text().splitlines():
        if line.startswith(name + ":"):
            return int(line.split()[1]) * 1024
    raise AssertionError(f"{path} has no {name}")
