"""The search for a plan: never beyond a budget, never slower than plain rules, near the best of a
grid, and obedient to what is fixed."""

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from amounts import some
from devices import quick_search
from planning import SPECS, few_layers, machine, sizes_of
from windlass.errors import BudgetError
from windlass.ids import Part
from windlass.models.spec import Moe
from windlass.perf.estimate import estimate, steady_seconds
from windlass.perf.sizes import Problem
from windlass.planner.budget import make_plan
from windlass.planner.choose import choose_plan, single_request
from windlass.planner.constraints import PlanConstraints
from windlass.planner.search import search
from windlass.units import GIB, MIB
from windlass.workload import Job, Workload

SMALL, OLMOE = SPECS["qwen3-moe-1b"], SPECS["olmoe-1b-7b"]


@st.composite
def problems(draw):
    """A model of any shape, a machine, a budget and a job."""
    spec = draw(st.sampled_from((SMALL, OLMOE)))
    moe = spec.blocks[0].ffn
    assert isinstance(moe, Moe)
    num = draw(st.integers(2, 40))
    ffn = replace(
        moe,
        num_experts=num,
        top_k=draw(st.integers(1, min(8, num))),
        expert=replace(moe.expert, intermediate=64 * draw(st.integers(1, 40))),
    )
    blocks = [replace(spec.blocks[0], ffn=ffn)] * draw(st.integers(1, 12))
    if draw(st.booleans()):
        blocks[0] = replace(blocks[0], ffn=replace(moe.expert, intermediate=4096))
        blocks.append(replace(spec.blocks[0], ffn=ffn))
    spec = replace(spec, blocks=tuple(blocks), vocab_size=draw(st.sampled_from((1000, 150_000))))
    sizes = replace(
        sizes_of(spec),
        process_bytes=draw(st.integers(0, 400)) * MIB,
        bytes_per_token=draw(st.sampled_from((0, 2000, 100_000))),
        state_bytes=draw(st.sampled_from((0, 0, 3 * MIB))),
    )
    lengths = draw(
        st.lists(st.tuples(st.integers(1, 900), st.integers(1, 300)), min_size=1, max_size=30)
    )
    profile = machine(disk=draw(st.floats(0.1, 20)), compute=draw(st.floats(0.1, 20)))
    budget = draw(st.integers(300 * MIB, 12 * GIB))
    return spec, sizes, profile, Workload(*zip(*lengths, strict=True)), budget


@settings(max_examples=some(8, of=20), deadline=None)  # of a quarter of a second each
@given(
    problems(), st.sampled_from((None, 1, 7, 64)), st.sampled_from((None, 3, 50)),
    st.sampled_from((None, 0, 0)),
)  # fmt: skip
def test_no_plan_breaks_its_budget_or_what_is_fixed(problem, seqs, experts, bursts):
    spec, sizes, profile, work, budget = problem
    wanted = PlanConstraints(max_num_seqs=seqs, expert_slots=experts, burst_tokens=bursts)
    try:
        make_plan(spec, sizes, budget, wanted)
    except BudgetError:
        with pytest.raises(BudgetError):
            search(Problem(spec, sizes, profile), work, budget, wanted)
        return
    with few_layers():
        found = search(Problem(spec, sizes, profile), work, budget, wanted)
    assert found
    for plan in (one.plan for one in found):
        host = plan.host
        weights = sum(sizes.slot_bytes[p] * n for p, n in host.slots.items())
        kept = host.kv_pages * max(1, plan.page_tokens * sizes.bytes_per_token)
        assert not host.kept_states, "a job's prompts are no turns of a chat"
        kept += host.state_slots * sizes.state_bytes
        total = host.process_bytes + host.activation_bytes + weights + kept
        assert host.total_bytes == total <= budget
        assert seqs is None or plan.max_num_seqs == seqs
        assert experts is None or host.slots[Part.EXPERT] == min(
            experts, sizes.num_parts[Part.EXPERT]
        )
        assert plan.max_num_batched_tokens >= plan.max_num_seqs + 64
    if bursts is None:
        return  # plans are ranked as all together decode: predicted times of bursts know no reuse
    times = [one.estimate.total_s for one in found]
    even = [max(one, 1.005 * min(times)) for one in times]  # of those as fast, the smallest first
    assert even == sorted(even)
    pages = [
        one.plan.host.kv_pages for one, time in zip(found, even, strict=True) if time == even[0]
    ]
    assert pages == sorted(pages)


JOBS = {
    "even": Workload.from_lengths(128, 16, 64),
    "ragged": Workload(
        tuple(30 + 61 * i % 500 for i in range(60)), tuple(1 + 37 * i % 60 for i in range(60))
    ),
    "one": Workload.from_lengths(100, 60, 1),
    "prompts": Workload.from_lengths(900, 1, 40),
}


