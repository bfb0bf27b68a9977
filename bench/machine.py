"""What every benchmark shares: the machine, versions and commit it ran on, timing by medians, the
machine's own rates, and how results are written. Knows no kernel and no engine."""

import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from windlass.doctor.tables import table as lines_of_table
from windlass.kernels.cpu.library import load
from windlass.kernels.cpu.native import NativeKernels
from windlass.kernels.reference import TorchKernels
from windlass.units import MIB
from windlass.version import VERSION

ROOT = Path(__file__).resolve().parent.parent
_FLAGS = ("avx2", "fma", "avx512f", "avx512_bf16", "amx_bf16")  # what decides a CPU kernel's rate
_LARGE_BYTES = 256 * MIB  # eight times the last-level cache of the machines we know
_TILE_BYTES = 8 * MIB  # of fp32; widened weights stay in the cache, as in kernels/reference.py


@dataclass(frozen=True, slots=True)
class Timing:
    """Seconds of repeated calls."""

    median_s: float
    min_s: float
    max_s: float
    repeats: int

    @property
    def spread(self) -> float:
        """Slowest minus fastest, as a share of the median."""
        return (self.max_s - self.min_s) / self.median_s

    def to_json(self) -> dict[str, float]:
        return {"median_s": self.median_s, "min_s": self.min_s, "max_s": self.max_s,
                "repeats": self.repeats}  # fmt: skip


_LEAST_S = 0.15  # a few short calls can all fall into one disturbance


def measure(call: Callable[[], object], *, repeats: int = 7, limit_s: float = 1.0) -> Timing:
    """Times `call` after one call that warms up: `repeats` times, fewer (but 3) past `limit_s`,
    more before `_LEAST_S`."""
    call()
    seconds: list[float] = []
    start = time.perf_counter()
    while True:
        begin = time.perf_counter()
        call()
        end = time.perf_counter()
        seconds.append(end - begin)
        is_enough = len(seconds) >= repeats and end - start >= _LEAST_S
        # the median of 3 survives one disturbed call
        if is_enough or (len(seconds) >= 3 and end - start >= limit_s):
            break
    return Timing(statistics.median(seconds), min(seconds), max(seconds), len(seconds))


@dataclass(frozen=True, slots=True)
class Rates:
    """What the machine does at best, measured with torch's own calls."""

    fp32_flops_per_s: float  # torch.mm of 2048 x 2048 x 2048
    read_bytes_per_s: float  # a plain read of memory
    widened_elements_per_s: float  # bf16 in memory to a tile of fp32 in the cache

    def to_json(self) -> dict[str, Any]:
        return {
            "fp32_flops_per_s": self.fp32_flops_per_s,
            "read_bytes_per_s": self.read_bytes_per_s,
            "widened_elements_per_s": self.widened_elements_per_s,
        }


