"""One thread per test process: tiny tensors gain nothing from more, and tests may share cores.
Tests of what threads change set their own number."""

from collections.abc import Iterator

import pytest
import torch

from backends import NATIVE, kernels_of
from windlass.kernels.reference import TorchKernels

torch.set_num_threads(1)


@pytest.fixture(scope="module", params=["torch", *NATIVE])
def kernels(request: pytest.FixtureRequest) -> Iterator[TorchKernels]:
    """Every backend, one after the other."""
    with kernels_of(request.param) as found:
        yield found
