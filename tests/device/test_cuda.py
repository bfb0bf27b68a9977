"""What is asked of torch about GPUs, where there is none and where there are some."""

import pytest
import torch

from windlass.device.cuda import cuda_index, find_cuda
from windlass.errors import UsageError


def machine(monkeypatch: pytest.MonkeyPatch, count: int, cuda: str | None = "13.0") -> None:
    """As if torch had `count` GPUs and was built for `cuda`."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    monkeypatch.setattr(torch.version, "cuda", cuda)


@pytest.mark.parametrize(
    ("name", "index"), [("auto", 0), ("cpu", None), ("cuda", 0), ("cuda:0", 0), ("cuda:1", 1)]
)
def test_names_of_gpus(monkeypatch, name, index):
    machine(monkeypatch, 2)
    assert cuda_index(name) == index


def test_a_gpu_that_is_not_there_is_one_error(monkeypatch):
    machine(monkeypatch, 0)
    assert cuda_index("auto") is None and find_cuda("auto") is None
    with pytest.raises(
        UsageError, match=r"device: got 'cuda', allowed auto or cpu: torch .* \(CUDA"
    ):
        cuda_index("cuda")
    machine(monkeypatch, 0, cuda=None)
    with pytest.raises(UsageError, match="device: got 'cuda:1', .* is built without CUDA"):
        find_cuda("cuda:1")
    machine(monkeypatch, 1)
    with pytest.raises(UsageError, match="got 'cuda:1', allowed cuda:0: torch finds 1 of them"):
        cuda_index("cuda:1")
    machine(monkeypatch, 3)
    with pytest.raises(UsageError, match="got 'cuda:3', allowed cuda:0 to cuda:2: torch finds 3"):
        cuda_index("cuda:3")
