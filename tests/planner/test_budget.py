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
from windlass.planner.budget import make_plan
from windlass.planner.constraints import PlanConstraints
from windlass.planner.validate import validate_plan
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
    assert plain.prefix_caching and not heavy.prefix_caching  # found where a state is kept alone
    assert heavy.host.total_bytes <= 4 * GIB
    states = 16 + heavy.host.kept_states
    assert heavy.host.total_bytes - _total(heavy, sizes) == states * 64 * MIB


@pytest.mark.parametrize("gigabytes", [3, 4, 6, 8, 20])
def test_states_are_kept_of_a_twentieth_of_what_is_left_or_of_what_is_left_over(gigabytes):
    spec = SPECS["olmoe-1b-7b"]
    sizes = replace(round_sizes(spec), state_bytes=8 * MIB)
    wanted = PlanConstraints(max_num_seqs=4, max_num_batched_tokens=128)
    plan = make_plan(spec, sizes, gigabytes * GIB, wanted)
    kept = plan.host.kept_states
    assert plan.host.total_bytes == _total(plan, sizes) + (4 + kept) * 8 * MIB <= gigabytes * GIB
    is_whole = plan.host.slots == dict(sizes.num_parts)
    assert kept == 16 if is_whole else 0 < kept <= gigabytes * GIB // 20 // (8 * MIB)
    assert is_whole == (gigabytes == 20)
    for fixed in (replace(wanted, prefix_caching=False), replace(wanted, kept_states=0)):
        assert not make_plan(spec, sizes, gigabytes * GIB, fixed).host.kept_states


@pytest.mark.parametrize(
    ("field", "value"),
    [("max_num_seqs", 0), ("max_num_batched_tokens", 64), ("micro_batch_tokens", 63),
     ("max_model_len", 1), ("expert_slots", 0), ("mixed_prefill_tokens", 63), ("groups", 0)],
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


def test_groups_get_slots_for_the_experts_of_a_layer_or_are_refused():
    spec, sizes = SPECS["olmoe-1b-7b"], round_sizes(SPECS["olmoe-1b-7b"])  # 64 experts a layer
    named = {}
    for groups in (1, 2, 3):
        wanted = PlanConstraints(groups=groups, max_num_seqs=256)
        with pytest.raises(BudgetError) as info:
            make_plan(spec, sizes, 300 * MIB, wanted)
        smallest = named[groups] = smallest_named(info.value)
        plan = make_plan(spec, sizes, smallest, wanted)
        assert plan.groups == groups and plan.host.total_bytes <= smallest
        slots = plan.host.slots
        assert slots[Part.EXPERT] >= (65 if groups > 1 else 2) and slots[Part.BLOCK] >= 2
        # those that decode are cut into as many micro-batches
        assert plan.micro_batch_tokens == {1: 1024, 2: 128, 3: 86}[groups]
    # what groups route is put together: memory beside the slots, less of attention
    assert named[2] - named[1] > 60 * sizes.slot_bytes[Part.EXPERT]
    large = make_plan(spec, sizes, 64 * GIB, PlanConstraints(groups=2, micro_batch_tokens=512))
    assert large.host.slots == sizes.num_parts and large.micro_batch_tokens == 512
    few = make_plan(spec, sizes, 8 * GIB, PlanConstraints(groups=2, expert_slots=4))
    assert few.host.slots[Part.EXPERT] == 4, "what the user fixes is kept"


def test_groups_are_part_of_the_plan():
    spec, sizes = SPECS["olmoe-1b-7b"], round_sizes(SPECS["olmoe-1b-7b"])
    plain = make_plan(spec, sizes, 8 * GIB, PlanConstraints())
    plan = make_plan(spec, sizes, 8 * GIB, PlanConstraints(groups=2))
    assert Plan.from_json(plan.to_json()) == plan
    assert [line for line in plan.lines() if "2 groups of rows" in line]
    assert not [line for line in plain.lines() if "groups" in line]
    document = plain.to_json()
    del document["groups"]
    assert Plan.from_json(document) == plain, "files from before there were groups"
    validate_plan(plan, spec, sizes, PlanConstraints(), 8 * GIB)
    with pytest.raises(UsageError, match="groups: got 3, but the plan that is replayed says 2"):
        validate_plan(plan, spec, sizes, PlanConstraints(groups=3), 8 * GIB)
    with pytest.raises(UsageError, match="plan: groups: got 0, allowed 1 or more"):
        validate_plan(replace(plan, groups=0), spec, sizes, PlanConstraints(), 8 * GIB)


def test_a_server_has_room_for_several_contexts():
    """Where all weights fit, of all that is left; else of a smaller share than a job's, so that few
    clients find no fewer experts."""
    spec, sizes = SPECS["olmoe-1b-7b"], round_sizes(SPECS["olmoe-1b-7b"])
    job, server = PlanConstraints(), PlanConstraints(serves=True)
    for budget in (2, 3, 4, 8, 16, 64):
        one, other = (make_plan(spec, sizes, budget * GIB, wanted) for wanted in (job, server))
        tokens = other.host.kv_pages * other.page_tokens
        assert other.host.slots[Part.EXPERT] >= one.host.slots[Part.EXPERT]
        assert (one.max_num_seqs, one.max_num_batched_tokens) == (
            other.max_num_seqs, other.max_num_batched_tokens,
        )  # fmt: skip
        assert tokens // other.max_model_len >= min(4, tokens // 4096)
        assert other.max_model_len >= min(4096, tokens, spec.max_positions)
    assert other.host.slots == sizes.num_parts
    assert other.host.total_bytes > 63 * GIB, "all that is left"
    few = replace(server, max_num_seqs=4)
    most = make_plan(spec, sizes, 64 * GIB, few).host
    assert most.kv_pages * other.page_tokens == 4 * spec.max_positions, "no sequence wants more"
    asked = make_plan(spec, sizes, 4 * GIB, replace(few, max_model_len=3000))
    assert asked.max_model_len == 3000


def test_a_plan_of_a_server_is_replayed_as_any_other():
    spec, sizes = SPECS["olmoe-1b-7b"], round_sizes(SPECS["olmoe-1b-7b"])
    plan = make_plan(spec, sizes, 4 * GIB, PlanConstraints(serves=True))
    validate_plan(plan, spec, sizes, PlanConstraints(), 4 * GIB)
