"""Whether the host is to compute a share of the experts of generated rows, and the memory of it."""

from dataclasses import replace

from devices import device_problem, quick_search, small_spec, with_rates
from windlass.models.spec import Moe
from windlass.perf.estimate import estimate
from windlass.planner.constraints import PlanConstraints
from windlass.planner.device_budget import plan_for
from windlass.planner.explain import explain
from windlass.planner.search import search
from windlass.planner.validate import validate_plan
from windlass.units import GIB
from windlass.workload import Workload

SPEC = small_spec()
SLOW = dict(down=0.02)


def _found(work, expert_s=0.0, **rates):
    profile = with_rates(**rates)
    host = replace(profile.host, expert_s=profile.host.expert_s + expert_s)
    problem = device_problem(
        SPEC, 2 * GIB, profile=replace(profile, host=host, captured="2026-01-01")
    )
    with quick_search():
        best = search(problem, work, 24 * GIB, PlanConstraints())[0]
    return problem, best


def test_the_planner_takes_a_share_where_costs_say_so():
    few = Workload.from_lengths(64, 200, 2)
    problem, best = _found(few, **SLOW)
    plan = best.plan
    assert plan.host_experts > 0
    assert best.estimate.total_s < estimate(problem, replace(plan, host_experts=0.0), few).total_s
    validate_plan(plan, SPEC, problem.sizes, PlanConstraints(), 24 * GIB)
    # not where the host is slow, nor where the link is fast, nor by rates that nobody has measured
    assert not _found(few, **SLOW, expert_s=10.0)[1].plan.host_experts
    assert not _found(few, down=1000)[1].plan.host_experts
    assumed = replace(problem, profile=replace(problem.profile, captured=""))
    with quick_search():
        assert not search(assumed, few, 24 * GIB, PlanConstraints())[0].plan.host_experts
        found = explain(problem, few, 24 * GIB, PlanConstraints())
    text = "\n".join(found.lines())
    assert f"{100 * plan.host_experts:.0f} % of experts on the host" in text
    assert "computed there sooner than fetched; the host computes" in text


def test_rows_on_their_way_are_planned_for():
    problem = device_problem(SPEC, 2 * GIB)
    fixed = PlanConstraints(max_num_seqs=64, max_model_len=512, kv_pages=1000)
    without, with_share = (
        plan_for(SPEC, problem.sizes, 8 * GIB, replace(fixed, host_experts=share))
        for share in (None, 0.5)
    )
    moe = SPEC.blocks[-1].ffn
    assert isinstance(moe, Moe)
    rows = 4 * 128 * (1 + moe.top_k) * SPEC.hidden_size
    for one, more in zip(without.tiers, with_share.tiers, strict=True):
        assert more.activation_bytes - one.activation_bytes >= rows
        assert more.total_bytes <= more.budget_bytes
