"""What the bits of results depend on beside a plan and the names of kernels: instruction sets and
devices."""

import torch

from windlass.device.cuda import cuda_name
from windlass.kernels.cpu.library import in_use, load


def arithmetic_words(kernels: str, *, has_device: bool) -> str:
    """Of this machine, for an engine with these kernels of the host's."""
    words = [f"torch {torch.__version__} {torch.backends.cpu.get_cpu_capability()}"]
    library = load()
    if kernels == "cpu" and not isinstance(library, str):
        words.insert(0, in_use(library))
    if has_device:
        words.append(cuda_name())
    return ", ".join(words)
