"""The kernel backends of this machine: torch's, and the native library's with each instruction set.
A test names the fixture `kernels` and runs with all of them."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest

from windlass.kernels.cpu import library
from windlass.kernels.cpu.native import NativeKernels
from windlass.kernels.reference import TorchKernels

LIBRARY = library.load()
SETS = [] if isinstance(LIBRARY, str) else library.instruction_sets(LIBRARY)
_MISSING = () if SETS else (pytest.mark.skip(reason=f"the native library {LIBRARY}"),)
NATIVE: Sequence[Any] = SETS or [pytest.param("native", marks=_MISSING)]
CPU = pytest.param("cpu", marks=_MISSING)  # the backend by its name, for tests of whole engines


@contextmanager
def kernels_of(
    name: str, *, threads: int = 1, bf16_activations: bool = False
) -> Iterator[TorchKernels]:
    """The backend `name`: "torch" or an instruction set. Afterwards the best set is in use."""
    if name == "torch":
        yield TorchKernels(bf16_activations=bf16_activations)
        return
    assert not isinstance(LIBRARY, str), f"the native library {LIBRARY}"
    library.use(LIBRARY, name)
    try:
        yield NativeKernels(LIBRARY, threads=threads, bf16_activations=bf16_activations)
    finally:
        library.use(LIBRARY, SETS[-1])
        LIBRARY.wl_set_threads(1)