@pytest.mark.parametrize(
    ("job", "gigabytes", "disk"),
    [("even", 1, 6), ("ragged", 1, 0.3), ("ragged", 4, 0.3), ("one", 1, 6), ("prompts", 2, 1),
     *(pytest.param(*one, marks=pytest.mark.slow)
       for one in (("even", 2, 0.3), ("ragged", 2, 6), ("one", 3, 0.3), ("even", 20, 1),
                   ("ragged", 20, 1)))],
)  # fmt: skip
@few_layers()
def test_near_the_best_of_a_grid_and_never_behind_plain_rules(job, gigabytes, disk):
    """The planner's choice within 10 % of the best of a grid's settings that fit. Those whose
    busiest lane alone works longer than the choice takes are not run on the clock."""
    sizes, work = sizes_of(SMALL), JOBS[job]
    problem = Problem(SMALL, sizes, machine(disk=disk))
    budget = gigabytes * GIB
    best = search(problem, work, budget, PlanConstraints())[0]
    assert best.plan.max_model_len >= work.longest
    plans = {make_plan(SMALL, sizes, budget, PlanConstraints())}
    for seqs in (1, 8, 24, 48, 150):
        for rows in (128, 512, 2048):
            for pages in (40, 100, 900):
                values = PlanConstraints(
                    max_num_seqs=seqs, max_num_batched_tokens=max(rows, seqs + 64), kv_pages=pages
                )
                try:
                    plans.add(make_plan(SMALL, sizes, budget, values))
                except BudgetError:
                    continue
    fitting = [plan for plan in plans if plan.max_model_len >= work.longest]
    assert len(fitting) >= 15

    def seconds(plan, *, on_clock):
        return estimate(problem, plan, work, on_clock=on_clock).total_s

    chosen = best.estimate.total_s
    rivals = [plan for plan in fitting if seconds(plan, on_clock=False) < chosen]
    assert all(chosen <= 1.1 * seconds(plan, on_clock=True) for plan in rivals)


@quick_search()
def test_a_job_that_shares_its_prompts_is_planned_for_what_it_computes():
    """No worse than the plan for the same job without sharing, and another where that is off."""
    problem = Problem(SMALL, sizes_of(SMALL), machine(disk=2))
    whole = Workload.from_lengths(640, 16, 100)
    work = replace(whole, shared_tokens=(0,) + (576,) * 99)
    best, *_ = search(problem, work, 2 * GIB, PlanConstraints())
    other, *_ = search(problem, whole, 2 * GIB, PlanConstraints())
    near = estimate(problem, other.plan, work).total_s
    assert best.estimate.total_s <= 1.02 * near and near < 0.7 * other.estimate.total_s
    off = PlanConstraints(prefix_caching=False)
    assert search(problem, work, 2 * GIB, off) == search(problem, whole, 2 * GIB, off)


def test_the_closed_form_has_the_prompt_rows_that_are_computed():
    work = Workload((640,) * 100, (4,) * 100, (0,) + (576,) * 99)
    rows = steady_seconds(work, 16, 1024, lambda decode, prompt: prompt)
    assert rows == pytest.approx(work.computed_prompt_tokens)


@quick_search()
def test_more_memory_never_slows():
    problem, work = Problem(OLMOE, sizes_of(OLMOE), machine(disk=2)), JOBS["ragged"]
    times = [
        search(problem, work, size * GIB // 2, PlanConstraints())[0].estimate.total_s
        for size in (3, 8, 40)
    ]
    for less, more in zip(times, times[1:], strict=False):
        assert more <= 1.02 * less, times


@quick_search()
def test_a_sequence_longer_than_fits_is_planned_as_long_as_fits():
    problem = Problem(OLMOE, sizes_of(OLMOE), machine())
    work = Workload((100, 100_000), (50, 100_000))
    plan = search(problem, work, 2 * GIB, PlanConstraints())[0].plan
    assert plan.max_model_len > 2000


@quick_search()
def test_a_larger_context_than_the_job_needs_can_be_asked_for():
    problem, work = Problem(SMALL, sizes_of(SMALL), machine()), Workload.from_lengths(20, 4, 4)
    args = (problem, work, 2 * GIB, PlanConstraints())
    assert search(*args)[0].plan.max_model_len < 2000
    assert all(one.plan.max_model_len >= 4000 for one in search(*args, context=4000))


@quick_search()
def test_what_a_job_leaves_open_gets_room():
    problem = Problem(SMALL, sizes_of(SMALL), machine())

    def length(max_tokens):
        job = single_request(20, max_tokens)
        return choose_plan(problem, job, 4 * GIB, PlanConstraints()).plan.max_model_len

    assert length(8) < 2000 <= length(None)


@quick_search()
def test_a_process_that_grows_meanwhile_is_counted():
    problem = Problem(SMALL, sizes_of(SMALL), machine())
    job = Job(JOBS["even"], True)
    chosen = choose_plan(problem, job, 2 * GIB, PlanConstraints(), growth=lambda: 100 * MIB)
    assert chosen.plan.host.process_bytes == problem.sizes.process_bytes + 100 * MIB
    assert chosen.plan.host.total_bytes <= 2 * GIB
    (line,) = chosen.lines()
    assert "64 sequences of 128 tokens in and 16 out" in line and "assumed" in line
    with pytest.raises(BudgetError):
        choose_plan(problem, job, 500 * MIB, PlanConstraints(), growth=lambda: 300 * MIB)
