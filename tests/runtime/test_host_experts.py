"""Experts of generated rows on the host, beside a device that computes everything else: the same
bits at a fixed share, whatever else is chosen and whenever the host gets to it; no race, and none
without each wait; errors end the step, and nothing hangs."""

from dataclasses import replace
from functools import cache
from itertools import count
from typing import Any

import pytest

from engines import engine_for, request
from fake_cuda import FakeCuda
from fake_streams import Race
from two_processors import FEW, Fails, Model, bits_in_spite, bits_of, model, some_requests
from windlass.errors import UsageError
from windlass.ids import Part
from windlass.plan import Plan
from windlass.runtime import host_experts
from windlass.runtime.host_experts import HostExperts
from windlass.schedule.expert_homes import host_experts as homes_of

__all__ = ["model"]  # a fixture

FAMILIES = ("qwen3_moe", "deepseek_v3", "gpt_oss")
POINTS = (
    "record of compute in HostExperts.send",  # rows are gathered
    "wait of up in HostExperts.send",  # before they are copied
    "record of up in HostExperts.send",  # and on the host
    "synchronisation with up in HostExperts._compute",  # before the worker reads them
    "record of back in HostExperts.end",  # what it made is on the device
    "wait of compute in HostExperts.end",  # before kernels read it
)


def plan_of(own: Model, share: float, *, attends: float = 0.0, slots: Any = FEW, **values: Any):
    return own.plan_for(attends, slots, host_experts=share, **values)


# --- on a device with streams ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "share", "attends", "slots"),
    [("qwen3_moe", 0.5, 0.0, 3), ("deepseek_v3", 1.0, 0.5, 1), ("gpt_oss", 0.5, 0.0, 9)],
)
def test_no_race_and_what_a_cpu_says(family, share, attends, slots, model):
    """The same kernels on both: bits are those of a machine without a device."""
    own, groups = model(family), 1 + FAMILIES.index(family) % 2
    device = FakeCuda(name="device", seed=groups)
    plan = plan_of(
        own, share, attends=attends, slots={**FEW, Part.EXPERT: slots}, groups=groups,
        micro_batch_tokens=64,
    )  # fmt: skip
    found = own.run_on(device, plan, some_requests(2))
    assert found == {name: own.bits[name] for name in found} and len(found) == 2
    assert not device.memory.races and device.worker.num_jobs > 4


@pytest.mark.parametrize("point", POINTS)
def test_without_any_of_its_waits_and_events_there_is_a_race(point, model):
    own = model("qwen3_moe")
    device = FakeCuda(name="device", seed=3, late=0.9, without=point)
    with pytest.raises(Race, match="nothing orders them"):
        own.run_on(device, plan_of(own, 1.0, slots={}), [request("r", [5, 7], max_tokens=3)])
    assert device.order.points[point] > 0


# --- with threads ---------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=FAMILIES)
def apart(request, model):
    """A family, and what its requests get with native kernels on the host, torch's on the device:
    by the share of experts of the host."""
    own = model(request.param)

    @cache
    def made(share: float) -> Any:
        with own.open(plan_of(own, share, slots={}), backend="cpu") as engine:
            return bits_of(engine, some_requests())

    return own, made


@pytest.mark.parametrize(
    "values",
    [
        # prompts are cut into chunks, which share passes with generated rows
        dict(groups=2, micro_batch_tokens=64, max_num_batched_tokens=100),
        dict(slots=FEW, schedule="model-based", micro_batch_tokens=64),
        dict(slots={**FEW, Part.EXPERT: 1}, groups=3, micro_batch_tokens=64, max_num_seqs=3),
        dict(slots=FEW, overlap=False, max_num_seqs=1),
    ],
)
def test_bits_are_those_of_the_share_alone(values, apart):
    """Whatever the groups, budgets, batches, schedule and slots."""
    own, made = apart
    with own.open(plan_of(own, 0.5, **values), backend="cpu") as engine:
        assert bits_of(engine, some_requests()) == made(0.5)
        engine.check()


