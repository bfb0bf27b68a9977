"""One thread per test process: tiny tensors gain nothing from more, and tests may share cores.
Tests of what threads change set their own number; their threads sleep while they wait, as those of
the processes that tests start, and leave the cores to the tests beside them."""

import os
import tempfile
from collections.abc import Iterator

# what programs keep from run to run is no test's business, and none of the user's
os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp(prefix="windlass-tests-")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # read once, when torch is loaded

import pytest
import torch
from hypothesis import settings

from backends import NATIVE, kernels_of
from windlass.kernels.reference import TorchKernels
from windlass.kernels.row_counts import RowLadder

torch.set_num_threads(1)

# The same examples in every run: a failure is that of a change. `make test-all` takes new ones.
settings.register_profile("fixed", derandomize=True)
settings.register_profile("new")
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "fixed"))


@pytest.fixture(scope="module", params=["torch", *NATIVE])
def kernels(request: pytest.FixtureRequest) -> Iterator[TorchKernels]:
    """Every backend, one after the other."""
    with kernels_of(request.param) as found:
        yield found


def _remember_row_counts() -> None:
    """Which numbers of rows agree is a property of the library and the machine: here a process
    measures it once for each product, shape and number of threads, and not once for each engine."""
    measure = RowLadder._measure
    known: dict[object, tuple[int, ...]] = {}

    def remembered(self: RowLadder, shape: tuple[int, ...]) -> tuple[int, ...]:
        if self._like is not None:
            return measure(self, shape)
        key = self._product, self._steps, shape, torch.get_num_threads()
        if key not in known:
            known[key] = measure(self, shape)
        return known[key]

    RowLadder._measure = remembered  # type: ignore[method-assign]


_remember_row_counts()
