"""Runs a command inside a memory cgroup of its own, version 1 or 2, where this user may make one.
Without, a budget is only a promise; with it, the kernel ends whoever breaks it. Linux."""

import argparse
import os
import resource
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from machine import Others, write

from windlass.device.host_memory import HostAllocator
from windlass.device.process_memory import available_bytes

_V1 = Path("/sys/fs/cgroup/memory")
_V2 = Path("/sys/fs/cgroup")
_DROP_CACHES = Path("/proc/sys/vm/drop_caches")
_TOUCHED_SHARE, _TOUCHED_AT_ONCE = 0.85, 256 << 20
# exec in place of the shell: the command's first byte is already counted in the group
ENTER = 'echo $$ > "$1" && shift && exec "$@"'


@dataclass(frozen=True, slots=True)
class Ran:
    """What came of a command. Bytes; None where no group was made."""

    returncode: int
    stdout: str
    cgroup_version: int | None
    cgroup_peak_bytes: int | None
    cgroup_limit_hits: int | None  # times the limit was reached; the page cache then shrinks
    cpu_s: float  # of all its threads, user and system
    others_cores: float  # kept busy by other processes meanwhile
    no_cgroup: str | None = None  # why there is none


class MemoryGroup:
    """One memory cgroup of `limit_bytes`, without swap. Raises OSError where it cannot be made."""

    def __init__(self, limit_bytes: int) -> None:
        self.version = 1 if (_V1 / "memory.limit_in_bytes").exists() else 2
        self._path = (_V1 if self.version == 1 else _V2) / f"windlass-bench-{os.getpid()}"
        if self.version == 2:
            (_V2 / "cgroup.subtree_control").write_text("+memory")
        self._path.mkdir()
        try:
            if self.version == 1:
                (self._path / "memory.limit_in_bytes").write_text(str(limit_bytes))
            else:
                (self._path / "memory.max").write_text(str(limit_bytes))
                with suppress(OSError):  # a kernel without swap accounting
                    (self._path / "memory.swap.max").write_text("0")
        except OSError:
            self.remove()
            raise

    @property
    def members(self) -> Path:
        return self._path / "cgroup.procs"

    def peak_bytes(self) -> int | None:
        """The page cache and the kernel's own memory included."""
        name = "memory.max_usage_in_bytes" if self.version == 1 else "memory.peak"
        path = self._path / name
        return int(path.read_text()) if path.exists() else None  # memory.peak: Linux 5.19

    def used_bytes(self) -> int:
        """Now, the page cache included."""
        name = "memory.usage_in_bytes" if self.version == 1 else "memory.current"
        return int((self._path / name).read_text())

    def limit_hits(self) -> int:
        if self.version == 1:
            return int((self._path / "memory.failcnt").read_text())
        events = (self._path / "memory.events").read_text().split()
        return int(events[events.index("max") + 1])

    def remove(self) -> None:
        self._path.rmdir()


def touch_memory() -> None:
    """Touches the memory that is free, once. The host of a virtual machine takes back what has been
    free for a while, and the next to use it waits (measured: 1 GB/s instead of 30): without, a run
    pays for how long the machine idled before it."""
    count = int(_TOUCHED_SHARE * available_bytes()) // _TOUCHED_AT_ONCE
    held = [HostAllocator().empty(_TOUCHED_AT_ONCE // 4).zero_() for _ in range(count)]
    held.clear()  # none before the last is touched


def run_limited(command: Sequence[str], limit_bytes: int) -> Ran:
    """Runs `command` with at most `limit_bytes`, standard output captured, caches dropped before:
    pages of others' files, libraries above all, would otherwise not be counted."""
    try:
        os.sync()
        _DROP_CACHES.write_text("3")
        touch_memory()
        group = MemoryGroup(limit_bytes)
    except OSError as error:
        return _run(command, None, f"{error.filename or 'memory cgroup'}: {error.strerror}")
    try:
        return _run([*("sh", "-c", ENTER, "sh", str(group.members)), *command], group, None)
    finally:
        group.remove()


def _run(command: Sequence[str], group: MemoryGroup | None, no_cgroup: str | None) -> Ran:
    others = Others()
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return Ran(
        returncode=done.returncode,
        stdout=done.stdout,
        cgroup_version=group.version if group else None,
        cgroup_peak_bytes=group.peak_bytes() if group else None,
        cgroup_limit_hits=group.limit_hits() if group else None,
        cpu_s=after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime,
        others_cores=others.cores(),
        no_cgroup=no_cgroup,
    )


@contextmanager
def bench_folder(kept: Path | None) -> Iterator[Path]:
    """`kept`, made if need be, or a temporary folder. A request to end goes through all clean-up:
    a memory group outlives its process."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    if kept:
        kept.mkdir(parents=True, exist_ok=True)
        yield kept
    else:
        with tempfile.TemporaryDirectory(prefix="windlass-bench-") as folder:
            yield Path(folder)


def run_bench(
    options: argparse.Namespace, bench: Callable[[argparse.Namespace, Path], dict[str, Any]]
) -> None:
    """Runs `bench` in the folder that `options.dir` says, and writes what came of it."""
    with bench_folder(options.dir) as folder:
        document = bench(options, folder)
    write(document, options.json)
