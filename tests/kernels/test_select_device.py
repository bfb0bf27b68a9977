"""Which kernels a CUDA device gets, where Triton is not installed (tests/kernels_triton: where it
is)."""

import pytest
import torch

from windlass.errors import UsageError
from windlass.kernels import select_device
from windlass.kernels.interface import Kernels
from windlass.kernels.select_device import choose_device_kernels

DEVICE = torch.device("cpu")  # stands for one


def _choose(backend: str) -> Kernels:
    return choose_device_kernels(backend, DEVICE, capability=90, bf16_activations=True)


@pytest.fixture(autouse=True)
def without_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(select_device, "find_spec", lambda name: None)
    select_device._warn_once.cache_clear()


def test_torch_stands_in_and_says_so_once(caplog: pytest.LogCaptureFixture) -> None:
    for _ in range(2):
        assert _choose("auto").name == "torch"
    assert [r.getMessage() for r in caplog.records] == [
        "kernels: triton is not installed; torch's are used, which are much slower"
    ]


def test_torch_by_its_name_is_no_surprise(caplog: pytest.LogCaptureFixture) -> None:
    kernels = _choose("torch")
    assert kernels.name == "torch" and not caplog.records
    x, w = torch.ones(2, 4), torch.ones(3, 4)
    assert torch.equal(kernels.linear(x, w), torch.full((2, 3), 4.0))


@pytest.mark.parametrize(("backend", "reason"), [
    ("triton", "got 'triton', which is not installed: allowed auto or torch"),
    ("cpu", "got 'cpu' for a GPU, allowed auto, triton or torch"),
])  # fmt: skip
def test_what_there_is_not_is_refused(backend: str, reason: str) -> None:
    with pytest.raises(UsageError, match=reason):
        _choose(backend)
