"""Where weights are: in the host's memory, and in that of a device above it, if a plan has one."""

from collections.abc import Callable
from typing import NamedTuple

from windlass.build.foresight import Outfit
from windlass.checkpoint.folder import CheckpointFolder
from windlass.device.base import Device
from windlass.errors import UsageError
from windlass.forecast.interface import ExpertTable
from windlass.hardware.profile import LinkRates
from windlass.ids import Part
from windlass.kernels.interface import Kernels
from windlass.models.spec import ModelSpec, Moe
from windlass.plan import HOST, Plan, TierPlan
from windlass.prefetch.draft_experts import DraftExperts
from windlass.prefetch.tiers import LowerPolicy, UpperPolicy, takers
from windlass.trace import Tracer
from windlass.weights.eviction import EvictionPolicy
from windlass.weights.io_queue import BLOCK_BYTES
from windlass.weights.store import WeightStore
from windlass.weights.supply import FileSupply
from windlass.weights.tier_supply import TierSupply
from windlass.weights.transfer import Carrier, block_bytes_of


class Tiers(NamedTuple):
    """Devices whose memory holds weights, and the link from the one to the other, if it was
    measured; kernels of the host, where it has a part of attention beside a device above."""

    host: Device
    above: Device | None
    down: LinkRates | None
    host_kernels: Kernels | None = None
    peak: Callable[[], int] = int  # what was taken at once of the memory above


def check_tiers(plan: Plan, above: Device | None) -> None:
    """UsageError where the plan has other memories than there are."""
    planned = ", ".join(tier.name for tier in plan.tiers if tier.name != HOST)
    found = "" if above is None else above.name
    if planned != found:
        raise UsageError(
            f"plan: tiers above the host: got {planned or 'none'}, allowed {found or 'none'}"
        )


def _with_drafts(policy: EvictionPolicy, spec: ModelSpec, slots: int) -> EvictionPolicy:
    """`policy`, which knows the layers of a pass, where there is one more."""
    if not spec.drafts:
        return policy
    share = max(1, slots // sum(isinstance(block.ffn, Moe) for block in spec.blocks))
    return DraftExperts(policy, len(spec.blocks) - 1, slots=slots, share=share)


def open_weights(
    model: CheckpointFolder, plan: Plan, tiers: Tiers, outfit: Outfit, tracer: Tracer
) -> WeightStore:
    """The store that passes take weights from. Closing it closes one below, too."""
    files = FileSupply(model.layout, model.source, Carrier(tiers.host), tracer=tracer)
    if tiers.above is None or plan.above is None or outfit.below is None:
        policy = _with_drafts(outfit.chosen.policy, model.spec, plan.host.of(Part.EXPERT).slots)
        return WeightStore(files, plan.host.slots, policy=policy)
    keys = [key.part for key in model.layout.parts]
    kept = {part for part, slots in plan.above.slots.items() if slots >= keys.count(part)}
    lower_own = _with_drafts(outfit.below.policy, model.spec, plan.host.of(Part.EXPERT).slots)
    num_experts = ExpertTable.of(model.spec).num_experts
    lower = LowerPolicy(lower_own, takers(kept, num_experts, plan.host_experts))
    below = WeightStore(files, plan.host.slots, policy=lower)
    block_bytes = BLOCK_BYTES
    if tiers.down is not None:
        _, bytes_per_s = tiers.down.rate.points[-1]
        block_bytes = block_bytes_of(bytes_per_s)
    supply = TierSupply(below, Carrier(tiers.above, block_bytes))
    _check_slots(plan.above, supply)
    own = _with_drafts(outfit.chosen.policy, model.spec, plan.above.of(Part.EXPERT).slots)
    above = WeightStore(supply, plan.above.slots, policy=UpperPolicy(own, lower))
    above.cache.feed.tell(lower.came_above)
    return above


def _check_slots(tier: TierPlan, supply: TierSupply) -> None:
    for own in tier.parts:
        here = supply.slot_bytes[own.part]
        if own.slot_bytes not in (None, here):
            raise UsageError(
                f"plan: tiers.{tier.name}: {own.part} slot_bytes: got {own.slot_bytes}, allowed"
                f" {here}: it was made for another checkpoint or other options"
            )
