"""Which kernels a run uses. Chosen once, at the start."""

import logging
from functools import cache

import torch

from windlass.errors import UsageError
from windlass.kernels.cpu import library
from windlass.kernels.cpu.native import NativeKernels
from windlass.kernels.interface import Kernels
from windlass.kernels.reference import TorchKernels

_logger = logging.getLogger(__name__)


def choose_kernels(backend: str, *, threads: int, bf16_activations: bool) -> Kernels:
    """`backend`: "cpu" (native, or UsageError), "torch", or "auto": native where it can run, else
    torch with one warning that says so. `bf16_activations`: products round their rows to bf16."""
    if backend == "triton":
        raise UsageError("moe_backend: got 'triton' for a CPU, allowed auto, torch or cpu")
    torch.set_num_threads(threads)
    if backend == "torch":
        return TorchKernels(bf16_activations=bf16_activations)
    found = library.load()
    if not isinstance(found, str):
        # what little torch still does must not spin beside the library's own threads
        torch.set_num_threads(1)
        return NativeKernels(found, threads=threads, bf16_activations=bf16_activations)
    if backend == "cpu":
        raise UsageError(f"moe_backend: got 'cpu', but the native library {found}")
    _warn_once(found)
    return TorchKernels(bf16_activations=bf16_activations)


def host_backend(backend: str) -> str:
    """What computes on the host beside a GPU, where `backend` may be one of a GPU."""
    return "auto" if backend == "triton" else backend


def device_backend(backend: str) -> str:
    """What computes on a GPU, where `backend` may be one of the host."""
    return "auto" if backend == "cpu" else backend


@cache
def _warn_once(found: str) -> None:
    """Kernels are chosen for a run and for every kept report that might fit it."""
    _logger.warning(
        "kernels: the native library %s; torch's are used (few rows: up to 10 times slower)", found
    )
