"""Experts of generated rows on the host, on the clock: runtime/host_experts.py without tensors."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from windlass.ids import Part, WeightKey
from windlass.runtime.clock import Lanes, LaneWork
from windlass.runtime.simulated import SimulatedWeights
from windlass.schedule.batch import RowGroup
from windlass.schedule.expert_homes import host_experts
from windlass.weights.demand import Demand
from windlass.weights.residency import Entry


@dataclass(frozen=True, slots=True)
class SimulatedHostExperts:
    """Implements `HostPart`. `below`: slots of the host; `num_experts`: of each layer; `share`: of
    them, the host's; `costs`: what some of a layer ask of the lanes, with so many rows each. Of a
    group that has prompts too, each expert has as large a share of generated rows as the group."""

    lanes: Lanes
    below: SimulatedWeights
    num_experts: Sequence[int]
    share: float
    costs: Callable[[int, Sequence[int]], LaneWork]

    def begin(
        self, layer: int, group: RowGroup, counts: Mapping[int, int]
    ) -> tuple[Mapping[int, int], Callable[[], None]] | None:
        segments = [one for micro in group.micro_batches for one in micro.segments]
        generated = sum(one.num_tokens for one in segments if not one.is_prompt)
        is_host = host_experts(layer, self.num_experts[layer], self.share)
        found = {e: round(n * generated / group.num_tokens) for e, n in counts.items()}
        theirs = {e: n for e, n in found.items() if n and is_host[e]}
        if not theirs:
            return None
        left = {e: n - theirs.get(e, 0) for e, n in counts.items()}
        keys = [WeightKey(Part.EXPERT, layer, expert) for expert in theirs]
        cache = self.below.cache

        def compute(entries: Sequence[Entry]) -> Callable[[], None]:
            rows = [theirs[entry.key.index] for entry in entries]
            return self.lanes.start(self.costs(layer, rows), "host experts")

        early: Demand | None = None
        taken: list[Entry] = []
        if len(keys) <= cache.num_slots(Part.EXPERT) // 2:
            early = cache.begin(keys, settles=False)
            taken = cache.ready(early, len(keys))
        begun = compute(taken) if taken else None

        def end() -> None:
            demand = early or cache.begin(keys, settles=False)
            entries, wait = taken, begun
            while True:
                if wait is not None:
                    wait()
                cache.release(entries)
                entries = cache.group(demand, cache.group_size)
                if not entries:
                    break
                wait = compute(entries)

        return {expert: count for expert, count in left.items() if count}, end
