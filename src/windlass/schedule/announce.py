"""Tells the weight store what a pass will want next (DESIGN: demand forecast). Knows ids only.

With many rows every expert is certain and the wishes are simply the layers in order; with few rows
they are the experts that usage makes likely. Nothing switches mode.
"""

from windlass.experts.forecast import UsageForecast
from windlass.ids import Part, WeightKey
from windlass.memory.eviction import Wish
from windlass.memory.weights import WeightStore
from windlass.schedule.passes import PassShape

# Wishes kept ahead of the pass. More than the store can have in flight during one layer, few
# enough that making the list costs well under a millisecond.
_HORIZON = 64
_LIKELY = 0.5  # a read for an expert less likely than this would more often be wasted than used


class Announcer:
    """Walks the parts in the order of use, from the current layer around the pass."""

    def __init__(
        self, shape: PassShape, num_experts: dict[int, int], weights: WeightStore,
        forecast: UsageForecast,
    ) -> None:  # fmt: skip
        self._shape = shape
        self._num_experts = num_experts  # by layer
        self._weights = weights
        self._forecast = forecast
        self._rows = 1

    def begin(self, num_rows: int) -> None:
        """A pass over `num_rows` rows starts."""
        self._rows = num_rows

    def observe(self, layer: int, counts: list[int]) -> None:
        """Rows per expert, as routed."""
        self._forecast.observe(layer, counts)

    def enter(self, layer: int) -> None:
        """The pass enters `layer`; the head counts as one more layer."""
        stops = len(self._shape.is_moe) + 1
        wishes: list[Wish] = []
        for distance in range(stops):
            for key, probability in self._parts((layer + distance) % stops):
                if probability >= _LIKELY and not self._weights.holds(key):
                    wishes.append(Wish(key, distance, probability))
            if len(wishes) >= _HORIZON:
                break
        self._weights.prefetch(wishes)

    def _parts(self, layer: int) -> list[tuple[WeightKey, float]]:
        if layer == len(self._shape.is_moe):
            chunks = range(self._shape.num_head_chunks)
            return [(WeightKey(Part.HEAD, -1, i), 1.0) for i in chunks]
        parts = [(WeightKey(Part.BLOCK, layer), 1.0)]
        if not self._shape.is_moe[layer]:
            return [*parts, (WeightKey(Part.FFN, layer), 1.0)]
        for expert in range(self._num_experts[layer]):
            probability = self._forecast.probability(layer, expert, self._rows)
            parts.append((WeightKey(Part.EXPERT, layer, expert), probability))
        return parts
