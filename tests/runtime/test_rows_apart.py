"""Generated rows that go through experts each by itself, where a plan says so: those and no others,
whatever else is in the pass; part of the plan and of the fingerprint."""

from dataclasses import replace
from typing import Any

import pytest

from engines import engine_for
from fake_cuda import FakeCuda
from two_processors import FEW, Model, bits_of, some_requests
from windlass.errors import UsageError
from windlass.ids import Part
from windlass.kernels.reference import TorchKernels
from windlass.plan import Plan
from windlass.schedule.batch import Segment, make_batch

REQUESTS = 3


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Model:
    return Model(tmp_path_factory.mktemp("model"), "qwen3_moe")


def _plan(own: Model, slots: Any = FEW, **values: Any) -> Plan:
    return own.plan_for(0.0, slots, **({"generated_experts": "rows"} | values))


@pytest.fixture
def rows_by_themselves(monkeypatch) -> list[int]:
    """Numbers of rows of calls, whose results are not those of other rows: bits show who went
    there."""
    calls: list[int] = []
    by_row = TorchKernels.experts_by_row

    def other(self, x_TD, *args: Any) -> None:
        calls.append(len(x_TD))
        by_row(self, x_TD * 1.25, *args)

    monkeypatch.setattr(TorchKernels, "experts_by_row", other)
    return calls


def _run(own: Model, plan: Plan, seed: int = 1) -> Any:
    device = FakeCuda(name="device", seed=seed)
    found = own.run_on(device, plan, some_requests(REQUESTS))
    assert not device.memory.races
    return found


def test_generated_rows_alone_whatever_else_is_in_the_pass(model, rows_by_themselves):
    """At other schedules, groups, slots, and each request by itself."""
    want = _run(model, _plan(model))
    names = want.keys()
    assert want != {name: model.bits[name] for name in names}
    assert max(rows_by_themselves) <= REQUESTS, "rows of prompts"
    waves = dict(mixed_prefill_tokens=0, groups=2, micro_batch_tokens=64)
    assert _run(model, _plan(model, {**FEW, Part.EXPERT: 9}, **waves), seed=2) == want
    alone = _plan(model, {}, max_num_seqs=1)
    assert _run(model, alone, seed=3) == want and rows_by_themselves[-1] == 1


def test_kernels_that_sum_alike_give_the_same_bits(model):
    found = _run(model, _plan(model))
    assert found == {name: model.bits[name] for name in found}


def test_in_tiles_nobody_goes_by_itself(model, rows_by_themselves):
    found = _run(model, _plan(model, generated_experts="tiles"))
    assert found == {name: model.bits[name] for name in found} and not rows_by_themselves


def test_the_mode_is_part_of_plan_and_fingerprint(model):
    assert "generated_experts" not in model.plan.to_json()
    plan = _plan(model, {})
    assert Plan.from_json(plan.to_json()) == plan
    assert [line for line in plan.lines() if "one by one, prompts in tiles" in line]
    before = plan.to_json()
    del before["generated_experts"]
    assert Plan.from_json(before) == replace(plan, generated_experts="tiles")
    with model.open(plan) as engine:
        assert engine.fingerprint["generated_experts"] == "rows"
        assert len(bits_of(engine, some_requests(1))) == 1
    with model.open(replace(plan, generated_experts="tiles")) as engine:
        assert "generated_experts" not in engine.fingerprint


def test_what_no_plan_may_say(model):
    with pytest.raises(UsageError, match="generated_experts: got 'few', allowed tiles, rows"):
        Plan.from_json(_plan(model).to_json() | {"generated_experts": "few"})
    reason = "generated_experts: got 'rows', allowed with a device that computes all experts"
    with pytest.raises(UsageError, match=reason):
        model.open(_plan(model, {}, host_experts=0.5))
    with pytest.raises(UsageError, match=reason):
        engine_for(model.path, plan=replace(model.plan, generated_experts="rows"))


def test_rows_of_a_kind_are_as_few_pieces_as_there_can_be():
    def segment(i: int, count: int, *, is_prompt: bool) -> Segment:
        return Segment(
            sequence=i, token_ids=(1,) * count, first_position=0, pages=(i,), state_slot=-1,
            is_prompt=is_prompt, long_rope=False, wants_logits=True,
        )  # fmt: skip

    sizes = [(1, False), (3, False), (5, True), (90, True), (2, False)]
    segments = [segment(i, n, is_prompt=kind) for i, (n, kind) in enumerate(sizes)]
    batch = make_batch(segments, micro_batch_tokens=64)
    (group,) = batch.groups
    assert len(group.micro_batches) > 1
    assert group.kinds() == ((0, 4, False), (4, 99, True), (99, 101, False))
