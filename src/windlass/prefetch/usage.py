"""How likely each expert is to be used, from how often it was. Numbers alone, by numpy: a forecast
of a layer is one vector, whatever the number of experts."""

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from windlass.ids import Part, WeightKey

# Weight of the uniform prior, in tokens: after as many observed tokens, both count the same.
_PRIOR_TOKENS = 64.0
# Tokens after which an observation counts half: usage drifts with the topic of the text.
_HALF_LIFE_TOKENS = 4096.0
_RESCALE_AT = 1e12
_CERTAIN = 0.999  # beyond, a use is taken as certain


class UsageForecast:
    """Share of tokens that each expert of each layer gets, recent tokens counting more, and from it
    the probability that a pass uses the expert.

    `num_experts`: one number per layer, 0 where a layer has none. `top_k`: experts per token.
    """

    def __init__(self, num_experts: Sequence[int], top_k: int) -> None:
        assert top_k >= 1, f"top_k: got {top_k}, allowed at least 1"
        self._top_k = top_k
        self._counts = [np.zeros(num) for num in num_experts]
        self._tokens = [0.0] * len(num_experts)
        # Instead of shrinking all old counts, new ones weigh more and more.
        self._weight = [1.0] * len(num_experts)
        self._num_tokens = 1
        self._probabilities = np.zeros(sum(num_experts))
        ends = np.cumsum(num_experts).tolist()
        self._of_layer = [
            self._probabilities[end - num : end] for end, num in zip(ends, num_experts, strict=True)
        ]
        self._refresh(range(len(num_experts)))

    @property
    def probabilities(self) -> NDArray[np.float64]:
        """That a pass like the current one uses each expert, layer by layer: (sum of `num_experts`)
        numbers from 0 to 1, in memory that changes with what is observed."""
        return self._probabilities

    def probability(self, key: WeightKey) -> float:
        """That such a pass uses `key`: for an expert one of `probabilities`, else 1."""
        return self._of_layer[key.layer].item(key.index) if key.part is Part.EXPERT else 1.0

    def begin(self, num_tokens: int) -> None:
        """A pass over `num_tokens` tokens starts; they are taken as independent."""
        if num_tokens != self._num_tokens:
            self._num_tokens = num_tokens
            self._refresh(range(len(self._counts)))

    def observe(self, layer: int, counts: Mapping[int, int]) -> None:
        """Takes in one pass over `layer`: tokens per expert; experts without any may be absent."""
        tokens = sum(counts.values()) / self._top_k
        self._weight[layer] *= 2.0 ** (tokens / _HALF_LIFE_TOKENS)
        weight, own = self._weight[layer], self._counts[layer]
        for expert, count in counts.items():
            own[expert] += count * weight
        self._tokens[layer] += tokens * weight
        if weight > _RESCALE_AT:
            own /= weight
            self._tokens[layer] /= weight
            self._weight[layer] = 1.0
        self._refresh((layer,))

    def _refresh(self, layers: Sequence[int]) -> None:
        for layer in layers:
            counts, into = self._counts[layer], self._of_layer[layer]
            if not counts.size:
                continue
            prior = _PRIOR_TOKENS * self._weight[layer]
            uniform = min(1.0, self._top_k / counts.size)
            np.add(counts, prior * uniform, out=into)
            into /= self._tokens[layer] + prior
            np.minimum(into, 1.0, out=into)
            if self._num_tokens != 1:
                into[:] = 1.0 - (1.0 - into) ** self._num_tokens
            into[into > _CERTAIN] = 1.0
