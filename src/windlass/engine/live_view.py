"""What a look at a running engine shows: who is under way, and where weights are. No torch."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from windlass.weights.stats import PartPlaces


class RowNow(NamedTuple):
    """A sequence that runs. `computed`: tokens of its prompt that were, those found included."""

    request_id: str
    prompt_tokens: int
    computed: int
    generated: int
    is_batch: bool = False


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
