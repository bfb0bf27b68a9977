"""Which kernels a run uses on a CUDA device. Chosen once, at the start."""

import logging
from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from typing import Any, cast

import torch

from windlass.device.base import Allocator
from windlass.errors import UsageError
from windlass.kernels.cuda_graphs import GraphCaptures
from windlass.kernels.interface import Kernels
from windlass.kernels.reference import TorchKernels

_logger = logging.getLogger(__name__)


def choose_device_kernels(
    backend: str,
    device: torch.device,
    *,
    capability: int,
    bf16_activations: bool,
    captures: GraphCaptures | None = None,
    memory: Allocator | None = None,
) -> Kernels:
    """`backend`: "triton", "torch" (slower many times over: what the other is compared with), or
    "auto": Triton's where it is installed, else torch's with one warning that says so.
    `capability`: 90 for sm_90. `captures`: of graphs, which Triton's have. `memory`: of the
    device, where passes are to run on it. UsageError for what the device cannot do."""
    if backend not in ("auto", "triton", "torch"):
        raise UsageError(f"moe_backend: got {backend!r} for a GPU, allowed auto, triton or torch")
    has_triton = find_spec("triton") is not None
    if backend == "triton" and not has_triton:
        raise UsageError("moe_backend: got 'triton', which is not installed: allowed auto or torch")
    if backend != "torch" and has_triton:
        from windlass.kernels.cuda import CudaKernels  # triton, where there is one

        return CudaKernels(
            capability, bf16_activations=bf16_activations, captures=captures, memory=memory
        )
    if backend == "auto":
        _warn_once()

    def make() -> Kernels:
        return TorchKernels(bf16_activations=bf16_activations)

    return cast(Kernels, _Placed(device, make))


class _Placed:
    """Kernels that make their tensors on `device`."""

    def __init__(self, device: torch.device, make: Callable[[], Kernels]) -> None:
        self._device = device
        with device:
            self._kernels = make()

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._kernels, name)
        if not callable(found):
            return found

        def call(*args: Any, **kwargs: Any) -> Any:
            with self._device:
                return found(*args, **kwargs)

        return call


@cache
def _warn_once() -> None:
    _logger.warning("kernels: triton is not installed; torch's are used, which are much slower")
