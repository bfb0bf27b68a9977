"""Whether sequences decode in bursts: by what reads take beside computing, how many they are, and
what is resident; never against what the user says."""

from dataclasses import replace

import pytest

from planning import SPECS, few_layers, machine, sizes_of, with_host
from windlass.errors import UsageError
from windlass.ids import Part
from windlass.models.spec import Moe
from windlass.perf.estimate import estimate
from windlass.perf.sizes import Problem
from windlass.plan import Plan
from windlass.planner.budget import make_plan
from windlass.planner.bursts import find_bursts, with_bursts
from windlass.planner.choose import choose_plan, plain_plan
from windlass.planner.constraints import PlanConstraints
from windlass.planner.explain import explain
from windlass.planner.validate import validate_plan
from windlass.units import GIB
from windlass.workload import Job, Workload

OLMOE = SPECS["olmoe-1b-7b"]  # 64 experts, top 8
_FFN = OLMOE.blocks[0].ffn
assert isinstance(_FFN, Moe)
MOE: Moe = _FFN
SPEC = replace(OLMOE, blocks=tuple(replace(b, ffn=replace(MOE, top_k=4)) for b in OLMOE.blocks))
SIZES = sizes_of(SPEC)
PLAN = make_plan(SPEC, SIZES, 8 * GIB, PlanConstraints(max_num_seqs=64))


def _plan(share: float, seqs: int = 64) -> Plan:
    return replace(
        with_host(PLAN, expert=int(share * SIZES.num_parts[Part.EXPERT])), max_num_seqs=seqs
    )


def _chosen(*, disk=1.0, share=1 / 3, seqs=64, work=None):
    problem = Problem(SPEC, SIZES, machine(disk=disk))
    plan = with_bursts(problem, _plan(share, seqs), work)
    return plan.burst_tokens, plan.burst_max_seqs


def _fixed(seqs: int, burst_tokens: int | None = None) -> PlanConstraints:
    """What need not be searched for."""
    return PlanConstraints(
        max_num_seqs=seqs, max_num_batched_tokens=128, micro_batch_tokens=64, kv_pages=64,
        burst_tokens=burst_tokens,
    )  # fmt: skip


def _work(num: int) -> Workload:
    return Workload.from_lengths(64, 64, num)


def test_few_sequences_that_wait_for_reads_decode_in_bursts():
    slow = find_bursts(Problem(SPEC, SIZES, machine(disk=0.5)), _plan(1 / 3), _work(8))
    assert slow is not None and slow.link > 5 and 1.2 < slow.gain < 1.6
    tokens, few = _chosen(disk=0.5)
    assert tokens in (16, 32) and few == 8
    for num in (2, 4, 8):
        assert _chosen(disk=0.5, work=_work(num)) == (tokens, num)


def test_all_decode_together_where_bursts_bring_nothing():
    assert _chosen(disk=0.5)[0] > 0
    assert _chosen(disk=50.0) == (0, 0), "reads do not bind"
    assert _chosen(disk=0.5, share=1.0) == (0, 0), "all is resident"
    assert _chosen(disk=0.5, work=_work(1)) == _chosen(disk=0.5, seqs=1) == (0, 0)
    for num in (9, 16, 64, 256):
        assert _chosen(disk=0.5, work=_work(num)) == (0, 0), "a job of many"
    assert _chosen(disk=0.5, share=0.02) == (0, 0), "nothing stays from token to token"


def test_few_experts_are_soon_all_in_use():
    few = replace(MOE, num_experts=8, top_k=2)
    spec = replace(OLMOE, blocks=(replace(OLMOE.blocks[0], ffn=few),) * 16)
    sizes = sizes_of(spec)
    plan = make_plan(spec, sizes, 8 * GIB, PlanConstraints(max_num_seqs=64))
    plan = with_host(plan, expert=sizes.num_parts[Part.EXPERT] // 3)
    slow = Problem(spec, sizes, machine(disk=0.05))
    found = with_bursts(slow, plan, None)
    assert found.burst_tokens == 0 or found.burst_max_seqs < 4
    many = find_bursts(slow, plan, _work(8))
    assert many is not None and many.gain < 1 and many.max_seqs == 0


def test_a_job_is_planned_explained_and_run_with_bursts():
    problem, work = Problem(SPEC, SIZES, machine(disk=0.3)), _work(4)
    budget = 4 * GIB
    with few_layers():
        found = explain(problem, work, budget, _fixed(4))
        chosen = choose_plan(problem, Job(work, True), budget, _fixed(4))
    plan = chosen.plan
    assert plan == found.best.plan and plan.burst_tokens >= 16 and plan.burst_max_seqs == 4
    together = estimate(
        problem, replace(plan, burst_tokens=0, burst_max_seqs=0), work, on_clock=False
    )
    few, many = (one.phases["decode"].passes for one in (together, found.best.estimate))
    assert 3 * few < many <= 4 * few, "the job's passes are those of bursts"
    wait = 3 * plan.burst_tokens
    assert any(f"one waits for at most {wait} passes" in line for line in plan.lines())
    (note,) = [line for line in found.lines() if "note: decode: in bursts" in line]
    assert f"bursts of {plan.burst_tokens} tokens give 1." in note
    validate_plan(plan, SPEC, SIZES, PlanConstraints(), budget)


def test_what_the_user_says_is_kept():
    problem = Problem(SPEC, SIZES, machine(disk=50.0))
    for tokens, few in ((0, 0), (5, 12)):
        wanted = _fixed(12, tokens)
        plan = plain_plan(problem, 8 * GIB, wanted).plan
        assert (plan.burst_tokens, plan.burst_max_seqs) == (tokens, few)
    with few_layers():
        job = choose_plan(problem, Job(_work(12), True), 8 * GIB, wanted).plan
    assert (job.burst_tokens, job.burst_max_seqs) == (5, 12)


def test_a_plan_is_checked_for_its_bursts():
    for tokens, few in ((4, 65), (0, 3)):
        plan = replace(PLAN, burst_tokens=tokens, burst_max_seqs=few)
        with pytest.raises(UsageError, match=f"burst_max_seqs: got {few}"):
            validate_plan(plan, SPEC, SIZES, PlanConstraints(), 8 * GIB)
    taken = replace(PLAN, burst_tokens=4, burst_max_seqs=8)
    validate_plan(taken, SPEC, SIZES, PlanConstraints(burst_tokens=4), 8 * GIB)
    with pytest.raises(UsageError, match="burst_tokens: got 0, but the plan that is replayed"):
        validate_plan(taken, SPEC, SIZES, PlanConstraints(burst_tokens=0), 8 * GIB)


def test_plan_files_without_bursts_are_lockstep():
    document = replace(PLAN, burst_tokens=16, burst_max_seqs=8).to_json()
    assert Plan.from_json(document).burst_tokens == 16
    del document["burst_tokens"], document["burst_max_seqs"]
    assert Plan.from_json(document) == PLAN
    with pytest.raises(UsageError, match="burst_tokens: got '16', allowed a value of type int"):
        Plan.from_json({**document, "burst_tokens": "16"})
