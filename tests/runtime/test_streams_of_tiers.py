"""The whole engine on a device with streams over a tier of pinned memory: files are read into slots
that copies have left, and copied into slots that kernels have."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from engines import engine_for, make_model, prompts, request, run_all
from fake_cuda import FakeCuda, on_device
from fake_streams import Race
from windlass.build.open import open_engine
from windlass.ids import HOST, Part
from windlass.kernels.reference import TorchKernels
from windlass.options import EngineOptions
from windlass.plan import Plan, TierPlan

FAMILIES = ("qwen3_moe", "deepseek_v3", "gpt_oss", "qwen3_next")
BELOW = {Part.EXPERT: 4, Part.BLOCK: 2, Part.FFN: 1, Part.HEAD: 1, Part.EMBED: 0}
ABOVE = {Part.EXPERT: 3, Part.BLOCK: 2, Part.FFN: 1, Part.HEAD: 1, Part.EMBED: 0}


def _requests():
    return [
        request(f"r{i}", prompt, max_tokens=1 + i, logprobs=2)
        for i, prompt in enumerate(prompts((20, 3, 9)))
    ]


def _tier(tier: TierPlan, name: str, slots: dict[Part, int]) -> TierPlan:
    parts = tuple(
        replace(own, slots=min(slots.get(own.part, own.slots), own.slots), slot_bytes=None)
        for own in tier.parts
    )
    return replace(tier, name=name, parts=parts, kept_states=0)


def _run(path: Path, plan: Plan, device: FakeCuda, count: int = 3):
    tiers = (_tier(plan.host, HOST, BELOW), _tier(plan.host, device.name, ABOVE))
    options = EngineOptions(
        model=str(path), plan=replace(plan, tiers=tiers), generation_config="vllm",
        moe_backend="torch",
    )  # fmt: skip
    kernels = on_device(device, TorchKernels)
    with (
        device.watched(),
        open_engine(options, device=device.below, above=device, kernels=kernels) as engine,
    ):
        engine._weights._queue.changed.wait = device.wait  # type: ignore[method-assign]
        results = run_all(engine, _requests()[:count])
        return {name: one.outputs[0] for name, one in results.items()}


@pytest.fixture(scope="module", params=FAMILIES)
def model(request, tmp_path_factory):
    path = tmp_path_factory.mktemp(request.param)
    make_model(request.param, path, dtype=torch.bfloat16)
    with engine_for(path, moe_backend="torch") as engine:
        results = run_all(engine, _requests())
        return path, engine.plan, {name: one.outputs[0] for name, one in results.items()}


def test_no_race_whatever_the_moments_and_what_a_cpu_says(model):
    path, plan, on_cpu = model
    device = FakeCuda(name="device", seed=1)
    assert _run(path, plan, device) == on_cpu
    assert not device.memory.races and device.num_copies > 100


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(50))
def test_nor_at_any_other(model, seed):
    path, plan, on_cpu = model
    device = FakeCuda(name="device", seed=seed, late=(0.5, 0.9, 1.0)[seed % 3])
    assert _run(path, plan, device) == on_cpu
    assert not device.memory.races


@pytest.mark.parametrize("model", ["qwen3_moe"], indirect=True)
def test_without_any_wait_or_event_it_has_one(model):
    path, plan, _ = model
    whole = FakeCuda(name="device", seed=2)
    _run(path, plan, whole, 1)
    for point in whole.order.points:
        device = FakeCuda(name="device", seed=2, without=point)
        with pytest.raises(Race, match="nothing orders them"):
            _run(path, plan, device, 1)
    assert len(whole.order.points) == 8
