"""Compiles what host code launches, on a machine without a GPU, and reads what ptxas made of it.

A driver that has a target and no device: launches go through the ordinary code, so kernels are
compiled with the very specialisations of a real launch (divisibility by 16, values of 1), and
nothing runs. In a process without TRITON_INTERPRET; it takes Triton's launches over for good.
"""

import re
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase
from triton.runtime import driver
from triton.runtime.jit import JITFunction

_CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
_INSTRUCTION = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\d+ )?([A-Z0-9_.]+)", re.M)
_USAGE = re.compile(r"REG:(\d+)")
_MMA = re.compile(r"^(HMMA|IMMA|QMMA|HGMMA|IGMMA|QGMMA|UTC[A-Z]*MMA)\b")


class Resources(NamedTuple):
    """Of one compiled kernel."""

    registers: int  # of a thread
    spills: int  # instructions that load or store a register in memory
    shared: int  # bytes
    mma: str  # the instruction that multiplies matrices; "" for none
    mma_count: int
    widest_load: int  # bytes that one instruction takes from global memory
    narrow_loads: int  # instructions that take less than 8 bytes: of scales, slots and the like
    instructions: int
    warps: int


class _NoGpu(DriverBase):
    def __init__(self, capability: int) -> None:
        super().__init__()
        self._target = GPUTarget("cuda", capability, 32)
        self.get_current_device = lambda: capability
        self.get_current_stream = lambda device: 0

    @classmethod
    def is_active(cls) -> bool:
        return False

    def get_current_target(self) -> Any:
        return self._target

    def get_active_torch_device(self) -> Any:
        raise NotImplementedError("there is no device")

    def map_python_to_cpp_type(self, ty: str) -> str:
        return ty

    def get_benchmarker(self) -> Any:
        raise NotImplementedError("nothing runs")


def compiled(capability: int, launch: Callable[[], object]) -> dict[str, Any]:
    """The kernels that `launch` launches on such an architecture (90 for sm_90), by name."""
    found: dict[str, Any] = {}

    def only_compile(self: Any, grid: Any) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> None:
            kernel = self.warmup(*args, grid=grid, **kwargs)
            assert found.setdefault(self.__name__, kernel).hash == kernel.hash, "two of one name"

        return call

    driver.set_active(_NoGpu(capability))
    JITFunction.__getitem__ = only_compile
    launch()
    return found


def resources(kernel: Any) -> Resources:
    """What ptxas made of a kernel, read from its machine code."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        text = subprocess.run(
            [_CUOBJDUMP, "-res-usage", "-sass", file.name],
            capture_output=True, text=True, check=True,
        ).stdout  # fmt: skip
    instructions = _INSTRUCTION.findall(text)
    registers = _USAGE.search(text)
    assert registers and instructions, "cuobjdump: nothing that looks like SASS"
    mma = [i for i in instructions if _MMA.match(i)]
    loads = [size for i in instructions if (size := _loaded_bytes(i))]
    return Resources(
        registers=int(registers[1]),
        spills=sum(i.split(".")[0] in ("LDL", "STL") for i in instructions),
        shared=kernel.metadata.shared,
        mma=".".join(mma[0].split(".")[:2]) if mma else "",
        mma_count=len(mma),
        widest_load=max(loads),
        narrow_loads=sum(size < 8 for size in loads),
        instructions=len(instructions),
        warps=kernel.metadata.num_warps,
    )


def _loaded_bytes(instruction: str) -> int:
    """That an instruction takes from global memory."""
    name, *options = instruction.split(".")
    if name not in ("LDG", "LDGSTS"):
        return 0
    for option, size in (("128", 16), ("64", 8), ("U8", 1), ("S8", 1), ("U16", 2), ("S16", 2)):
        if option in options:
            return size
    return 4
