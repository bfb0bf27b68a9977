"""Real memory limits: a cgroup of exactly the given size, where this machine lets us make one."""

import os
import subprocess
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

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
