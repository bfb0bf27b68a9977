"""Whole engines whose passes the kernels of a CUDA device compute, in the interpreter, over slots
laid out as a device's: against torch, and row by row."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from engines import FAMILIES, engine_for, logprob_rows, make_model, prompts, request, run_all
from windlass.build.open import open_engine
from windlass.device.cpu import CpuDevice
from windlass.device.streams import HostStreams
from windlass.engine.engine import Engine
from windlass.kernels.cuda import CudaKernels
from windlass.kernels.reference import TorchKernels
from windlass.options import EngineOptions
from windlass.plan import Plan

DECODED = ("gpt_oss", "deepseek_v3", "qwen3_next")
LENGTHS = (6, 3)
TOLERANCE = 1e-4  # absolute, of log-probabilities; logits are of order 1


def _logprobs(engine: Engine, lengths: tuple[int, ...], steps: int = 2) -> list[torch.Tensor]:
    texts = prompts(lengths)
    requests = [
        request(str(i), prompt, max_tokens=steps, logprobs=-1) for i, prompt in enumerate(texts)
    ]
    results = run_all(engine, requests)
    return [logprob_rows(results[str(i)]) for i in range(len(requests))]


def _on_device(
    path: Path,
    plan: Plan,
    kernels: CudaKernels,
    device: CpuDevice | None = None,
    *,
    enforce_eager: bool = False,
) -> Engine:
    """With all weights in slots above the host's."""
    parts = tuple(
        replace(own, slots=own.num_parts or own.slots, slot_bytes=None) for own in plan.host.parts
    )
    tiers = plan.host, replace(plan.host, name="device", parts=parts, kept_states=0)
    options = EngineOptions(
        model=str(path), plan=replace(plan, tiers=tiers), generation_config="vllm",
        kv_cache_dtype="float32", enforce_eager=enforce_eager,
    )  # fmt: skip
    above = device or CpuDevice(1, name="device")
    return open_engine(options, above=above, kernels=kernels)


class _Told(CpuDevice):
    """Memory of a device that runs ahead, for tables and lists of a pass: it counts what it is
    told."""

    def __init__(self) -> None:
        super().__init__(1, name="device")
        self.streams = HostStreams()
        self.streams.runs_ahead = True
        self.num_told = 0

    def tensor(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        self.num_told += 1
        return super().tensor(*args, **kwargs)


def test_a_pass_tells_the_device_all_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tiles and pages of attention too, in windows and out of them, and nothing by torch, which
    would wait. Where experts are is told as they come: with few rows those that were chosen, with
    many all, once, as they stay."""
    make_model("gpt_oss", tmp_path, dtype=torch.bfloat16)
    with engine_for(tmp_path, kernels=TorchKernels(), kv_cache_dtype="float32") as engine:
        plan = engine.plan
    device, told = _Told(), []
    kernels = CudaKernels(80, memory=device)
    monkeypatch.setattr(torch.Tensor, "new_tensor", None, raising=False)
    with _on_device(tmp_path, plan, kernels, device, enforce_eager=True) as engine:
        layers = sum(one.network == "experts" for one in engine._parts.shape.layers)
        for job in range(2):
            for i, prompt in enumerate(prompts(LENGTHS, seed=job)):
                engine.add(request(f"{job}-{i}", prompt, max_tokens=2))
            while engine.has_work:
                before = device.num_told
                engine.step()
                told.append(device.num_told - before)
    assert told[1:] == [1 + layers, 1, 1 + layers]


@pytest.mark.parametrize("family", [f for f in FAMILIES if f not in DECODED])
def test_a_prompt_of_every_family_as_with_torch(family: str, tmp_path: Path) -> None:
    make_model(family, tmp_path, dtype=torch.bfloat16)
    with engine_for(tmp_path, kernels=TorchKernels(), kv_cache_dtype="float32") as engine:
        want, plan = _logprobs(engine, (5,), 1), engine.plan
    with _on_device(tmp_path, plan, CudaKernels(80)) as engine:
        (got,) = _logprobs(engine, (5,), 1)
    assert (got - want[0]).abs().max() < TOLERANCE


@pytest.mark.parametrize("family", DECODED)
def test_prompts_and_decoding_as_with_torch_and_to_the_bits_of_a_row_alone(
    family: str, tmp_path: Path
) -> None:
    make_model(family, tmp_path, dtype=torch.bfloat16)
    with engine_for(tmp_path, kernels=TorchKernels(), kv_cache_dtype="float32") as engine:
        want, plan = _logprobs(engine, LENGTHS), engine.plan
    with _on_device(tmp_path, plan, CudaKernels(80)) as engine:
        got = _logprobs(engine, LENGTHS)
        (alone,) = _logprobs(engine, LENGTHS[:1])
    for one, other in zip(want, got, strict=True):
        assert (one - other).abs().max() < TOLERANCE
    assert torch.equal(alone, got[0])
