"""What this process runs on, in words and numbers: processor, memory, software, and the disk of a
path. Reads /proc and /sys; measures nothing."""

import os
import platform
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from windlass.device.process_memory import available_bytes, memory_limits
from windlass.kernels.cpu import library
from windlass.kernels.interface import Kernels
from windlass.version import VERSION

_PROC = Path("/proc")
# What decides a CPU kernel's rate
_FEATURES = ("avx2", "fma", "f16c", "avx512f", "avx512_bf16", "avx512_vnni", "amx_bf16",
             "amx_int8")  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Disk:
    """Where a path lies. `file_system`: its type; `device`: what is mounted; bytes throughout."""

    path: str
    mount: str
    file_system: str
    device: str
    total_bytes: int
    free_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Environment:
    """Everything that a measurement depends on; bytes throughout."""

    cpu: str
    features: tuple[str, ...]
    cores: int  # that this process may use
    machine_cores: int
    threads: int  # of computation
    cache: str  # last level
    memory_bytes: int  # that this process may use: of the machine, or the smallest limit on it
    available_bytes: int
    limits: tuple[int, ...]  # of memory cgroups, below the machine's memory
    kernels: str
    windlass: str
    torch: str
    python: str
    system: str
    disk: Disk
    gpu: str | None

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @property
    def software(self) -> str:
        return f"windlass {self.windlass}, torch {self.torch}, kernels {self.kernels}"


def read_environment(
    path: Path, kernels: Kernels, *, threads: int, gpu: str | None, proc: Path = _PROC
) -> Environment:
    """Of this process, with the disk under `path`."""
    info = _cpu_info(proc)
    physical = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limits = tuple(one.limit for one in memory_limits() if one.limit < physical)
    found = set(info.get("flags", info.get("Features", "")).split())
    return Environment(
        cpu=info.get("model name") or platform.processor() or platform.machine(),
        features=tuple(name for name in _FEATURES if name in found),
        cores=len(os.sched_getaffinity(0)),
        machine_cores=os.cpu_count() or 1,
        threads=threads,
        cache=info.get("cache size", "unknown"),
        memory_bytes=min([physical, *limits]),
        available_bytes=available_bytes(),
        limits=limits,
        kernels=kernels_name(kernels),
        windlass=VERSION,
        torch=torch.__version__,
        python=platform.python_version(),
        system=f"{platform.system()} {platform.release()} {platform.machine()}",
        disk=disk_of(path, proc=proc),
        gpu=gpu,
    )


def kernels_name(kernels: Kernels) -> str:
    """The backend, its instruction set, and where it rounds rows, that."""
    found = library.load()
    if kernels.name != "cpu" or isinstance(found, str):
        return kernels.name
    return f"{kernels.name} ({library.in_use(found)})"


def disk_of(path: Path, *, proc: Path = _PROC) -> Disk:
    """The file system that `path`, or the nearest folder above that exists, lies on."""
    path = path.absolute()
    existing = next(one for one in (path, *path.parents) if one.exists()).resolve()
    mount, kind, device = _mount_of(existing, proc)
    usage = shutil.disk_usage(existing)
    return Disk(
        path=str(path),
        mount=mount,
        file_system=kind,
        device=device,
        total_bytes=usage.total,
        free_bytes=usage.free,
    )


def _mount_of(path: Path, proc: Path) -> tuple[str, str, str]:
    """Mount point, type and device: of the longest mount point above `path`; the last mounted of
    equals hides the others."""
    best = ("/", "unknown", "unknown")
    table = proc / "self/mountinfo"
    for line in table.read_text().splitlines() if table.exists() else []:
        before, _, after = line.partition(" - ")
        mount = before.split()[4].replace("\\040", " ")
        kind, device, *_ = after.split()
        if path.is_relative_to(mount) and len(mount) >= len(best[0]):
            best = (mount, kind, device)
    return best


def _cpu_info(proc: Path) -> dict[str, str]:
    """Fields of the first processor."""
    path = proc / "cpuinfo"
    if not path.exists():
        return {}
    first = path.read_text().split("\n\n")[0]
    pairs = (line.partition(":") for line in first.splitlines())
    return {name.strip(): value.strip() for name, _, value in pairs}
