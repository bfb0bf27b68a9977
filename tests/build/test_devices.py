"""Which GPU an engine gets, how much of it and on what kernels; whole engines through
device/cuda.py, over a torch.cuda that is not there."""

from contextlib import ExitStack
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from engines import request, run_all
from fake_torch_cuda import FakeTorchCuda, fake_cuda
from windlass.build import devices
from windlass.build.devices import LATER_BYTES, Gpu, limit, open_gpu, weighed
from windlass.build.open import open_engine
from windlass.checkpoint.folder import read_model
from windlass.device.cuda import CudaDevice
from windlass.errors import BudgetError, UsageError
from windlass.ids import HOST, Part, Route
from windlass.kernels import select_device
from windlass.kernels.select import choose_kernels, device_backend, host_backend
from windlass.kernels.select_device import choose_device_kernels
from windlass.options import EngineOptions
from windlass.trace import Tracer
from windlass.units import GIB, MIB

__all__ = ["fake_cuda"]  # a fixture
SMALL = EngineOptions(
    device="cuda", max_model_len=64, max_num_seqs=2, moe_backend="torch", threads=1,
    moe_expert_cache_size="8", host_memory=4 * GIB,
)  # fmt: skip


@pytest.fixture
def on_cpu(fake_cuda: FakeTorchCuda, monkeypatch: pytest.MonkeyPatch) -> FakeTorchCuda:
    """The GPU's memory is the CPU's."""
    place = SimpleNamespace(device=lambda *name: torch.device("cpu"))
    monkeypatch.setattr(devices, "torch", place)
    return fake_cuda


def gpu_of(options: EngineOptions) -> Gpu:
    gpu = open_gpu(options, Tracer())
    assert gpu is not None
    gpu.device.close()
    return gpu


def answer(options: EngineOptions):
    """What the demo says, which links moved what, and the plan."""
    with open_engine(options) as engine:
        assert ("plan: computes on Fake GPU (cuda:0)" in engine.notes) == bool(engine.plan.above)
        found = run_all(engine, [request("a", range(40, 50), max_tokens=3, logprobs=2)])
        return found["a"].outputs[0], engine.stats().weights, engine.plan


def test_an_engine_through_all_of_it_says_what_a_cpu_says(on_cpu):
    there, stats, plan = answer(SMALL)
    here, *_ = answer(replace(SMALL, device="cpu"))
    assert there == here
    assert plan.above is not None and plan.above.budget_bytes == GIB + int(0.9 * 7 * GIB)
    assert plan.above.process_bytes == GIB + LATER_BYTES
    assert stats.link_bytes[Route(HOST, "device")] > 0 and stats.evictions > 0
    assert not on_cpu.registered and on_cpu.fraction == 1.0, "all was given back"
    kinds = {call[:2] for call in on_cpu.calls}
    assert {("wait", "down"), ("record", "down"), ("wait", "up"), ("record", "up")} < kinds


def test_its_plan_can_be_replayed_and_one_of_the_cpu_leaves_the_gpu_alone(on_cpu):
    first, _, plan = answer(SMALL)
    bare = EngineOptions(moe_backend="torch", threads=1, max_model_len=64)
    again, _, same = answer(replace(bare, plan=plan))
    assert again == first and same == plan
    *_, plain = answer(replace(SMALL, device="cpu", host_memory=2 * GIB))
    del on_cpu.calls[:]
    *_, same = answer(replace(bare, plan=plain))
    assert same == plain and not on_cpu.calls


def test_a_failure_on_the_way_gives_all_back(on_cpu, monkeypatch):
    monkeypatch.setattr("windlass.build.open.limit", lambda gpu, plan: 1 // 0)
    on_cpu.fraction = 0.5
    with pytest.raises(ZeroDivisionError):
        open_engine(SMALL)
    assert on_cpu.fraction == 1.0 and not on_cpu.registered


def test_a_gpu_that_fails_is_an_error_or_said_once(on_cpu, monkeypatch, caplog):
    def fail(*args: object, **options: object) -> None:
        raise RuntimeError("CUDA error: all devices are busy\nmore")

    monkeypatch.setattr(torch.cuda, "Stream", fail)
    with pytest.raises(UsageError, match="got 'cuda', which fails: CUDA error: all devices are bu"):
        open_gpu(SMALL, Tracer())
    assert open_gpu(replace(SMALL, device="auto"), Tracer()) is None
    assert caplog.messages == [
        "device auto: the CPU computes alone: cuda:0 fails: CUDA error: all devices are busy"
    ]


def test_device_memory_without_a_gpu_is_said(on_cpu, monkeypatch, caplog):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert open_gpu(replace(SMALL, device="auto"), Tracer()) is None and not caplog.messages
    assert open_gpu(replace(SMALL, device="auto", device_memory=GIB), Tracer()) is None
    assert caplog.messages[0].startswith("device_memory: the CPU computes alone: torch ")


def test_what_is_taken_counts_and_no_more_is_allocated_than_is_left(on_cpu):
    gpu = gpu_of(SMALL)
    with ExitStack() as opened:
        model = read_model(SMALL, opened)
        found = weighed(gpu, model, replace(SMALL, device_memory=3 * GIB), "torch")
        assert (found.budget_bytes, found.process_bytes) == (3 * GIB, GIB + LATER_BYTES)
        assert found.backend == "torch" and found.slot_bytes[Part.EXPERT] % 4096 == 0
        with pytest.raises(UsageError, match="got 9.00 GiB, allowed up to 8192MiB: .* Fake GPU"):
            weighed(gpu, model, replace(SMALL, device_memory=9 * GIB), "torch")
    *_, plan = answer(SMALL)
    host, above = plan.tiers
    limit(gpu, replace(plan, tiers=(host, replace(above, budget_bytes=3 * GIB))))
    outside = GIB - 5 * MIB  # of what is taken torch has 5 MiB
    assert on_cpu.fraction == (3 * GIB - LATER_BYTES - outside) / (8 * GIB)
    with pytest.raises(BudgetError, match="got 1.00 GiB, of which 1.00 GiB is taken already"):
        limit(gpu, replace(plan, tiers=(host, replace(above, budget_bytes=GIB))))


def test_torchs_kernels_make_their_tensors_on_the_device():
    device = torch.device("meta")
    meta = choose_device_kernels("torch", device, capability=86, bf16_activations=False)
    assert meta.pointwise(torch.sigmoid, torch.ones(3, device=device)).device == device


def test_a_name_of_its_own_for_each_of_several_devices(fake_cuda):
    device = CudaDevice(torch.device("cpu"), name="second")
    assert device.allocate(10).tier == "second" and device.capability == 86
    device.close()


def test_tritons_kernels_by_their_name_are_a_gpus_alone(on_cpu, monkeypatch):
    """And are no matter of chance there: without Triton it is an error."""
    monkeypatch.setattr(select_device, "find_spec", lambda name: None)
    by_name = replace(SMALL, moe_backend="triton")
    with pytest.raises(UsageError, match="got 'triton', which is not installed"):
        gpu_of(by_name).make_kernels()
    for name, here, there in (
        ("triton", "auto", "triton"), ("cpu", "cpu", "auto"), ("torch", "torch", "torch")
    ):  # fmt: skip
        assert (host_backend(name), device_backend(name)) == (here, there)
    with pytest.raises(UsageError, match="got 'triton' for a CPU, allowed auto, torch or cpu"):
        choose_kernels("triton", threads=1, bf16_activations=False)
    with pytest.raises(UsageError, match="got 'triton', allowed with device auto or cuda"):
        replace(by_name, device="cpu")
