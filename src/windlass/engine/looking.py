"""A look at a running engine. May be taken on any thread while a pass runs; its numbers are of one
moment each, not all of the same."""

from collections import Counter
from collections.abc import Iterable, Mapping

from windlass.engine.live_view import LiveView, RowNow, TierNow
from windlass.engine.sequence import Sequence
from windlass.ids import Home, Part
from windlass.plan import Plan, TierPlan
from windlass.weights.store import WeightStore


def look(
    running: Iterable[Sequence], num_pages: Mapping[Home, int], plan: Plan, weights: WeightStore
) -> LiveView:
    """`running`: a copy of the list that changes; `num_pages`: of keys and values, in use."""
    pages = Counter[str]()
    for home, tier in plan.homes.items():
        pages[tier.name] += num_pages[home]
    looks = weights.look(Part.EXPERT)
    keys = weights.supply.layout.keys(Part.EXPERT)
    return LiveView(
        rows=tuple(
            RowNow(
                one.request.request_id, one.num_prompt, min(one.num_computed, one.num_prompt),
                len(one.output_ids), one.is_batch,
            )
            for one in running
        ),
        tiers=tuple(
            _tier(tier, looks[tier.name][0], pages[tier.name])
            for tier in plan.tiers
            if tier.name in looks
        ),
        layers=tuple(sorted({key.layer for key in keys})),
        num_experts=1 + max((key.index for key in keys), default=-1),
        experts={name: places for name, (_, places) in looks.items()},
    )  # fmt: skip


def _tier(tier: TierPlan, held: Mapping[Part, int], num_pages: int) -> TierNow:
    sizes = {own.part: own.slot_bytes or 0 for own in tier.parts}
    used = {part: sizes.get(part, 0) * count for part, count in held.items()}
    experts = used.pop(Part.EXPERT, 0)
    return TierNow(
        name=tier.name,
        budget_bytes=tier.budget_bytes,
        expert_bytes=experts,
        dense_bytes=sum(used.values()),
        kv_bytes=num_pages * tier.kv_page_bytes,
        kv_total_bytes=tier.kv_pages * tier.kv_page_bytes,
        other_bytes=tier.process_bytes + tier.activation_bytes + tier.forecast_bytes,
    )
