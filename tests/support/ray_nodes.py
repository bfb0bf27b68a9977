"""A Ray cluster on this machine whose nodes are processes of their own, and `run-batch` on it."""

import json
import os
import re
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

PATIENCE_S = 600.0  # of what only something that hangs reaches
_QUIET = {
    "RAY_memory_monitor_refresh_ms": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    "SOURCE_DATE_EPOCH": "1790000000",
    "RAY_AUTH_MODE": "token",  # nobody else may join
    "RAY_AUTH_TOKEN": secrets.token_hex(32),
}


class RayNodes:
    """Nodes of one cluster, by name; the first is the head. A context manager. `folder`: a short
    path for Ray's sockets."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._nodes: dict[str, subprocess.Popen[bytes]] = {}
        self.address = ""  # of the head
        self._port = _free_port()

    def __enter__(self) -> "RayNodes":
        return self

    def __exit__(self, *_: object) -> None:
        for name in list(self._nodes):
            self.kill(name)

    def start(
        self, name: str, *, cpus: int = 1, env: Mapping[str, str] | None = None,
        before: Sequence[str] = (),
    ) -> None:  # fmt: skip
        """`before`: a command that ends by running what follows it."""
        where = ["--address", self.address]
        if not self._nodes:
            where = ["--head", "--port", str(self._port), "--temp-dir", str(self._folder)]
            where += ["--include-dashboard", "false"]
        command = [
            *before, sys.executable, "-m", "ray.scripts.scripts", "start", "--block",
            "--num-cpus", str(cpus),
            "--object-store-memory", "80000000", *where,
        ]  # fmt: skip
        with (self._folder / f"{name}.log").open("wb") as log:
            self._nodes[name] = subprocess.Popen(
                command, stdout=log, stderr=log, env={**os.environ, **_QUIET, **(env or {})},
                start_new_session=True,
            )  # fmt: skip
        self._wait_for(name)

    def kill(self, name: str) -> None:
        """As if its machine lost power."""
        process = self._nodes.pop(name)
        for pid in _family(process.pid):
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
        process.wait()

    def _wait_for(self, name: str) -> None:
        deadline = time.monotonic() + PATIENCE_S
        log = self._folder / f"{name}.log"
        while b"--block" not in log.read_bytes():
            assert self._nodes[name].poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.1)
        if not self.address:
            (host,) = re.findall(r"Local node IP: (\S+)", log.read_text())
            self.address = f"{host}:{self._port}"


class Driver:
    """`windlass run-batch` under way; what it says is in `folder`/stderr."""

    def __init__(self, folder: Path, *arguments: str, env: Mapping[str, str] | None = None) -> None:
        self.log = folder / "stderr"
        self._begin = self.log.stat().st_size if self.log.exists() else 0
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "windlass.cli", "run-batch", "-i", "in", "-o", "out",
                 *arguments],
                cwd=folder, stdout=subprocess.PIPE, stderr=log,
                env={**os.environ, **_QUIET, **(env or {})},
            )  # fmt: skip

    def said(self) -> str:
        return self.log.read_bytes()[self._begin :].decode()

    def wait(self) -> tuple[int, str]:
        """Exit code and standard output."""
        try:
            out, _ = self.process.communicate(timeout=PATIENCE_S)
        finally:
            self.process.kill()
        return self.process.returncode, out.decode()

    def wait_for_rows(self, journal: Path, more: int) -> bool:
        """Until the journal has so many more rows; False once it has ended."""
        wanted = num_records(journal) + more
        deadline = time.monotonic() + PATIENCE_S
        while num_records(journal) < wanted:
            assert time.monotonic() < deadline, self.said()
            if self.process.poll() is not None:
                return False
            time.sleep(0.05)
        return True

    def replicas(self) -> dict[int, int]:
        """Process ids of those that were open, by number."""
        found = {}
        for line in self.said().splitlines():
            words = line.split()
            if line.startswith("replica ") and "process" in words[:6]:
                found[int(words[1])] = int(words[words.index("process") + 1].rstrip(","))
        return found

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()
        assert self.process.stdout is not None
        self.process.stdout.close()


def num_records(journal: Path) -> int:
    return journal.read_bytes().count(b"\n") if journal.exists() else 0


def write_rows(folder: Path, rows: Sequence[dict[str, Any]]) -> None:
    (folder / "in").write_text("".join(json.dumps(row) + "\n" for row in rows))


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def _family(pid: int) -> list[int]:
    """It and all that descend from it."""
    parents: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            try:
                stat = (entry / "stat").read_text()
            except OSError:
                continue
            parents.setdefault(int(stat.rpartition(")")[2].split()[1]), []).append(int(entry.name))
    found, left = [], [pid]
    while left:
        found.append(left.pop())
        left += parents.get(found[-1], [])
    return found


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port: int = server.getsockname()[1]
    return port
