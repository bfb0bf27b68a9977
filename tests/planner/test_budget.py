"""Plans add up, keep to the budget, and the smallest budget named is the smallest that works."""

import re
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from planning import SPECS, round_sizes
from windlass.build.checkpoint_sizes import cache_shapes
from windlass.errors import BudgetError, UsageError
from windlass.ids import Part
from windlass.kvcache.kv_cache import bytes_per_token
from windlass.models.spec import Gqa
from windlass.perf.sizes import Sizes
from windlass.plan import Plan
from windlass.planner.budget import PlanConstraints, make_plan
from windlass.units import GIB, MIB


def smallest_named(error: BudgetError) -> int:
    """Bytes of the smallest budget that a message names."""
    found = re.search(r"at least (\d+)MiB", str(error))
    assert found is not None
    return int(found[1]) * MIB


def _total(plan: Plan, sizes: Sizes) -> int:
    """The sum, counted apart from the planner."""
    host = plan.host
    slots = sum(count * sizes.slot_bytes[part] for part, count in host.slots.items())
    kv = host.kv_pages * plan.page_tokens * sizes.bytes_per_token
    return host.process_bytes + host.activation_bytes + slots + kv


@settings(max_examples=200, deadline=None)
@given(
    st.sampled_from(sorted(SPECS)),
    st.integers(300 * MIB, 200 * GIB),
    st.one_of(st.none(), st.integers(1, 500)),
    st.one_of(st.none(), st.integers(1, 20_000)),
    st.one_of(st.none(), st.integers(65, 9000)),
    st.one_of(st.none(), st.integers(2, 9000)),
)  # fmt: skip
def test_plans_add_up_and_keep_to_the_budget(name, budget, seqs, experts, rows, context):
    spec, sizes = SPECS[name], round_sizes(SPECS[name])
    wanted = PlanConstraints(
        max_num_seqs=seqs, expert_slots=experts, max_num_batched_tokens=rows, max_model_len=context
    )
    try:
        plan = make_plan(spec, sizes, budget, wanted)
    except UsageError:
        too_few = seqs is not None and rows is not None and rows < seqs + 64
        assert too_few or (context is not None and context > spec.max_positions)
        return
    except BudgetError as error:
        smallest = smallest_named(error)
        assert smallest > budget
        plan = make_plan(spec, sizes, smallest, wanted)
        budget = smallest
    assert plan.host.total_bytes == _total(plan, sizes) <= budget
    assert plan.max_num_batched_tokens >= plan.max_num_seqs + 64
    assert seqs is None or plan.max_num_seqs == seqs
    assert rows is None or plan.max_num_batched_tokens == rows
    most = sizes.num_parts[Part.EXPERT]
    assert experts is None or plan.host.slots[Part.EXPERT] == min(experts, most)
    assert plan.max_model_len == min(
        context or spec.max_positions, plan.host.kv_pages * plan.page_tokens
    )
    assert context is None or plan.max_model_len == context


def test_much_less_than_the_smallest_is_refused():
    spec, sizes = SPECS["olmoe-1b-7b"], round_sizes(SPECS["olmoe-1b-7b"])
    with pytest.raises(BudgetError) as info:
        make_plan(spec, sizes, 100 * MIB, PlanConstraints())
    smallest = smallest_named(info.value)
    make_plan(spec, sizes, smallest, PlanConstraints())
    with pytest.raises(BudgetError):
        make_plan(spec, sizes, smallest - 16 * MIB, PlanConstraints())


def test_a_large_budget_holds_everything_and_a_larger_one_no_less():
    spec, sizes = SPECS["olmoe-1b-7b"], round_sizes(SPECS["olmoe-1b-7b"])
    plans = [make_plan(spec, sizes, size * GIB, PlanConstraints()) for size in (2, 4, 8, 16, 64)]
    assert plans[-1].host.slots == sizes.num_parts
    for small, large in zip(plans, plans[1:], strict=False):
        assert small.max_num_seqs <= large.max_num_seqs
        assert small.host.slots[Part.EXPERT] <= large.host.slots[Part.EXPERT]


@pytest.mark.parametrize(("name", "width"), [("qwen3-moe-1b", 64), ("olmoe-1b-7b", 128)])
def test_int8_rows_are_room_for_nearly_twice_the_tokens(name, width):
    spec = SPECS[name]
    attention = spec.blocks[0].attention
    assert isinstance(attention, Gqa) and attention.head_dim == width
    pages = {}
    for dtype in (torch.bfloat16, torch.int8):
        per_token = bytes_per_token(cache_shapes(spec), dtype)
        sizes = replace(round_sizes(spec), bytes_per_token=per_token)
        plan = make_plan(
            spec, sizes, 1 * GIB, PlanConstraints(max_num_seqs=64, max_num_batched_tokens=512)
        )
        assert plan.host.kv_pages * plan.page_tokens < 64 * 1024, "the budget must be what limits"
        pages[dtype] = plan.host.kv_pages
    more = pages[torch.int8] / pages[torch.bfloat16]
    assert more == pytest.approx(2 * width / (width + 4), rel=0.02)


def test_recurrent_state_is_counted():
    spec, sizes = SPECS["olmoe-1b-7b"], round_sizes(SPECS["olmoe-1b-7b"])
    wanted = PlanConstraints(max_num_seqs=16)
    plain = make_plan(spec, sizes, 4 * GIB, wanted)
    heavy = make_plan(spec, replace(sizes, state_bytes=64 * MIB), 4 * GIB, wanted)
    assert heavy.host.state_slots == 16 and plain.host.state_slots == 0
    assert plain.prefix_caching and not heavy.prefix_caching  # no state is kept of a prefix
    assert heavy.host.total_bytes <= 4 * GIB
    assert heavy.host.total_bytes - _total(heavy, sizes) == 16 * 64 * MIB


@pytest.mark.parametrize(
    ("field", "value"),
    [("max_num_seqs", 0), ("max_num_batched_tokens", 64), ("micro_batch_tokens", 63),
     ("max_model_len", 1), ("expert_slots", 0), ("mixed_prefill_tokens", 63)],
)  # fmt: skip
def test_nonsense_is_refused_by_name(field, value):
    spec = SPECS["olmoe-1b-7b"]
    with pytest.raises(UsageError, match=f"{field}: got {value}"):
        make_plan(spec, round_sizes(spec), 64 * GIB, PlanConstraints(**{field: value}))


def test_what_changes_no_size_is_handed_on():
    spec = SPECS["olmoe-1b-7b"]
    for mixed, shares in ((None, True), (0, False), (64, True)):
        wanted = PlanConstraints(mixed_prefill_tokens=mixed, prefix_caching=shares)
        plan = make_plan(spec, round_sizes(spec), 4 * GIB, wanted)
        assert (plan.mixed_prefill_tokens, plan.prefix_caching) == (mixed, shares)
