"""Plans for a device above its host: within both memories, better for more of anything, bound by
what is slow."""

import re
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from amounts import some
from devices import device_problem, quick_search, small_spec, with_rates
from planning import SPECS
from windlass.errors import BudgetError, UsageError
from windlass.ids import DEVICE, Home, HomeShares, Part
from windlass.perf.estimate import estimate
from windlass.perf.sizes import Sizes
from windlass.plan import Plan, TierPlan
from windlass.planner.choose import choose_plan, plain_plan
from windlass.planner.constraints import PlanConstraints
from windlass.planner.device_budget import plan_for
from windlass.planner.explain import explain
from windlass.planner.search import _Machine, search
from windlass.planner.validate import validate_plan
from windlass.runtime.host_attention import Staging
from windlass.runtime.kv_rounds import half_pages
from windlass.units import GIB, MIB
from windlass.workload import Job, Workload

SPEC = small_spec()
WORK = Workload.from_lengths(128, 32, 64)


def _added_up(tier: TierPlan, sizes: Sizes) -> int:
    """The sum, counted apart from the planner."""
    assert sizes.device is not None
    each = sizes.device.slot_bytes if tier.name == DEVICE else sizes.slot_bytes
    slots = sum(each[part] * count for part, count in tier.slots.items())
    states = tier.state_slots + tier.kept_states
    kept = tier.kv_pages * tier.kv_page_bytes + states * sizes.state_bytes
    return tier.process_bytes + tier.activation_bytes + slots + kept + tier.forecast_bytes


@settings(max_examples=some(60, of=150), deadline=None)
@given(
    st.sampled_from(sorted(SPECS)), st.floats(0.3, 80), st.floats(0.3, 200),
    st.sampled_from((None, 0.0, 0.25, 1.0)), st.one_of(st.none(), st.integers(1, 500)),
    st.one_of(st.none(), st.integers(1, 4000)), st.sampled_from((None, 2)),
    st.sampled_from((0, 3 * MIB)), st.sampled_from((None, 0.5, 1.0)),
)  # fmt: skip
def test_no_plan_breaks_a_memory(name, device, host, share, seqs, pages, groups, state, streamed):
    problem = device_problem(SPECS[name], device * GIB)
    sizes = replace(problem.sizes, state_bytes=state)
    assert sizes.device is not None
    streamed = min(streamed or 0.0, 1 - (share or 0.0))
    wanted = PlanConstraints(
        max_num_seqs=seqs, kv_pages=pages, host_attention=share, groups=groups,
        kv_offloading_share=streamed,
    )  # fmt: skip
    try:
        plan = plan_for(problem.spec, sizes, int(host * GIB), wanted)
    except BudgetError as error:
        smallest = re.search(r"(device|host) memory: .* at least (\d+)MiB", str(error))
        assert smallest is not None, str(error)
        had = {"device": device, "host": host}[smallest[1]] * 1024
        assert int(smallest[2]) >= int(had)
        return
    above = plan.above
    assert above is not None and plan.top is above and [t.name for t in plan.tiers][1:] == [DEVICE]
    assert above.total_bytes == _added_up(above, sizes) <= sizes.device.budget_bytes
    assert plan.host.total_bytes == _added_up(plan.host, sizes) <= int(host * GIB)
    assert seqs is None or plan.max_num_seqs == seqs
    assert pages is None or plan.kv_pages == pages
    assert plan.shares == HomeShares(share or 0.0, streamed)
    share = plan.shares.below
    assert (plan.host.kv_pages > 0) >= (share == 1) and (above.kv_pages == 0) >= (share == 1)
    if streamed:
        each, context = sizes.staged_bytes_per_token, plan.max_model_len
        place = half_pages(each, plan.page_tokens, context) * plan.page_tokens * each
        assert 2 * place < above.activation_bytes
        assert plan.pages[Home.STREAMED] <= plan.host.kv_pages
    assert above.state_slots == (plan.max_num_seqs if state else 0) and not plan.host.state_slots
    assert not plan.host.kept_states and not above.kept_states
    for part, slots in above.slots.items():  # what is copied there has a slot to come through
        assert plan.host.slots[part] >= min(1, slots)
    if groups == 2:
        assert above.slots[Part.EXPERT] > SPECS[name].blocks[-1].ffn.num_experts  # type: ignore[union-attr]
    assert Plan.from_json(plan.to_json()) == plan


