"""Tells the weight store what a pass will want next (DESIGN: demand forecast). Knows ids only.

With many rows every expert is certain and the hints are simply the layers in order; with few rows
they are the experts that usage makes likely. Nothing switches mode.
"""

from collections.abc import Iterator, Mapping

from windlass.ids import Part, WeightKey
from windlass.models.spec import ModelSpec, Moe
from windlass.prefetch.usage import UsageForecast
from windlass.schedule.passes import PassShape
from windlass.weights.cache import WeightCache
from windlass.weights.hints import Hint

# Hints kept ahead of the pass: more than the link can read during one layer.
_HORIZON = 64
# Parts looked at and probabilities computed for one list: with these it costs about a millisecond,
# also where most parts are held or unlikely.
_MAX_LOOKED_AT = 4096
_MAX_WEIGHED = 512
_LIKELY = 0.5  # a read for an expert less likely than this would more often be wasted than used
_CERTAIN = 0.999


class ExpertForecast:
    """Probability that the current pass (or the next like it) uses a part."""

    def __init__(self, usage: UsageForecast) -> None:
        self._usage = usage
        self._rows = 1

    def begin(self, num_rows: int) -> None:
        """A pass over `num_rows` rows starts."""
        self._rows = num_rows

    def observe(self, layer: int, counts: Mapping[int, int]) -> None:
        """Rows per expert, as routed."""
        self._usage.observe(layer, counts)

    def probability(self, key: WeightKey) -> float:
        if key.part is not Part.EXPERT:
            return 1.0
        chance = self._usage.probability(key.layer, key.index, self._rows)
        return 1.0 if chance > _CERTAIN else chance


def pass_forecast(spec: ModelSpec) -> ExpertForecast:
    """The forecast of a model that nothing is known of yet."""
    networks = [block.ffn for block in spec.blocks]
    top_k = max(ffn.top_k for ffn in networks if isinstance(ffn, Moe))
    num_experts = [ffn.num_experts if isinstance(ffn, Moe) else 0 for ffn in networks]
    return ExpertForecast(UsageForecast(num_experts, top_k))


def num_experts(spec: ModelSpec) -> dict[int, int]:
    """By layer, of layers that have any."""
    networks = enumerate(block.ffn for block in spec.blocks)
    return {layer: ffn.num_experts for layer, ffn in networks if isinstance(ffn, Moe)}


class Prefetcher:
    """Walks the parts in the order of use, from the current layer around the pass."""

    def __init__(
        self,
        shape: PassShape,
        num_experts: Mapping[int, int],
        weights: WeightCache,
        forecast: ExpertForecast,
    ) -> None:
        """`num_experts`: by layer, of layers that have any."""
        self._weights = weights
        self._forecast = forecast
        self._stops = [list(_parts(shape, num_experts, i)) for i in range(len(shape.is_moe) + 1)]
        self._is_complete = False  # everything has a slot for good and is there

    def enter(self, layer: int) -> None:
        """The pass enters `layer`; the head counts as one more layer."""
        if self._is_complete:
            return
        hints: list[Hint] = []
        weighed = looked_at = 0
        for distance in range(len(self._stops)):
            stop = self._stops[(layer + distance) % len(self._stops)]
            missing = [key for key in stop if not self._weights.holds(key)]
            for key in missing:
                probability = self._forecast.probability(key)
                if probability >= _LIKELY:
                    hints.append(Hint(key, distance, probability))
            weighed += len(missing)
            looked_at += len(stop)
            if len(hints) >= _HORIZON or weighed >= _MAX_WEIGHED or looked_at >= _MAX_LOOKED_AT:
                break
        else:
            self._is_complete = not weighed and self._weights.keeps_all
        self._weights.prefetch(hints)


def _parts(shape: PassShape, num_experts: Mapping[int, int], layer: int) -> Iterator[WeightKey]:
    if layer == len(shape.is_moe):
        for chunk in range(shape.num_head_chunks):
            yield WeightKey(Part.HEAD, -1, chunk)
        return
    yield WeightKey(Part.BLOCK, layer)
    if not shape.is_moe[layer]:
        yield WeightKey(Part.FFN, layer)
        return
    for expert in range(num_experts[layer]):
        yield WeightKey(Part.EXPERT, layer, expert)
