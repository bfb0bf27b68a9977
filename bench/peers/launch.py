"""Starts runners, each in a process of its own, and takes their results. Knows no engine but where
it runs: the peers in a virtual environment beside Windlass's own, made on first use."""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from limits import run_limited, touch_memory
from machine import ROOT, Others

from peers.job import Job

_HERE = Path(__file__).resolve().parent
VENV = ROOT / ".venv-peers"
PYTHON = VENV / "bin" / "python"
_STAMP = VENV / ".installed"
_RUNNERS = {
    "windlass": (sys.executable, "peers.run_windlass"),
    "llama.cpp": (str(PYTHON), "peers.run_llama"),
    "transformers": (str(PYTHON), "peers.run_transformers"),
}
ENGINES = tuple(_RUNNERS)
_SET = ("PYTHONPATH", "OMP_NUM_THREADS", "HF_HUB_OFFLINE", "TOKENIZERS_PARALLELISM")
_SPARE_BYTES = 1_500_000_000  # for everything else on the machine


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What came of a run. `status`: ok, timeout, failed, no room."""

    status: str
    seconds: float = 0.0  # of the whole process, loading included
    result: dict[str, Any] | None = None
    message: str = ""
    others_cores: float = 0.0
    limited: dict[str, Any] | None = None  # what the memory cgroup saw

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def ensure_environment() -> None:
    """Installs what `requirements.txt` names, unless done; llama.cpp is compiled for this machine,
    which takes ten minutes on two cores."""
    wanted = (_HERE / "requirements.txt").read_text(encoding="utf-8")
    if _STAMP.exists() and _STAMP.read_text(encoding="utf-8") == wanted:
        return
    print(f"{VENV}: installing transformers and llama.cpp, some ten minutes", flush=True)
    if not PYTHON.exists():
        subprocess.run([sys.executable, "-m", "venv", str(VENV)], check=True)
    subprocess.run(
        [
            *(str(PYTHON), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"),
            *("-c", str(ROOT / "constraints.txt"), "-r", str(_HERE / "requirements.txt")),
        ],
        env=os.environ | {"CMAKE_ARGS": "-DGGML_NATIVE=ON"},
        check=True,
    )
    _STAMP.write_text(wanted, encoding="utf-8")


def memory_budget() -> int:
    """Bytes that one engine may take on this machine."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") - _SPARE_BYTES


def environ(threads: int) -> dict[str, str]:
    path = os.pathsep.join((str(ROOT / "bench"), str(ROOT / "src")))
    return os.environ | {
        "PYTHONPATH": path, "OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }  # fmt: skip


def _command(engine: str, job: Job) -> list[str]:
    python, module = _RUNNERS[engine]
    return [python, "-m", module, job.to_json()]


def run(engine: str, job: Job, timeout_s: float) -> Outcome:
    """One run with all the memory of the machine."""
    touch_memory()
    others, seconds = Others(), _Seconds()
    try:
        done = subprocess.run(
            _command(engine, job), env=environ(job.threads), timeout=timeout_s,
            capture_output=True, text=True, check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return Outcome(
            status="timeout", seconds=seconds(), others_cores=others.cores(),
            message=f"over {timeout_s:.0f} s",
        )  # fmt: skip
    return _read(done.returncode, done.stdout, done.stderr, seconds(), others.cores())


def run_in_group(engine: str, job: Job, timeout_s: float, limit_bytes: int) -> Outcome:
    """One run inside a memory cgroup of `limit_bytes`, the page cache empty at its start."""
    seconds = _Seconds()
    settings = [f"{name}={value}" for name, value in environ(job.threads).items() if name in _SET]
    ran = run_limited(
        ["timeout", "-k", "5", f"{timeout_s:.0f}", "env", *settings, *_command(engine, job)],
        limit_bytes,
    )
    limited = {
        "limit_bytes": limit_bytes, "peak_bytes": ran.cgroup_peak_bytes,
        "limit_hits": ran.cgroup_limit_hits, "version": ran.cgroup_version,
        "no_cgroup": ran.no_cgroup,
    }  # fmt: skip
    if ran.returncode in (124, 137) and seconds() >= timeout_s:
        return Outcome(
            status="timeout", seconds=seconds(), message=f"over {timeout_s:.0f} s",
            others_cores=ran.others_cores, limited=limited,
        )  # fmt: skip
    return _read(ran.returncode, ran.stdout, "", seconds(), ran.others_cores, limited)


class _Seconds:
    def __init__(self) -> None:
        self._begin = os.times().elapsed

    def __call__(self) -> float:
        return os.times().elapsed - self._begin


def _read(
    code: int,
    stdout: str,
    stderr: str,
    seconds: float,
    others_cores: float,
    limited: dict[str, Any] | None = None,
) -> Outcome:
    lines = stdout.strip().splitlines()
    if code == 0 and lines:
        return Outcome(
            status="ok", seconds=seconds, result=json.loads(lines[-1]),
            others_cores=others_cores, limited=limited,
        )  # fmt: skip
    said: Sequence[str] = stderr.strip().splitlines() or lines or ["no message"]
    killed = " (killed: out of memory)" if code in (-9, 137) else ""
    return Outcome(
        status="failed", seconds=seconds, message=f"exit {code}{killed}: {said[-1]:.300}",
        others_cores=others_cores, limited=limited,
    )  # fmt: skip
