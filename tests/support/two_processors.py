"""Engines whose host has a part of what passes compute, beside a device, on small checkpoints; and
what they make of a few requests."""

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from drafters import Corrected, bits
from engines import engine_for, make_model, prompts, request, run_all
from fake_cuda import FakeCuda, on_device
from nextn import make_nextn
from windlass.build import homes as build
from windlass.build.open import open_engine
from windlass.device.base import Device
from windlass.device.cpu import CpuDevice
from windlass.engine.drafting import Drafting
from windlass.engine.engine import Engine
from windlass.engine.request import Request
from windlass.ids import Part
from windlass.kernels.reference import TorchKernels
from windlass.options import EngineOptions
from windlass.plan import HOST, Plan, TierPlan
from windlass.runtime import host_attention
from windlass.speculative import SpeculativeConfig

FEW = {Part.EXPERT: 3, Part.BLOCK: 2, Part.FFN: 1, Part.HEAD: 1, Part.EMBED: 0}
LENGTHS = (70, 3, 20, 33, 150)
Results = Mapping[str, object]


def some_requests(count: int = len(LENGTHS)) -> list[Request]:
    return [
        request(f"r{i}", prompt, max_tokens=2 + i, logprobs=2)
        for i, prompt in enumerate(prompts(LENGTHS[:count]))
    ]


def bits_of(engine: Engine, requests: list[Request]) -> Results:
    choices = {name: one.outputs[0] for name, one in run_all(engine, requests).items()}
    return {
        name: (one.token_ids, one.cumulative_logprob, one.logprobs) for name, one in choices.items()
    }


def tier_with(tier: TierPlan, name: str, slots: Mapping[Part, int], pages: int | None) -> TierPlan:
    """`tier` with so many slots of some kinds, all that there are of the others, and pages."""
    parts = tuple(
        replace(own, slots=min(slots.get(own.part, 999), own.num_parts or 1), slot_bytes=None)
        for own in tier.parts
    )
    pages = tier.kv_pages if pages is None else pages
    return replace(tier, name=name, parts=parts, kv_pages=pages)


def with_right_guesses(
    folder: Path, monkeypatch: pytest.MonkeyPatch, **shares: Any
) -> tuple[Any, Any, Any]:
    """What an engine whose own layer drafts makes of a few requests without a device, and beside
    one where the host has `shares` of the sequences and every other guess is right; and of that
    engine the counts of its drafts."""
    make_nextn("deepseek_v3", folder)
    guess: Any = SpeculativeConfig(method="mtp")
    some = [
        request(f"r{i}", p, max_tokens=9, logprobs=1) for i, p in enumerate(prompts((20, 9, 5)))
    ]
    with engine_for(folder, moe_backend="torch", speculative_config=guess) as engine:
        results, plan = run_all(engine, some), engine.plan
    monkeypatch.setattr(Drafting, "of", lambda config: Corrected(results))  # every other is right
    tiers = tuple(tier_with(plan.host, name, {}, None) for name in (HOST, "device"))
    options = EngineOptions(
        model=str(folder), plan=replace(plan, tiers=tiers, **shares),
        generation_config="vllm", moe_backend="torch", speculative_config=guess,
    )  # fmt: skip
    above = CpuDevice(1, name="device")
    with open_engine(options, above=above, kernels=TorchKernels()) as engine:
        return bits(results), bits(run_all(engine, some)), engine.stats().drafts


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], "Model"]:
    """Of a family, made once for the tests of a module."""

    @cache
    def make(family: str) -> Model:
        return Model(tmp_path_factory.mktemp(family), family)

    return make


class Model:
    """A checkpoint, and what an engine without a device makes of the requests."""

    def __init__(self, path: Path, family: str) -> None:
        self.path = path
        make_model(family, path, dtype=torch.bfloat16)
        with engine_for(path, moe_backend="torch") as engine:
            self.bits = bits_of(engine, some_requests())
            self.plan: Plan = engine.plan

    def plan_for(
        self, share: float, slots: Mapping[Part, int] = FEW, pages: tuple[Any, Any] = (None, None),
        **values: Any,
    ) -> Plan:  # fmt: skip
        host, device = (
            tier_with(self.plan.host, name, slots, own)
            for name, own in zip((HOST, "device"), pages, strict=True)
        )
        device = replace(device, kept_states=0)
        return replace(self.plan, tiers=(host, device), host_attention=share, **values)

    def open(
        self, plan: Plan, *, device: Device | None = None, above: Device | None = None,
        backend: Any = "torch", **more: Any,
    ) -> Engine:  # fmt: skip
        """Kernels of `backend` on the host, torch's on the device. `more`: options."""
        options = EngineOptions(
            model=str(self.path), plan=plan, generation_config="vllm", moe_backend=backend, **more
        )
        kernels = on_device(above, TorchKernels) if isinstance(above, FakeCuda) else TorchKernels()
        above = above or CpuDevice(1, name="device")
        return open_engine(options, device=device, above=above, kernels=kernels)

    def run_on(
        self, device: FakeCuda, plan: Plan, requests: list[Request], **staging: int
    ) -> Results:
        """By a device with streams."""
        with ExitStack() as held:
            held.enter_context(mock.patch.object(build, "ThreadPoolExecutor", worker_of(device)))
            for name, value in staging.items():
                held.enter_context(mock.patch.object(host_attention, name, value))
            held.enter_context(device.watched())
            engine = held.enter_context(self.open(plan, device=device.below, above=device))
            engine._weights._queue.changed.wait = device.wait  # type: ignore[method-assign]
            return bits_of(engine, requests)


def worker_of(device: FakeCuda) -> Any:
    return lambda *_: device.worker


class Fails(Exception):
    pass


def bits_in_spite(engine: Engine, requests: list[Request]) -> Results:
    """Of all steps but the one that fails."""
    for one in requests:
        engine.add(one)
    results: dict[str, Any] = {}
    with pytest.raises(Fails):
        while engine.has_work:
            results |= {one.request_id: one for one in engine.step().finished}
    engine.check()
    while engine.has_work:
        results |= {one.request_id: one for one in engine.step().finished}
    return {name: one.outputs[0].token_ids for name, one in results.items()}