def test_the_host_rounds_otherwise(apart):
    """Else the others could not fail. Without a share all is as it was."""
    own, made = apart
    assert made(0.0) == own.bits and len({str(made(share)) for share in (0.0, 0.5, 1.0)}) == 3


def test_prompts_are_the_devices(apart):
    """The first token of an answer, and its log-probability, know of no share."""
    _, made = apart
    for name, (tokens, _, logprobs) in made(1.0).items():
        assert (tokens[0], logprobs[0]) == (made(0.0)[name][0][0], made(0.0)[name][2][0])


def test_experts_of_the_host_are_not_fetched_for_generated_rows(model):
    own = model("qwen3_moe")
    fetched = {}
    for share in (0.0, 1.0):
        with own.open(plan_of(own, share, slots={Part.EXPERT: 2}, overlap=False)) as engine:
            engine.add(request("r", [5, 7, 9], max_tokens=6))
            engine.step()
            before = engine.stats().weights.requests[Part.EXPERT]
            while engine.has_work:
                engine.step()
            fetched[share] = engine.stats().weights.requests[Part.EXPERT] - before
    assert fetched[0.0] > 0 == fetched[1.0]


def test_more_rows_than_there_is_room_for_take_turns(model, monkeypatch):
    own = model("deepseek_v3")
    monkeypatch.setattr(host_experts, "staged_rows", lambda plan: 2)
    with own.open(plan_of(own, 1.0, slots=FEW)) as engine:
        assert bits_of(engine, some_requests()) == own.bits


@pytest.mark.parametrize(("job", "is_fake"), [(1, False), (4, False), (2, True)])
def test_a_worker_that_raises_ends_the_step_and_the_engine_goes_on(
    job, is_fake, model, monkeypatch
):
    own = model("qwen3_moe")
    compute, jobs = HostExperts._compute, count(1)

    def fail(self: HostExperts, *given: Any) -> Any:
        if next(jobs) == job:
            raise Fails
        return compute(self, *given)

    monkeypatch.setattr(HostExperts, "_compute", fail)
    plan = plan_of(own, 1.0, attends=0.5, slots=FEW if is_fake else {})
    if is_fake:
        device = FakeCuda(name="device", seed=job, late=0.9)
        monkeypatch.setattr("two_processors.bits_of", bits_in_spite)
        found = own.run_on(device, plan, some_requests(2))
        assert not device.memory.races
    else:
        with own.open(plan) as engine:
            found = bits_in_spite(engine, some_requests(2))
    assert found == {name: own.bits[name][0] for name in found} and len(found) == 2


# --- what is planned ------------------------------------------------------------------------------


def test_a_share_of_each_layer_evenly_spread():
    for layer, experts, share in ((0, 8, 0.5), (7, 128, 0.25), (3, 60, 0.1), (5, 3, 0.5)):
        flags = homes_of(layer, experts, share)
        assert abs(sum(flags) - share * experts) < 1 and len(flags) == experts
    assert homes_of(4, 16, 1.0) == (True,) * 16 and homes_of(4, 16, 0.0) == (False,) * 16
    assert len({homes_of(layer, 16, 0.25) for layer in range(8)}) > 2, "layers begin elsewhere"


def test_the_share_is_part_of_plan_and_fingerprint(model):
    own = model("qwen3_moe")
    assert "host_experts" not in own.plan.to_json()
    plan = plan_of(own, 0.25, slots={})
    assert Plan.from_json(plan.to_json()) == plan
    assert [line for line in plan.lines() if "the host computes 25 % of the experts" in line]
    with own.open(plan) as engine:
        assert engine.fingerprint["host_experts"] == 0.25 and engine.fingerprint["host_kernels"]
    with own.open(replace(plan, host_experts=0.0)) as engine:
        assert {"host_experts", "host_kernels"}.isdisjoint(engine.fingerprint)
    with pytest.raises(UsageError, match="host_experts: got 1.5, allowed 0 to 1"):
        own.open(plan_of(own, 1.5, slots={}))
    with pytest.raises(UsageError, match="host_experts: got 0.5, allowed 0 to 0"):
        engine_for(own.path, plan=replace(own.plan, host_experts=0.5), max_num_batched_tokens=512)