def test_what_stays_on_the_device_takes_one_slot_of_the_host():
    problem = device_problem(SPEC, 4 * GIB)
    plan = plan_for(SPEC, problem.sizes, 8 * GIB, PlanConstraints())
    above = plan.above
    assert above is not None and above.slots[Part.BLOCK] == len(SPEC.blocks)
    assert plan.host.slots[Part.BLOCK] == plan.host.slots[Part.HEAD] == 1
    assert plan.host.slots[Part.EXPERT] == problem.sizes.num_parts[Part.EXPERT]


def test_a_larger_device_holds_no_less_and_a_larger_host_too():
    slots = []
    for gigabytes in (3, 4, 8, 40):
        problem = device_problem(SPEC, gigabytes * GIB)
        wanted = PlanConstraints(max_num_seqs=16, max_num_batched_tokens=256, kv_pages=64)
        plan = plan_for(SPEC, problem.sizes, 8 * GIB, wanted)
        assert plan.above is not None
        slots.append(plan.above.slots[Part.EXPERT])
    assert slots == sorted(slots) and slots[0] < slots[-1] == 64
    problem = device_problem(SPEC, 2 * GIB)
    held = [
        plan_for(SPEC, problem.sizes, size * GIB, PlanConstraints()).host.slots[Part.EXPERT]
        for size in (1, 2, 4)
    ]
    assert held == sorted(held) and held[0] < held[-1] == 64


def test_a_memory_that_is_too_small_is_named():
    problem = device_problem(SPEC, 256 * MIB)
    with pytest.raises(
        BudgetError, match=r"device memory: got .* at least \d+MiB .*raise --device"
    ):
        plan_for(SPEC, problem.sizes, 8 * GIB, PlanConstraints())
    problem = device_problem(SPEC, 4 * GIB)
    with pytest.raises(BudgetError, match=r"host memory: got .* at least \d+MiB beside a device"):
        plan_for(SPEC, problem.sizes, 250 * MIB, PlanConstraints())


def _best(memory, host_memory, work=WORK, **rates):
    problem = device_problem(SPEC, memory * GIB, profile=with_rates(**rates))
    with quick_search():
        return search(problem, work, int(host_memory * GIB), PlanConstraints())[0]


@pytest.mark.parametrize(
    ("rates", "device", "host", "binds"),
    [
        (dict(), 2, 8, "down"),
        (dict(down=1000, disk=1000), 2, 8, "device"),
        (dict(down=1000, disk=0.1), 2, 1.2, "disk"),
        (dict(down=1000, disk=1000), 40, 8, "device"),
    ],
)  # fmt: skip
def test_what_is_slow_binds(rates, device, host, binds):
    found = _best(device, host, **rates).estimate
    decode = found.phases.get("decode") or found.phases["mixed"]
    assert decode.bottleneck == binds, decode.bound
    for name, phase in found.phases.items():
        if name != "load":
            assert max(phase.bound.values()) <= phase.seconds * 1.001, name
            assert max(phase.busy.values()) <= phase.seconds * 1.001, name


@pytest.mark.parametrize("which", ["memory", "host_memory"])
def test_more_memory_is_hardly_ever_worse(which):
    base = {"memory": 2.0, "host_memory": 1.5}
    times = [
        _best(**{**base, which: base[which] * factor}).estimate.total_s for factor in (1, 2, 6)
    ]
    assert times[1] <= 1.03 * times[0] and times[2] <= 1.03 * times[1] and times[2] < times[0]


@pytest.mark.parametrize("rate", ["down", "disk", "device"])
def test_faster_parts_never_slow_a_job(rate):
    host = 1.0 if rate == "disk" else 8
    slow, fast = (_best(2, host, **{rate: factor}).estimate.total_s for factor in (1, 4))
    assert fast <= 1.02 * slow


def test_keys_and_values_go_to_the_host_where_the_device_has_no_room_for_them():
    """Long sequences whose keys and values are larger than the device; a device that holds the
    model keeps them, unless the host is as fast."""
    long = Workload.from_lengths(3000, 64, 64)
    small = _best(2, 24, long).plan
    assert small.host_attention > 0 and small.host.kv_pages > 0
    assert Staging.of(SPEC, small).num_bytes < small.host.activation_bytes
    large = _best(60, 24, long, host=0.02).plan
    assert large.host_attention == 0 and large.host.kv_pages == 0


