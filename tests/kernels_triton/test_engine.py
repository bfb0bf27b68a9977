"""Whole engines whose passes the kernels of a CUDA device compute, in the interpreter, over slots
laid out as a device's: against torch, and row by row."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from engines import FAMILIES, engine_for, logprob_rows, make_model, prompts, request, run_all
from windlass.build.open import open_engine
from windlass.device.cpu import CpuDevice
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


def _on_device(path: Path, plan: Plan, kernels: CudaKernels) -> Engine:
    """With all weights in slots above the host's."""
    above = tuple(
        replace(own, slots=own.num_parts or own.slots, slot_bytes=None) for own in plan.host.parts
    )
    tiers = plan.host, replace(plan.host, name="device", parts=above)
    options = EngineOptions(
        model=str(path), plan=replace(plan, tiers=tiers), generation_config="vllm",
        kv_cache_dtype="float32",
    )  # fmt: skip
    return open_engine(options, above=CpuDevice(1, name="device"), kernels=kernels)


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
