"""Limits of cgroups: a real one of exactly the given memory, where this machine lets us make one,
and trees of files that tell of others."""

import os
import subprocess
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from windlass.units import GIB

_V1 = Path("/sys/fs/cgroup/memory")
_V2 = Path("/sys/fs/cgroup")


class MemoryGroup:
    """A cgroup with a hard limit. Processes started by `run` are inside from their first moment."""

    def __init__(self, path: Path, *, is_v1: bool) -> None:
        self._path = path
        self._is_v1 = is_v1

    def run(self, command: list[str], **more: Any) -> "subprocess.CompletedProcess[str]":
        procs = str(self._path / "cgroup.procs")

        def enter() -> None:
            with open(procs, "w") as file:
                file.write(str(os.getpid()))

        return subprocess.run(command, preexec_fn=enter, capture_output=True, text=True, **more)

    @property
    def peak_bytes(self) -> int:
        name = "memory.max_usage_in_bytes" if self._is_v1 else "memory.peak"
        return int((self._path / name).read_text())

    @property
    def num_kills(self) -> int:
        name = "memory.oom_control" if self._is_v1 else "memory.events"
        for line in (self._path / name).read_text().splitlines():
            if line.startswith("oom_kill "):
                return int(line.split()[1])
        return 0


@contextmanager
def memory_group(limit_bytes: int) -> Iterator[MemoryGroup | None]:
    """None where no memory cgroup can be made."""
    is_v1 = (_V1 / "memory.limit_in_bytes").exists()
    path = (_V1 if is_v1 else _V2) / f"windlass-{uuid.uuid4().hex[:8]}"
    try:
        path.mkdir()
        file = path / ("memory.limit_in_bytes" if is_v1 else "memory.max")
        if not file.exists():  # version 2 without the memory controller
            raise FileNotFoundError(file)
        file.write_text(str(limit_bytes))
    except OSError:
        if path.exists():
            path.rmdir()
        yield None
        return
    try:
        yield MemoryGroup(path, is_v1=is_v1)
    finally:
        path.rmdir()


MACHINE = 64 * GIB  # available


def tree(tmp_path: Path, cgroup: str, mounts: list[str], files: Mapping[str, object]) -> Path:
    """A /proc whose mount points lie below `tmp_path`; `{}` in `mounts` stands for that."""
    proc = tmp_path / "proc"
    (proc / "self").mkdir(parents=True)
    (proc / "meminfo").write_text(
        f"MemTotal: {2 * MACHINE // 1024} kB\nMemAvailable: {MACHINE // 1024} kB\n"
    )
    (proc / "self/cgroup").write_text(cgroup)
    (proc / "self/mountinfo").write_text("".join(m.format(tmp_path) + "\n" for m in mounts))
    for name, text in files.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{text}\n")
    return proc


V2 = "30 23 0:26 / {}/sys rw,nosuid shared:4 - cgroup2 cgroup2 rw,nsdelegate"
V1 = "35 31 0:32 / {}/sys/memory rw,relatime - cgroup cgroup rw,memory"
V1_CPU = "32 31 0:29 / {}/sys/cpu rw,relatime - cgroup cgroup rw,cpu"
