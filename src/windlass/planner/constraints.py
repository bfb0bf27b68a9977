"""What the user fixed of a plan."""

from dataclasses import dataclass, fields

from windlass.errors import UsageError
from windlass.ids import Part
from windlass.models.spec import ModelSpec
from windlass.plan import Plan, Schedule
from windlass.schedule.batch import CHUNK_TOKENS


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanConstraints:
    """What the user fixed; None where the planner chooses. Experts in slots. `serves`: clients come
    and go, each waits for its answer."""

    expert_slots: int | None = None
    max_num_seqs: int | None = None
    max_num_batched_tokens: int | None = None
    micro_batch_tokens: int | None = None
    groups: int | None = None
    max_model_len: int | None = None
    kv_pages: int | None = None
    schedule: Schedule | None = None
    mixed_prefill_tokens: int | None = None
    burst_tokens: int | None = None  # 0: lockstep
    prefix_caching: bool = True
    kept_states: int | None = None
    host_attention: float | None = None  # of machines with a device
    kv_offloading_share: float | None = None
    host_experts: float | None = None
    serves: bool = False

    @classmethod
    def of(cls, plan: Plan) -> "PlanConstraints":
        """What fixes every choice of `plan` that can be fixed. Experts: where passes take them
        from; pages: of all memories."""
        return cls(
            expert_slots=plan.top.of(Part.EXPERT).slots,
            kv_pages=plan.kv_pages,
            **{
                one.name: getattr(plan, one.name)
                for one in fields(cls)
                if one.name not in ("expert_slots", "kv_pages", "serves")
            },
        )


def check_constraints(wanted: PlanConstraints, spec: ModelSpec) -> None:
    """UsageError for what no machine could run."""
    if wanted.max_model_len is not None and wanted.max_model_len > spec.max_positions:
        raise UsageError(
            f"max_model_len: got {wanted.max_model_len}, allowed at most {spec.max_positions}, "
            + (spec.limited_by or "the model's own limit")
        )
    for name, least in (
        ("expert_slots", 1), ("max_num_seqs", 1), ("max_num_batched_tokens", CHUNK_TOKENS + 1),
        ("micro_batch_tokens", CHUNK_TOKENS), ("groups", 1), ("max_model_len", 2),
        ("kv_pages", 1),
    ):  # fmt: skip
        value = getattr(wanted, name)
        if value is not None and value < least:
            raise UsageError(f"{name}: got {value}, allowed {least} or more")
    shares = wanted.host_attention or 0.0, wanted.kv_offloading_share or 0.0
    if min(shares) < 0 or sum(shares) > 1:
        raise UsageError(
            f"kv_offloading_share: got {shares[1]}, allowed 0 to {1 - shares[0]}, with"
            f" host_attention {shares[0]}"
        )
    mixed = wanted.mixed_prefill_tokens
    if mixed is not None and mixed < CHUNK_TOKENS and mixed != 0:
        raise UsageError(f"mixed_prefill_tokens: got {mixed}, allowed 0, or {CHUNK_TOKENS} or more")
    seqs, rows = wanted.max_num_seqs, wanted.max_num_batched_tokens
    if seqs is not None and rows is not None and rows < seqs + CHUNK_TOKENS:
        raise UsageError(
            f"max_num_batched_tokens: got {rows}, allowed at least max_num_seqs + {CHUNK_TOKENS}"
            f" = {seqs + CHUNK_TOKENS}"
        )
