"""One CUDA device as torch has it: its memory, and copies to and from it. For measurements; nothing
computes models on it yet."""

from collections.abc import Callable

import torch

from windlass.errors import UsageError
from windlass.options import AUTO, CPU

# ruff: noqa: TID251  this is the one place that may touch torch.cuda


class CudaDevice:
    """Implements doctor.device_rates.Accelerator. Copies of each direction run in a stream of their
    own, work in torch's current one."""

    def __init__(self, index: int) -> None:
        properties = torch.cuda.get_device_properties(index)
        self.device = torch.device("cuda", index)
        self.name: str = properties.name
        self.memory_bytes: int = properties.total_memory
        self._streams = {
            down: torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]
            for down in (True, False)
        }

    def copier(self, num_bytes: int, *, down: bool, pinned: bool) -> Callable[[], None]:
        """Starts a copy of `num_bytes` to the device (`down`) or from it, each time it is called;
        pageable copies return when they are done."""
        host = torch.zeros(num_bytes, dtype=torch.uint8, pin_memory=pinned)
        there = torch.zeros(num_bytes, dtype=torch.uint8, device=self.device)
        source, target = (host, there) if down else (there, host)
        stream = self._streams[down]

        def copy() -> None:
            with torch.cuda.stream(stream):
                target.copy_(source, non_blocking=pinned)

        return copy

    def synchronize(self) -> None:
        """Returns when all copies and all work have ended."""
        torch.cuda.synchronize(self.device)


def cuda_index(name: str) -> int | None:
    """Which GPU of torch's the device `name` is; None for "cpu", and for "auto" without one.
    UsageError where it is asked for by its name and is not there."""
    if name == CPU:
        return None
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name == AUTO:
        return 0 if count else None
    if not count:
        raise UsageError(f"device: got {name!r}, allowed auto or cpu: {why_none()}")
    index = int(name.partition(":")[2] or 0)
    if index >= count:
        allowed = " to ".join(f"cuda:{one}" for one in sorted({0, count - 1}))
        raise UsageError(f"device: got {name!r}, allowed {allowed}: torch finds {count} of them")
    return index


def why_none() -> str:
    """What torch has in place of a GPU."""
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA"
    return (
        f"torch {torch.__version__} (CUDA {torch.version.cuda}) finds no GPU: no driver, one that"
        " is too old, or none is visible"
    )


def find_cuda(name: str) -> CudaDevice | None:
    """The GPU `name`, as `cuda_index` has it."""
    index = cuda_index(name)
    return None if index is None else CudaDevice(index)
