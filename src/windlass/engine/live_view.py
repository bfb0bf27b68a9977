"""A look at a running engine: who is under way, and where weights are. May be taken on any thread
while a pass runs; its numbers are of one moment each, not all of the same."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from windlass.engine.sequence import Sequence
from windlass.ids import Home, Part
from windlass.plan import Plan, TierPlan
from windlass.weights.stats import PartPlaces
from windlass.weights.store import WeightStore


class RowNow(NamedTuple):
    """A sequence that runs. `computed`: tokens of its prompt that were, those found included."""

    request_id: str
    prompt_tokens: int
    computed: int
    generated: int


@dataclass(frozen=True, slots=True, kw_only=True)
class TierNow:
    """What a memory holds, in bytes. `other_bytes`: the process, what passes allocate at most and
    what forecasts keep, as planned."""

    name: str
    budget_bytes: int
    expert_bytes: int
    dense_bytes: int  # other weights
    kv_bytes: int  # pages in use
    kv_total_bytes: int
    other_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class LiveView:
    """`layers`: those with experts, each with `num_experts` of them. `experts`: by tier, that
    which passes take them from first."""

    rows: tuple[RowNow, ...]
    tiers: tuple[TierNow, ...]
    layers: tuple[int, ...]
    num_experts: int
    experts: Mapping[str, PartPlaces]


def look(
    running: Iterable[Sequence], num_pages: Mapping[Home, int], plan: Plan, weights: WeightStore
) -> LiveView:
    """`running`: a copy of the list that changes; `num_pages`: of keys and values, in use."""
    pages = {tier.name: num_pages[home] for home, tier in plan.homes.items()}
    looks = weights.look(Part.EXPERT)
    keys = weights.supply.layout.keys(Part.EXPERT)
    return LiveView(
        rows=tuple(
            RowNow(
                one.request.request_id, one.num_prompt, min(one.num_computed, one.num_prompt),
                len(one.output_ids),
            )
            for one in running
        ),
        tiers=tuple(
            _tier(tier, looks[tier.name][0], pages.get(tier.name, 0))
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
