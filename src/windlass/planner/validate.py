"""Whether a plan that was made elsewhere can run here. Pure arithmetic over sizes."""

from dataclasses import fields

from windlass.errors import BudgetError, UsageError
from windlass.ids import Part
from windlass.models.spec import ModelSpec
from windlass.perf.sizes import Sizes
from windlass.plan import Plan
from windlass.planner.budget import MIN_SLOTS, NOISE_BYTES, PAGE_TOKENS, PlanConstraints, bytes_here
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
    room = min(budget, plan.host_memory)
    if needed > room + NOISE_BYTES:  # the process itself is never twice the same
        raise BudgetError(
            f"plan: needs {format_bytes(needed)} here, of which the process itself takes"
            f" {format_bytes(sizes.process_bytes)}; got {format_bytes(room)}"
        )


def _check_checkpoint(plan: Plan, sizes: Sizes) -> None:
    parts, slots = sizes.num_parts, sizes.slot_bytes
    for name, here in (
        ("num_experts", parts.get(Part.EXPERT, 0)),
        ("num_blocks", parts.get(Part.BLOCK, 0)),
        ("num_head_chunks", parts.get(Part.HEAD, 0)),
        ("expert_slot_bytes", slots.get(Part.EXPERT, 0)),
        ("block_slot_bytes", slots.get(Part.BLOCK, 0)),
        ("ffn_slot_bytes", slots.get(Part.FFN, 0)),
        ("head_slot_bytes", slots.get(Part.HEAD, 0)),
        ("kv_cache_dtype", sizes.kv_cache_dtype),
        ("page_tokens", PAGE_TOKENS),
        ("kv_page_bytes", max(1, PAGE_TOKENS * sizes.bytes_per_token)),
    ):
        found = getattr(plan, name)
        if found != here:
            raise UsageError(
                f"plan: {name}: got {found}, allowed {here}: it was made for another checkpoint or"
                " other options"
            )


def _check_ranges(plan: Plan, spec: ModelSpec, sizes: Sizes) -> None:
    seqs, parts = plan.max_num_seqs, sizes.num_parts
    for name, least, most in (
        ("expert_slots", min(1, parts.get(Part.EXPERT, 0)), parts.get(Part.EXPERT, 0)),
        *(
            (f"{part.value}_slots", min(MIN_SLOTS[part], parts.get(part, 0)), parts.get(part, 0))
            for part in (Part.BLOCK, Part.FFN, Part.HEAD)
        ),
        ("read_threads", 1, None),
        ("max_num_seqs", 1, None),
        ("max_num_batched_tokens", seqs + CHUNK_TOKENS, None),
        ("micro_batch_tokens", CHUNK_TOKENS, None),
        ("state_slots", seqs if sizes.state_bytes else 0, seqs if sizes.state_bytes else 0),
        ("max_model_len", 2, min(spec.max_positions, plan.kv_pages * plan.page_tokens)),
    ):
        value = getattr(plan, name)
        if value < least or (most is not None and value > most):
            upper = "or more" if most is None else f"to {most}"
            raise UsageError(f"plan: {name}: got {value}, allowed {least} {upper}")


def _check_wanted(plan: Plan, wanted: PlanConstraints, sizes: Sizes) -> None:
    """A flag beside a plan may only say the same."""
    for field in fields(PlanConstraints):
        asked, planned = getattr(wanted, field.name), getattr(plan, field.name)
        if field.name == "expert_slots" and asked is not None:
            asked = min(asked, sizes.num_parts.get(Part.EXPERT, 0))
        if asked not in (field.default, planned):
            raise UsageError(
                f"{field.name}: got {asked}, but the plan that is replayed says {planned}: leave"
                " one of the two away"
            )
