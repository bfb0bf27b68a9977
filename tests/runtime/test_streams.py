"""The whole engine on a device with streams: weights come to slots and leave them, tokens go down
and results up, while kernels are asked for ahead of what is over. No two accesses to memory race,
whatever the moments of copies, and each wait and each event that orders them is needed."""

from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from engines import engine_for, engine_on, make_model, prompts, request, run_all
from fake_cuda import FakeCuda
from fake_streams import Race
from windlass.engine.outputs import RequestOutput
from windlass.engine.request import Request
from windlass.ids import Part
from windlass.weights.stats import StoreStats

FAMILIES = ("qwen3_moe", "deepseek_v3", "gpt_oss", "qwen3_next")
# All that orders anything, by who asks for it.
POINTS = (
    "record of compute in WeightStore._release",  # slots are used until
    "wait of down in Lane.submit",  # before they are written
    "record of down in Lane.submit",  # weights are there
    "synchronisation with down in Lane.arrive",
    "record of compute in DeviceStreams.to_host",  # results are there
    "wait of up in DeviceStreams.to_host",
    "record of up in DeviceStreams.to_host",  # and on the host
    "synchronisation with up in ToHost.wait",
)
TIGHT: dict[str, Any] = dict(
    moe_expert_cache_size="64KiB", max_model_len=64, max_num_seqs=3, max_num_batched_tokens=100
)
Results = dict[str, object]


def _requests() -> list[Request]:
    some = [
        request(f"r{i}", prompt, max_tokens=1 + i, logprobs=2)
        for i, prompt in enumerate(prompts((20, 3, 9)))
    ]
    some[1] = replace(some[1], params=replace(some[1].params, prompt_logprobs=0))
    return some


def _found(results: dict[str, RequestOutput]) -> Results:
    return {name: (one.outputs[0], one.prompt_logprobs) for name, one in results.items()}


def _run(
    path: Path, device: FakeCuda | None, count: int = 3, **options: Any
) -> tuple[Results, StoreStats]:
    """Tokens and log-probabilities of the first `count` requests, and what the weights did."""
    options = {**TIGHT, "moe_backend": "torch", **options}
    if device is None:
        with engine_for(path, **options) as engine:
            results = run_all(engine, _requests()[:count])
            return _found(results), engine._weights.stats()
    with engine_on(device, path, **options) as engine:
        results = run_all(engine, _requests()[:count])
        return _found(results), engine._weights.stats()


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """The checkpoint of a family, and what the CPU says of it."""

    @cache
    def make(family: str) -> tuple[Path, Results]:
        path = tmp_path_factory.mktemp(family)
        make_model(family, path, dtype=torch.bfloat16)
        return path, _run(path, None)[0]

    return make


def _check(model: tuple[Path, Results], seed: int, **options: Any) -> FakeCuda:
    path, on_cpu = model
    device = FakeCuda(seed=seed, late=(0.5, 0.9, 1.0)[seed % 3])
    results, stats = _run(path, device, **options)
    assert results == on_cpu
    assert not device.memory.races
    assert stats.evictions > 0 and stats.prefetch_used > 0
    assert device.num_kernels > 1000 and device.num_copies > 50
    return device


@pytest.mark.parametrize("family", FAMILIES)
def test_an_engine_on_a_device_has_no_race_and_says_what_a_cpu_says(family, model):
    device = _check(model(family), FAMILIES.index(family))
    assert set(device.order.points) == set(POINTS)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(50))
@pytest.mark.parametrize("family", FAMILIES)
def test_nor_at_any_other_moments(family, seed, model):
    options = dict(
        moe_expert_cache_size=f"{(64, 80, 120)[seed // 3 % 3]}KiB",
        max_num_seqs=1 + seed % 4,
        micro_batch_size=(64, 512)[seed % 2],
    )
    _check(model(family), seed, **options)


@pytest.mark.parametrize("point", POINTS)
def test_without_any_of_its_waits_and_events_it_has(point, model):
    path, _ = model("qwen3_moe")
    device = FakeCuda(seed=1, without=point)
    with pytest.raises(Race, match="nothing orders them"):
        _run(path, device, 1)
    assert device.order.points[point] > 0


def test_rows_of_an_embedding_without_slots_go_down_too(model):
    path, _ = model("qwen3_moe")
    with engine_for(path, moe_backend="torch", **TIGHT) as engine:
        host = engine.plan.host
    rows = tuple(replace(own, slots=own.slots * (own.part is not Part.EMBED)) for own in host.parts)
    plan = replace(engine.plan, tiers=(replace(host, parts=rows),))
    device = _check(model("qwen3_moe"), 0, plan=plan)
    assert device.order.points["record of compute in RowReader._read_batch"] > 0


def test_a_seed_gives_the_same_run_again(model):
    path, _ = model("qwen3_moe")
    ends = set()
    for _ in range(2):
        device = FakeCuda(seed=5)
        _run(path, device, 1)
        ends.add((device.order.chance.random(), device.num_kernels, device.num_copies))
    assert len(ends) == 1
