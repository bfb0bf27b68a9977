"""Whether generated rows are to go through experts each by itself."""

from dataclasses import replace

import pytest

from devices import device_problem, quick_search, small_spec
from windlass.models.spec import Moe
from windlass.planner.constraints import PlanConstraints
from windlass.planner.device_budget import plan_for, row_reads
from windlass.planner.explain import explain
from windlass.planner.validate import validate_plan
from windlass.units import GIB
from windlass.workload import Workload

SPEC = small_spec()
FIXED = PlanConstraints(max_model_len=512, kv_pages=1000)


def _problem(backend="triton", drafts=0):
    problem = device_problem(SPEC, 2 * GIB)
    device = problem.sizes.device
    assert device is not None
    sizes = replace(problem.sizes, device=replace(device, backend=backend), drafts=drafts)
    return replace(problem, sizes=sizes)


def _mode(seqs, problem, **wanted):
    constraints = replace(FIXED, max_num_seqs=seqs, **wanted)
    plan = plan_for(SPEC, problem.sizes, 8 * GIB, constraints)
    validate_plan(plan, SPEC, problem.sizes, constraints, 8 * GIB)
    return plan.generated_experts


def test_reads_of_rows_for_each_of_tiles():
    moe = SPEC.blocks[-1].ffn
    assert isinstance(moe, Moe)
    assert row_reads(SPEC, 1) == pytest.approx(1)
    share = moe.top_k / moe.num_experts  # of two rows a second one finds as much of the first's
    assert row_reads(SPEC, 2) == pytest.approx(2 / (2 - share))
    assert row_reads(SPEC, 10_000) == pytest.approx(10_000 * share)


def test_where_few_sequences_hardly_share_experts():
    assert _mode(1, _problem()) == "rows"
    assert _mode(64, _problem()) == "tiles"
    fewest = next(n for n in range(1, 64) if row_reads(SPEC, n) > 1.125)
    assert (_mode(fewest - 1, _problem()), _mode(fewest, _problem())) == ("rows", "tiles")
    assert _mode(1, _problem(drafts=fewest - 1)) == "tiles"  # rows of guesses too
    assert _mode(1, _problem("torch")) == "tiles"  # whose experts are computed one by one anyway
    assert _mode(1, _problem(), host_experts=0.5) == "tiles"


def test_the_plan_says_so():
    with quick_search():
        one = replace(FIXED, max_num_seqs=1)
        found = explain(_problem(), Workload.from_lengths(1, 20, 50), 8 * GIB, one)
    text = "\n".join(found.lines())
    assert ", generated rows one by one" in text
    assert "1 generated rows a pass, each by itself, read 1.00 times the experts" in text
