"""One thread per test process: tiny tensors gain nothing from more, and tests may share cores.
Tests of what threads change set their own number; their threads sleep while they wait, as those of
the processes that tests start, and leave the cores to the tests beside them."""

import os
from collections.abc import Iterator

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # read once, when torch is loaded

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
