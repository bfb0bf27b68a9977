"""Whole engines on a GPU over pinned memory of the host over files, opened by options alone: what
they say depends on none of what a plan decides, and their memory keeps to its budget."""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from engines import prompts, request, run_all
from machines import machine
from windlass.build.devices import LATER_BYTES
from windlass.build.open import open_engine
from windlass.device.lane import Lane
from windlass.engine.engine import Engine
from windlass.errors import BudgetError, UsageError
from windlass.ids import DISK_TO_HOST, HOST, Part, Route
from windlass.options import EngineOptions
from windlass.units import MIB
from windlass.workload import Job, Workload

FAMILIES = ("qwen3_moe", "deepseek_v3", "gpt_oss", "qwen3_next")
TO_DEVICE = Route(HOST, "device")
FEW: dict[str, Any] = {"moe_expert_cache_size": "64KiB"}
# Of log-probabilities beside a CPU's, products in fp32 on both
TOLERANCE = 1e-3


def _requests(count: int):
    return [
        request(f"r{i}", prompt, max_tokens=3 + i, logprobs=2)
        for i, prompt in enumerate(prompts((12, 3))[:count])
    ]


def _answers(engine: Engine, count: int = 2) -> dict[str, Any]:
    found = run_all(engine, _requests(count))
    return {name: output.outputs[0] for name, output in found.items()}


def _check_beside_cpu(gpu, path: Path, answers: dict[str, Any]) -> None:
    options = EngineOptions(
        model=str(path), device="cpu", generation_config="vllm", moe_backend="torch",
        max_model_len=64, max_num_seqs=3, max_num_batched_tokens=100,
    )  # fmt: skip
    with open_engine(options) as engine:
        on_cpu = _answers(engine)
    for name, one in on_cpu.items():
        assert answers[name].token_ids == one.token_ids
        if gpu.is_exact:
            assert answers[name].logprobs == one.logprobs
        for here, there in zip(answers[name].logprobs, one.logprobs, strict=True):
            for token in here.keys() & there.keys():
                assert here[token].logprob == pytest.approx(there[token].logprob, abs=TOLERANCE)


@pytest.mark.parametrize("family", FAMILIES)
def test_what_it_says_depends_on_no_budget_group_or_schedule(gpu, checkpoint, family):
    path = checkpoint(family)
    if gpu.is_exact and family != FAMILIES[0]:
        pytest.skip("the fake runs every family in tests/runtime/test_streams_of_tiers.py")
    with gpu.open(path) as engine:
        answers = _answers(engine)
        assert engine.plan.above is not None and engine.stats().weights.evictions == 0
    _check_beside_cpu(gpu, path, answers)
    for other in (
        FEW,
        {"batch_groups": 2, "micro_batch_size": 64},
        {"kv_offloading_share": 1.0},
        # one alone would go through experts by other kernels
        {**FEW, "schedule": "model-based", "micro_batch_size": 64, "max_num_seqs": 2},
    ):
        with gpu.open(path, **other) as engine:
            assert _answers(engine) == answers, other
            assert (engine.stats().weights.evictions > 0) == ("moe_expert_cache_size" in other)


def test_with_everything_on_the_device_the_link_is_silent(gpu, checkpoint):
    with gpu.open(checkpoint("qwen3_moe")) as engine:
        answers = _answers(engine, 1)
        run_all(engine, [request("all", prompts((30,), seed=1)[0], max_tokens=1)])
        before = dict(engine.stats().weights.link_bytes)
        assert _answers(engine, 1) == answers
        assert engine.stats().weights.link_bytes == before and before[TO_DEVICE] > 0