def measure_rates(*, quick: bool = False) -> Rates:
    """About 2 s, or a fraction where `quick`."""
    # here: benches that compare code take all else in this file to older code, which lacks it
    from windlass.device.host_memory import HostAllocator

    size = 1024 if quick else 2048
    a, b, out = torch.randn(size, size), torch.randn(size, size), torch.empty(size, size)
    product = measure(lambda: torch.mm(a, b, out=out), repeats=15, limit_s=2)
    large = HostAllocator().empty((_LARGE_BYTES // 8 if quick else _LARGE_BYTES) // 4).fill_(1.0)
    threads = torch.get_num_threads()
    library = load()
    reader = TorchKernels() if isinstance(library, str) else NativeKernels(library, threads=threads)
    total = measure(lambda: reader.read(large), repeats=15)
    stored, tile = large.bfloat16(), torch.empty(_TILE_BYTES // 4)

    def widen() -> None:
        for part in torch.split(stored, tile.numel()):
            tile[: len(part)].copy_(part)

    widened = measure(widen, repeats=15)
    return Rates(
        fp32_flops_per_s=2 * size**3 / product.median_s,
        read_bytes_per_s=4 * large.numel() / total.median_s,
        widened_elements_per_s=large.numel() / widened.median_s,
    )


def set_threads(wanted: int | None) -> int:
    """Threads of torch: `wanted`, or all cores that this process may use."""
    torch.set_num_threads(wanted or len(os.sched_getaffinity(0)))
    return torch.get_num_threads()


def busy_core_s() -> float:
    """Seconds that cores of this machine have worked since it started, for anyone."""
    fields = [int(field) for field in Path("/proc/stat").read_text().split("\n")[0].split()[1:]]
    user, nice, system, _, _, interrupts, soft_interrupts = fields[:7]
    ticks = user + nice + system + interrupts + soft_interrupts
    return ticks / os.sysconf("SC_CLK_TCK")


def own_core_s() -> float:
    """Of these, by this process and the children it has waited for."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


class Others:
    """Cores that other processes kept busy since it was made. Above 0.1 the numbers are theirs."""

    def __init__(self) -> None:
        self._start_s = time.perf_counter()
        self._others_s = busy_core_s() - own_core_s()

    def cores(self) -> float:
        others_s = busy_core_s() - own_core_s() - self._others_s
        return max(0.0, others_s) / (time.perf_counter() - self._start_s)


def describe() -> dict[str, Any]:
    """Where, when and on what this runs. Call at the start: the load is the one found."""
    return {
        "command": shlex.join(["python", *sys.argv]),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": _git("rev-parse", "HEAD"),
        "is_modified": bool(_git("status", "--porcelain", "--", "src/*.py", "bench/*.py")),
        "versions": {
            "windlass": VERSION,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "blas": _blas(),
        },
        "machine": _machine(),
    }


def _blas() -> str:
    """Torch's own words for what multiplies matrices."""
    lines = torch.__config__.show().splitlines()
    return next((line.strip(" -") for line in lines if "Math Kernel Library" in line), "unknown")


def _machine() -> dict[str, Any]:
    info = _cpu_info()
    found = set(info.get("flags", "").split())
    return {
        "cpu": info.get("model name", platform.processor()),
        "family_model": f"{info.get('cpu family')}/{info.get('model')}",
        "cores": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "flags": [flag for flag in _FLAGS if flag in found],
        "cache": info.get("cache size"),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "kernel": f"{platform.system()} {platform.release()} {platform.machine()}",
        "load_average_1min": os.getloadavg()[0],
    }


def _cpu_info() -> dict[str, str]:
    """Fields of the first processor."""
    path = Path("/proc/cpuinfo")
    if not path.exists():
        return {}
    first = path.read_text().split("\n\n")[0]
    pairs = (line.partition(":") for line in first.splitlines())
    return {name.strip(): value.strip() for name, _, value in pairs}


def _git(*arguments: str) -> str | None:
    """None outside a repository, as in an unpacked archive."""
    try:
        done = subprocess.run(
            ["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns aligned right, the first one left."""
    return "\n".join(lines_of_table(heads, rows))


def head(described: dict[str, Any], rates: Rates) -> str:
    """The lines above the tables."""
    machine, versions = described["machine"], described["versions"]
    modified = " with changes" if described["is_modified"] else ""
    return "\n".join(
        (
            f"{machine['cpu']}, {machine['threads']} threads of {machine['cores']} cores, "
            f"{' '.join(machine['flags'])}, load {machine['load_average_1min']:.2f}",
            f"windlass {versions['windlass']} ({str(described['commit'])[:10]}{modified}), "
            f"torch {versions['torch']}, {described['date']}",
            f"fp32 product {rates.fp32_flops_per_s / 1e9:.0f} GFLOP/s, "
            f"memory read {rates.read_bytes_per_s / 1e9:.1f} GB/s, "
            f"bf16 widened {rates.widened_elements_per_s / 1e9:.2f} G elements/s",
        )
    )


def write(document: dict[str, Any], path: Path | None) -> None:
    """One line on standard output, always the last; in the file an entry of a list is a line."""
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(to_text(document), encoding="utf-8")
    print(json.dumps(document), flush=True)


def to_text(document: dict[str, Any]) -> str:
    """JSON for people and diffs: a field is a line, and so is each entry of a list of objects;
    numbers have six digits."""
    fields = []
    for name, value in document.items():
        text = json.dumps(_short(value))
        if isinstance(value, list) and value and isinstance(value[0], dict):
            entries = (json.dumps(_short(entry)) for entry in value)
            text = "[\n  " + ",\n  ".join(entries) + "\n ]"
        fields.append(f" {json.dumps(name)}: {text}")
    return "{\n" + ",\n".join(fields) + "\n}\n"


def _short(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, dict):
        return {name: _short(each) for name, each in value.items()}
    return [_short(each) for each in value] if isinstance(value, (list, tuple)) else value
