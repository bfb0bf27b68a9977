"""Tells the weight cache what a pass will want next, as prefetch hints. Knows ids only.

With many tokens every expert is certain and the hints are simply the layers in order; with few they
are the experts that usage makes likely. Nothing switches mode.
"""

from collections.abc import Iterator, Mapping

import numpy as np

from windlass.ids import Part, WeightKey
from windlass.models.spec import ModelSpec, Moe
from windlass.prefetch.usage import UsageForecast
from windlass.schedule.passes import PassShape
from windlass.weights.cache import WeightCache
from windlass.weights.hints import Hint

# Hints kept ahead of the pass, and those of the layer that the last of them is in: more than the
# link can read during one layer.
_HORIZON = 64
_LIKELY = 0.5  # a read for an expert less likely than this would more often be wasted than used


def usage_forecast(spec: ModelSpec) -> UsageForecast:
    """The forecast of a model that nothing is known of yet."""
    networks = [block.ffn for block in spec.blocks]
    top_k = max(ffn.top_k for ffn in networks if isinstance(ffn, Moe))
    return UsageForecast(
        [ffn.num_experts if isinstance(ffn, Moe) else 0 for ffn in networks], top_k
    )


def num_experts(spec: ModelSpec) -> dict[int, int]:
    """By layer, of layers that have any."""
    networks = enumerate(block.ffn for block in spec.blocks)
    return {layer: ffn.num_experts for layer, ffn in networks if isinstance(ffn, Moe)}


class Prefetcher:
    """Walks the parts in the order of use, from the current layer around the pass.

    A layer costs a few vector operations over all parts of the model, and Python only for hints
    that are new or no longer hold: 10 to 50 us at 48 layers of 128 experts
    (`bench/prefetcher.py`). A part's rank is its place among all uses since the first pass began.
    """

    def __init__(
        self,
        shape: PassShape,
        num_experts: Mapping[int, int],
        weights: WeightCache,
        forecast: UsageForecast,
    ) -> None:
        """`num_experts`: by layer, of layers that have any."""
        self._weights = weights
        self._forecast = forecast
        self._num_stops = len(shape.layers) + 1  # the layers, and the head
        stops = [list(_parts(shape, num_experts, i)) for i in range(self._num_stops)]
        self._keys = [key for stop in stops for key in stop]
        self._stop_of = [i for i, stop in enumerate(stops) for _ in stop]
        self._first = np.cumsum([0, *map(len, stops)])  # place of the first part of each stop
        is_expert = np.array([key.part is Part.EXPERT for key in self._keys])
        self._experts, self._others = np.flatnonzero(is_expert), np.flatnonzero(~is_expert)
        self._held = weights.track([self._keys[i] for i in (*self._experts, *self._others)])
        self._missing = np.empty_like(self._held)
        self._hinted: set[int] = set()  # ranks
        self._pass = -1
        self._is_complete = False  # everything has a slot for good and is there

    def enter(self, layer: int) -> None:
        """The pass enters `layer`; the head counts as one more layer. Layers come in order."""
        if self._is_complete:
            return
        self._pass += layer == 0
        ranks = self._ranks(layer)
        wanted = set(ranks)
        added = [self._hint(rank) for rank in ranks if rank not in self._hinted]
        dropped = [self._keys[rank % len(self._keys)] for rank in self._hinted - wanted]
        self._hinted = wanted
        self._weights.hint(self._pass * self._num_stops + layer, added, dropped)
        self._is_complete = not ranks and self._weights.keeps_all and bool(self._held.all())

    def _ranks(self, layer: int) -> list[int]:
        """Of the parts that are missing and likely, in the order of their use, to the horizon."""
        many = self._experts.size
        missing, held = self._missing, self._held
        np.greater_equal(self._forecast.probabilities, _LIKELY, out=missing[:many])
        np.greater(missing[:many], held[:many], out=missing[:many])
        places = self._experts[missing[:many].nonzero()[0]]
        others = self._others[(~held[many:]).nonzero()[0]]
        if others.size:
            places = np.concatenate((places, others))
        if not places.size:
            return []
        length = len(self._keys)
        places[places < self._first[layer]] += length  # their turn comes in the next pass
        places.sort()
        if places.size > _HORIZON:
            last = int(places[_HORIZON - 1])
            end = self._first[self._stop_of[last % length] + 1] + last // length * length
            places = places[: places.searchsorted(end)]
        ranks: list[int] = (places + self._pass * length).tolist()
        return ranks

    def _hint(self, rank: int) -> Hint:
        which, place = divmod(rank, len(self._keys))
        key, stop = self._keys[place], self._stop_of[place]
        return Hint(rank, key, which * self._num_stops + stop, self._forecast.probability(key))


def _parts(shape: PassShape, num_experts: Mapping[int, int], layer: int) -> Iterator[WeightKey]:
    if layer == len(shape.layers):
        for chunk in range(shape.num_head_chunks):
            yield WeightKey(Part.HEAD, -1, chunk)
        return
    yield WeightKey(Part.BLOCK, layer)
    if shape.layers[layer].network == "dense":
        yield WeightKey(Part.FFN, layer)
    for expert in range(num_experts.get(layer, 0)):
        yield WeightKey(Part.EXPERT, layer, expert)