def test_they_come_to_the_device_where_the_host_is_too_slow_to_attend():
    """Neither has room and speed for them; a link that is slow too has the device keep fewer."""
    long = Workload.from_lengths(3000, 64, 64)
    weak = _best(2, 24, long, host=0.05, down=2)
    plan = weak.plan
    assert plan.kv_offloading_share > 0 and plan.host_attention == 0 and plan.host.kv_pages > 0
    problem = device_problem(SPEC, 2 * GIB, profile=with_rates(host=0.05, down=2))
    other = plan_for(
        SPEC, problem.sizes, 24 * GIB,
        replace(
            PlanConstraints.of(plan), host_attention=plan.kv_offloading_share,
            kv_offloading_share=0.0, expert_slots=None,
        ),
    )  # fmt: skip
    assert weak.estimate.total_s < estimate(problem, other, long).total_s
    machine = _Machine(SPEC, problem.sizes, 24 * GIB, 0)
    some = machine._shares(PlanConstraints(kv_offloading_share=0.75))
    assert some == [(0.0, 0.75), (0.25, 0.75)], "what the user says is kept"
    assert (0.5, 0.5) in machine._shares(PlanConstraints()), "nobody is left on the device"


def test_a_plan_that_is_chosen_keeps_its_homes_beside_a_process_that_has_grown():
    problem = device_problem(SPEC, 2 * GIB)
    long = Workload.from_lengths(3000, 64, 64)
    with quick_search():
        chosen = choose_plan(
            problem, Job(long, True), 24 * GIB, PlanConstraints(), growth=lambda: 100 * MIB
        )
        best = search(problem, long, 24 * GIB, PlanConstraints())[0].plan
    plan = chosen.plan
    assert plan.host.process_bytes == problem.sizes.process_bytes + 100 * MIB
    assert (plan.host_attention, plan.groups, plan.kv_pages) == (
        best.host_attention, best.groups, best.kv_pages,
    )  # fmt: skip
    assert plain_plan(problem, 24 * GIB, PlanConstraints()).plan.host_attention == 0


def test_a_device_is_explained_by_memory_and_by_link():
    problem = device_problem(SPEC, 2 * GIB)
    with quick_search():
        found = explain(problem, WORK, 8 * GIB, PlanConstraints())
    host, device, disk = found.tiers
    plan = found.best.plan
    assert plan.above is not None and host.used == plan.host.total_bytes
    assert device.budget == 2 * GIB and device.used == plan.above.total_bytes <= 2 * GIB
    assert disk.holds["weights read"] == 0  # the host holds all experts, the device all else
    text = "\n".join(found.lines())
    for words in ("device: 1.", "context 128 MiB", "bottleneck: link down", "link up",
                  "least of others: ", "one more GiB of device memory would save",
                  "% of attention on the host", "note: an expert in RAM with up to 1"):  # fmt: skip
        assert words in text, words
    document = found.to_json()
    assert set(document["one_more_gib"]) == {"host", "device"}
    assert document["plan"]["tiers"]["device"]["total_bytes"] == device.used
    assert found.more_device_s is not None
    richer = estimate(problem, plan, WORK).total_s - found.more_device_s
    assert richer > 0


def test_a_plan_of_a_device_is_checked_before_it_is_replayed():
    problem = device_problem(SPEC, 2 * GIB)
    plan = plan_for(SPEC, problem.sizes, 8 * GIB, PlanConstraints())
    validate_plan(plan, SPEC, problem.sizes, PlanConstraints(), 8 * GIB)
    with pytest.raises(BudgetError, match="plan: needs"):
        validate_plan(plan, SPEC, problem.sizes, PlanConstraints(), 2 * GIB)
    with pytest.raises(UsageError, match="host_attention: got 0.5, but the plan"):
        validate_plan(plan, SPEC, problem.sizes, PlanConstraints(host_attention=0.5), 8 * GIB)
    assert problem.sizes.device is not None
    less = replace(problem.sizes.device, budget_bytes=GIB)
    with pytest.raises(BudgetError, match="of the device"):
        validate_plan(plan, SPEC, replace(problem.sizes, device=less), PlanConstraints(), 8 * GIB)
