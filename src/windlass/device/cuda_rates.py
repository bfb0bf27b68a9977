"""A CUDA device as measurements take it."""

from collections.abc import Callable

import torch

from windlass.device.cuda import CudaStream, cuda_index

# ruff: noqa: TID251  only device/ may touch torch.cuda


class MeasuredCuda:
    """Implements doctor.device_rates.Accelerator. Copies of each direction run in a stream of their
    own, work in torch's current one."""

    def __init__(self, index: int) -> None:
        properties = torch.cuda.get_device_properties(index)
        self.device = torch.device("cuda", index)
        self.name: str = properties.name
        self.memory_bytes: int = properties.total_memory
        self.capability: int = 10 * properties.major + properties.minor

    def copier(self, num_bytes: int, *, down: bool, pinned: bool) -> Callable[[], None]:
        """Starts a copy of `num_bytes` to the device (`down`) or from it, each time it is called;
        pageable copies return when they are done."""
        host = torch.zeros(num_bytes, dtype=torch.uint8, pin_memory=pinned)
        there = torch.zeros(num_bytes, dtype=torch.uint8, device=self.device)
        source, target = (host, there) if down else (there, host)
        stream = CudaStream(self.device, sleeps=False).of_torch

        def copy() -> None:
            with torch.cuda.stream(stream):
                target.copy_(source, non_blocking=pinned)

        return copy

    def synchronize(self) -> None:
        """Returns when all copies and all work have ended."""
        torch.cuda.synchronize(self.device)


def find_cuda(name: str) -> MeasuredCuda | None:
    """The GPU `name`, as `cuda_index` has it."""
    index = cuda_index(name)
    return None if index is None else MeasuredCuda(index)