def test_one_sequence_is_foreseen_in_both_tiers(gpu, checkpoint):
    path = checkpoint("qwen3_moe")
    with gpu.open(path, max_num_seqs=1) as engine:
        answers = _answers(engine, 1)
    with gpu.open(path, max_num_seqs=1, **FEW) as engine:
        assert _answers(engine, 1) == answers
        plan, stats = engine.plan, engine.stats().weights
        below = engine._weights.supply.below.stats()
        assert plan.above.of(Part.EXPERT).slots < plan.host.of(Part.EXPERT).slots
        assert plan.host.forecast_bytes > 0
        assert stats.prefetch_used > 0 and below.prefetch_issued > 0
        assert stats.link_bytes[TO_DEVICE] > 0 < stats.link_bytes[DISK_TO_HOST]
        places = engine.stats().expert_places
        assert list(places) == ["device", "host", "disk"] and places["host"] > 0
        assert sum(places.values()) == engine.stats().expert_requests


def test_memory_keeps_to_its_budget(gpu, checkpoint):
    path = checkpoint("qwen3_moe")
    with pytest.raises(
        BudgetError, match="device memory: got 16.00 MiB, this model needs at least"
    ):
        with gpu.open(path, device_memory=16 * MIB):
            pass
    with pytest.raises(UsageError, match="device_memory: got .* allowed up to"):
        with gpu.open(path, device_memory=1 << 50):
            pass
    with gpu.open(path, **FEW) as engine:
        least = engine.plan.above.total_bytes
    with gpu.open(path, device_memory=least + 64 * MIB, **FEW) as engine:
        _answers(engine)
        assert engine.plan.above.budget_bytes == least + 64 * MIB
        peak = engine.stats().peak_device_bytes
        assert engine.plan.above.process_bytes - LATER_BYTES < peak <= least + 64 * MIB


def test_auto_without_room_on_the_gpu_says_why_the_cpu_computes(gpu, checkpoint, caplog):
    with gpu.open(checkpoint("qwen3_moe"), device="auto", device_memory=16 * MIB) as engine:
        assert engine.plan.above is None
        assert not engine.stats().peak_device_bytes
    said = [line for line in caplog.messages if line.startswith("device auto")]
    (line,) = said
    assert "the CPU computes alone: device memory: got 16.00 MiB, this model needs" in line


class _Source:
    """One answer."""

    def job(self, tokenizer, params, longest):
        return Job(Workload((8,), (8,)), is_bounded=True)

    def row_bytes(self, max_model_len, vocab_size):
        return 0


@pytest.mark.parametrize(("call_s", "taken"), [(1e-6, "GPU"), (1.0, "CPU")])
def test_auto_takes_what_measured_rates_say_is_sooner(gpu, checkpoint, caplog, call_s, taken):
    """A GPU whose every call takes a second is not taken; with assumed rates it is."""
    path, known = checkpoint("qwen3_moe"), machine(with_device=True)
    assert known.device is not None
    known = replace(known, device=replace(known.device, call_s=call_s, expert_s=call_s))
    with gpu.open(path, device="auto", source=_Source(), profile=known) as engine:
        assert (engine.plan.above is not None) == (taken == "GPU")
        lines = [*engine.notes, *caplog.messages]
    (line,) = [one for one in lines if "device auto" in one]
    if taken == "GPU":
        assert re.search(r"the GPU computes: about .* by measured rates, the CPU alone ", line)
        return
    assert re.search(r"the CPU computes alone: about .*, with the GPU .* by measured rates", line)
    assumed = replace(known, source="assumed")
    for other in (dict(device="auto", profile=assumed), dict(device="cuda", profile=known)):
        with gpu.open(path, source=_Source(), **other) as engine:
            assert engine.plan.above is not None
            assert not [one for one in engine.notes if "auto" in one]


def test_a_worker_that_fails_ends_the_step_and_the_engine_closes(gpu, checkpoint, monkeypatch):
    real, copies = Lane._steps, iter(range(9))

    def steps(self, source, into):
        if next(copies, None) is None:
            raise RuntimeError("the copy engine is gone")
        return real(self, source, into)

    monkeypatch.setattr(Lane, "_steps", steps)
    with gpu.open(checkpoint("qwen3_moe"), **FEW) as engine:
        with pytest.raises(RuntimeError, match="the copy engine is gone"):
            _answers(engine)
        with pytest.raises(RuntimeError, match="the copy engine is gone"):
            engine.step()
