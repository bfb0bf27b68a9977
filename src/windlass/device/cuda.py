"""One CUDA device as torch has it: its memory, and copies to and from it. For measurements; nothing
computes models on it yet."""

from collections.abc import Callable

import torch

# ruff: noqa: TID251  this is the one place that may touch torch.cuda


class CudaDevice:
    """Implements doctor.device_rates.Accelerator. Copies of each direction run in a stream of their
    own, work in torch's current one."""

    def __init__(self) -> None:
        properties = torch.cuda.get_device_properties(0)
        self.device = torch.device("cuda:0")
        self.name: str = properties.name
        self.memory_bytes: int = properties.total_memory
        self._streams = {
            down: torch.cuda.Stream()  # type: ignore[no-untyped-call]
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
        torch.cuda.synchronize()


def find_cuda() -> CudaDevice | None:
    """The first GPU that torch can use; None without one."""
    return CudaDevice() if torch.cuda.is_available() else None
