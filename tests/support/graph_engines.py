"""Engines on a device that keeps graphs, without a GPU."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from engines import engine_for, prompts, request, run_all
from fake_graphs import FakeGraphs
from windlass.build.open import open_engine
from windlass.device.cpu import CpuDevice
from windlass.engine.engine import Engine
from windlass.ids import Part
from windlass.kernels.cuda_graphs import CudaCapture, GraphCaptures
from windlass.kernels.interface import Kernels
from windlass.kernels.reference import TorchKernels
from windlass.options import EngineOptions
from windlass.plan import Plan


def plan_of(path: Path) -> Plan:
    with engine_for(path, kernels=TorchKernels(), kv_cache_dtype="float32") as engine:
        return engine.plan


@contextmanager
def graph_engine(
    path: Path,
    make: Callable[[GraphCaptures, FakeGraphs], Kernels],
    *,
    slots: int | None = None,
    most: int = 8,
    **options: Any,
) -> Iterator[tuple[Engine, FakeGraphs]]:
    """With all weights in slots above the host's, or `slots` of them for experts; graphs of `most`
    numbers of rows. `options`: with the plan."""
    plan: Plan = options.pop("plan")
    above = tuple(
        replace(
            own, slot_bytes=None,
            slots=slots if slots and own.part is Part.EXPERT else own.num_parts or own.slots,
        )
        for own in plan.host.parts
    )  # fmt: skip
    tiers = plan.host, replace(plan.host, name="device", parts=above, kept_states=0)
    device, graphs = CpuDevice(1, name="device"), FakeGraphs()
    wanted = EngineOptions(
        model=str(path), plan=replace(plan, tiers=tiers), generation_config="vllm",
        kv_cache_dtype="float32", **options,
    )  # fmt: skip
    kernels = make(GraphCaptures(device, graphs, most=most), graphs)
    with open_engine(wanted, above=device, kernels=kernels) as engine:
        yield engine, graphs


def watch_replays(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """Keys of layers, and of pieces of them, as they are replayed."""
    keys: list[object] = []
    run = CudaCapture.run

    def watched(capture: CudaCapture, key: object, *args: Any, **more: Any) -> object:
        before = capture.num_replayed
        result = run(capture, key, *args, **more)
        keys.extend([key] * (capture.num_replayed - before))
        return result

    monkeypatch.setattr(CudaCapture, "run", watched)
    return keys


def answers(
    engine: Engine, lengths: tuple[int, ...] = (9, 20), steps: tuple[int, ...] = (3, 6)
) -> list[dict[str, Any]]:
    """Sequences that begin together and end at different times, in two jobs: others are where those
    were."""
    found = []
    for seed in (0, 1):
        requests = [
            request(f"r{i}", prompt, max_tokens=steps[i], logprobs=2)
            for i, prompt in enumerate(prompts(lengths, seed=seed))
        ]
        found.append({name: out.outputs[0] for name, out in run_all(engine, requests).items()})
    assert all(one.finish_reason == "length" for job in found for one in job.values())
    return found
