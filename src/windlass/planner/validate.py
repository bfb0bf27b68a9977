"""Whether a plan that was made elsewhere can run here. Pure arithmetic over sizes."""

from dataclasses import fields

from windlass.errors import BudgetError, UsageError
from windlass.ids import Part
from windlass.models.spec import ModelSpec
from windlass.perf.sizes import DeviceSizes, Sizes
from windlass.plan import PAGE_TOKENS, Plan, TierPlan
from windlass.planner.budget import MIN_SLOTS, NOISE_BYTES, bytes_here, page_bytes
from windlass.planner.constraints import PlanConstraints
from windlass.planner.device_budget import host_bytes_here
from windlass.schedule.batch import CHUNK_TOKENS
from windlass.units import format_bytes


def validate_plan(
    plan: Plan, spec: ModelSpec, sizes: Sizes, wanted: PlanConstraints, budget: int
) -> None:
    """Raises UsageError where the plan is not one of this checkpoint, contradicts itself or what
    the user fixed, BudgetError where it needs more than `budget` bytes, or than its own."""
    _check_checkpoint(plan, sizes)
    _check_ranges(plan, spec, sizes)
    _check_wanted(plan, wanted, sizes)
    needed = bytes_here(plan, spec, sizes)
    if plan.above is not None and sizes.device is not None:
        needed = host_bytes_here(plan, spec, sizes)
        _check_device(plan.above, sizes.device)
    room = min(budget, plan.host.budget_bytes)
    if needed > room + NOISE_BYTES:  # the process itself is never twice the same
        raise BudgetError(
            f"plan: needs {format_bytes(needed)} here, of which the process itself takes"
            f" {format_bytes(sizes.process_bytes)}; got {format_bytes(room)}"
        )


def _check_device(above: TierPlan, device: DeviceSizes) -> None:
    room = min(device.budget_bytes, above.budget_bytes)
    needed = above.total_bytes - above.process_bytes + device.process_bytes
    if needed > room + NOISE_BYTES:
        raise BudgetError(
            f"plan: needs {format_bytes(needed)} of the device, of which its context takes"
            f" {format_bytes(device.process_bytes)}; got {format_bytes(room)}"
        )


def _check_checkpoint(plan: Plan, sizes: Sizes) -> None:
    host = plan.host
    values = [
        ("kv_cache_dtype", plan.kv_cache_dtype, sizes.kv_cache_dtype),
        ("page_tokens", plan.page_tokens, PAGE_TOKENS),
        ("kv_page_bytes", host.kv_page_bytes, page_bytes(sizes)),
        *(("kinds of parts", sorted(one.slots), sorted(sizes.num_parts)) for one in plan.tiers),
    ]
    for own in host.parts:
        slot_bytes, num_parts = sizes.slot_bytes.get(own.part), sizes.num_parts.get(own.part)
        values += [
            (f"{own.part} {name}", found, here)
            for name, found, here in (
                ("num_parts", own.num_parts, num_parts), ("slot_bytes", own.slot_bytes, slot_bytes)
            )
            if found is not None
        ]  # fmt: skip
    for name, found, here in values:
        if found != here:
            raise UsageError(
                f"plan: {name}: got {found}, allowed {here}: it was made for another checkpoint or"
                " other options"
            )


def _check_ranges(plan: Plan, spec: ModelSpec, sizes: Sizes) -> None:
    seqs, parts = plan.max_num_seqs, sizes.num_parts
    states = seqs if sizes.state_bytes else 0
    pages = min(plan.pages.values())
    longest = min(spec.max_positions, pages * plan.page_tokens)
    ranges: list[tuple[str, float, int, float | None]] = [
        *(
            (f"{part} slots", slots, min(_least_slots(part, is_top), parts[part]), parts[part])
            for tier in plan.tiers
            for is_top in (tier is plan.top,)
            for part, slots in tier.slots.items()
        ),
        ("read_threads", plan.read_threads, 1, None),
        ("max_num_seqs", seqs, 1, None),
        ("max_num_batched_tokens", plan.max_num_batched_tokens, seqs + CHUNK_TOKENS, None),
        ("micro_batch_tokens", plan.micro_batch_tokens, CHUNK_TOKENS, None),
        ("groups", plan.groups, 1, None),
        ("burst_max_seqs", plan.burst_max_seqs, 0, seqs if plan.burst_tokens else 0),
        ("host_attention", plan.host_attention, 0, 0 if plan.above is None else 1),
        ("kv_offloading_share", plan.kv_offloading_share, 0, _most_streamed(plan)),
        ("host_experts", plan.host_experts, 0, 0 if plan.above is None else 1),
        ("state_slots", plan.top.state_slots, states, states),
        ("kept_states", plan.kept_states, 0, None if states and plan.above is None else 0),
        ("max_model_len", plan.max_model_len, 2, longest),
    ]
    if plan.generated_experts == "rows" and (plan.above is None or plan.host_experts):
        raise UsageError(
            "plan: generated_experts: got 'rows', allowed with a device that computes all experts"
        )
    for name, value, least, most in ranges:
        if value < least or (most is not None and value > most):
            upper = "or more" if most is None else f"to {most}"
            raise UsageError(f"plan: {name}: got {value}, allowed {least} {upper}")


def _most_streamed(plan: Plan) -> float:
    return 0 if plan.above is None else max(0.0, 1 - plan.host_attention)


def _least_slots(part: Part, is_top: bool) -> int:
    """As few as a user may ask for. Of a tier below another, whose parts pass through: one."""
    return min(1, MIN_SLOTS[part]) if part is Part.EXPERT or not is_top else MIN_SLOTS[part]


def _check_wanted(plan: Plan, wanted: PlanConstraints, sizes: Sizes) -> None:
    """A flag beside a plan may only say the same."""
    replayed = PlanConstraints.of(plan)
    for field in fields(PlanConstraints):
        asked, planned = getattr(wanted, field.name), getattr(replayed, field.name)
        if field.name == "expert_slots" and asked is not None:
            asked = min(asked, sizes.num_parts.get(Part.EXPERT, 0))
        if asked not in (field.default, planned):
            raise UsageError(
                f"{field.name}: got {asked}, but the plan that is replayed says {planned}: leave"
                " one of the two away"
            )
