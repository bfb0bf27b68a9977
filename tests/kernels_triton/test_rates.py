"""What `windlass doctor` measures of a GPU's experts, by the kernels that a run has there."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from windlass.doctor import device_rates
from windlass.doctor.timing import Timing
from windlass.kernels.cuda import CudaKernels


@pytest.mark.parametrize("kind", ["bfloat16", "float32"])
def test_experts_are_measured_in_one_launch_and_computed(kind, monkeypatch):
    """Of one memory, as slots are; each call fills its output."""
    found, calls = [], []

    def time(self, name, measured, *, batch=8):
        for call in measured:
            call()
            found.append(call.__defaults__[2])
        return Timing((1.0,))

    monkeypatch.setattr(device_rates._Bench, "_time", time)
    kernels = CudaKernels(90, bf16_activations=kind == "bfloat16")
    real = kernels.experts

    def experts(x_TD, weights, *rest):
        calls.append(
            (len(weights), len({w["up"].untyped_storage().data_ptr() for w in weights.values()}))
        )
        real(x_TD, weights, *rest)

    monkeypatch.setattr(kernels, "experts", experts)
    shapes = device_rates.Shapes(rows=(1, 2), hidden=64, intermediate=32, cold_bytes=1)
    accelerator: Any = SimpleNamespace(device=torch.device("cpu"))
    with torch.inference_mode():
        curve = device_rates._Bench(accelerator, shapes, kernels)._experts(
            kind, getattr(torch, kind)
        )
    flops = 8 * 6 * 64 * 32
    assert curve.points == ((1, flops), (2, 2 * flops))
    assert calls == [(8, 1), (8, 1)]
    assert [tuple(out.shape) for out in found] == [(8, 64), (16, 64)]
    assert all(out.isfinite().all() and out.abs().sum() > 0 for out in found)
