"""Few rows as graphs that a device keeps: whole engines give the same bits as without, whatever
changes from pass to pass."""

from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch

from engines import engine_for, make_model, prompts, request, run_all
from fake_graphs import FakeGraphs
from graph_kernels import GraphKernels
from windlass.build.open import open_engine
from windlass.device.cpu import CpuDevice
from windlass.engine.engine import Engine
from windlass.ids import Part, WeightKey
from windlass.kernels import cuda_graphs
from windlass.kernels.cuda_graphs import CudaCapture, GraphCaptures
from windlass.kernels.reference import TorchKernels
from windlass.options import EngineOptions
from windlass.plan import Plan


@pytest.fixture
def replayed(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """Keys of layers, and of pieces of them, that were replayed."""
    keys: list[object] = []
    run = CudaCapture.run

    def watched(capture: CudaCapture, key: object, *args: Any, **more: Any) -> object:
        before = capture.num_replayed
        result = run(capture, key, *args, **more)
        keys.extend([key] * (capture.num_replayed - before))
        return result

    monkeypatch.setattr(CudaCapture, "run", watched)
    return keys


@contextmanager
def on_device(path, plan: Plan, *, slots: int | None = None, most: int = 8, **options: Any):
    """With weights in slots above the host's, so many of them for experts."""
    above = tuple(
        replace(
            own, slot_bytes=None,
            slots=slots if slots and own.part is Part.EXPERT else own.num_parts or own.slots,
        )
        for own in plan.host.parts
    )  # fmt: skip
    tiers = plan.host, replace(plan.host, name="device", parts=above)
    device, graphs = CpuDevice(1, name="device"), FakeGraphs()
    kernels = GraphKernels(GraphCaptures(device, graphs, most=most), graphs.launch)
    wanted = EngineOptions(
        model=str(path), plan=replace(plan, tiers=tiers), generation_config="vllm",
        kv_cache_dtype="float32", **options,
    )  # fmt: skip
    with open_engine(wanted, above=device, kernels=kernels) as engine:
        yield engine, graphs


def answers(engine: Engine) -> list[dict[str, Any]]:
    """Sequences that begin and end at different times, in two jobs: others are where those were."""
    found = []
    for seed in (0, 1):
        requests = [
            request(f"r{i}", prompt, max_tokens=3 + 3 * i, logprobs=2)
            for i, prompt in enumerate(prompts((9, 20, 5), seed=seed))
        ]
        found.append({name: out.outputs[0] for name, out in run_all(engine, requests).items()})
    assert all(len(one.token_ids) > 2 for job in found for one in job.values())
    return found


def plan_of(path) -> Plan:
    with engine_for(path, kernels=TorchKernels(), kv_cache_dtype="float32") as engine:
        return engine.plan


@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3", "gpt_oss", "qwen3_next"])
def test_the_same_bits_as_without(family, tmp_path, monkeypatch, replayed):
    monkeypatch.setattr(cuda_graphs, "_LEAST_POSITIONS", 16)  # tables grow on the way
    monkeypatch.setattr(cuda_graphs, "_LEAST_PAGES", 1)
    make_model(family, tmp_path, dtype=torch.bfloat16)
    plan = plan_of(tmp_path)
    with on_device(tmp_path, plan, enforce_eager=True) as (engine, graphs):
        want = answers(engine)
    assert not replayed and not graphs.num_captured
    with on_device(tmp_path, plan) as (engine, graphs):
        assert answers(engine) == want
        hits = engine.stats().expert_requests
    assert len(replayed) == graphs.num_replayed > graphs.num_captured
    assert all(isinstance(key, int) for key in replayed)
    replayed.clear()
    with on_device(tmp_path, plan, slots=4, most=1) as (engine, graphs):
        assert answers(engine) == want
        assert engine.stats().expert_requests == hits
    assert {key.part for key in replayed if isinstance(key, WeightKey)} == {Part.BLOCK}
    pieces = {key[0] for key in replayed if not isinstance(key, WeightKey | int)}  # type: ignore[index]
    assert pieces == {"experts", "combine"}
