"""How likely each expert is to be used, from how often it was. Pure Python over numbers."""

from collections.abc import Mapping, Sequence

# Weight of the uniform prior, in rows: after as many observed rows, both count the same.
_PRIOR_ROWS = 64.0
# Rows after which an observation counts half: usage drifts with the topic of the text.
_HALF_LIFE_ROWS = 4096.0
_RESCALE_AT = 1e12


class UsageForecast:
    """Share of rows that each expert of each layer gets, recent rows counting more.

    `num_experts`: one number per layer, 0 where a layer has none. `top_k`: experts per row.
    """

    def __init__(self, num_experts: Sequence[int], top_k: int) -> None:
        assert top_k >= 1, f"top_k: got {top_k}, allowed at least 1"
        self._top_k = top_k
        self._counts = [[0.0] * num for num in num_experts]
        self._rows = [0.0] * len(num_experts)
        # Instead of shrinking all old counts, new ones weigh more and more.
        self._weight = [1.0] * len(num_experts)

    def observe(self, layer: int, counts: Mapping[int, int]) -> None:
        """Takes in one pass over `layer`: rows per expert; experts without rows may be absent."""
        rows = sum(counts.values()) / self._top_k
        self._weight[layer] *= 2.0 ** (rows / _HALF_LIFE_ROWS)
        weight = self._weight[layer]
        for expert, count in counts.items():
            self._counts[layer][expert] += count * weight
        self._rows[layer] += rows * weight
        if weight > _RESCALE_AT:
            self._counts[layer] = [count / weight for count in self._counts[layer]]
            self._rows[layer] /= weight
            self._weight[layer] = 1.0

    def probability(self, layer: int, expert: int, rows: int) -> float:
        """That at least one of `rows` rows uses the expert, rows taken as independent."""
        prior = _PRIOR_ROWS * self._weight[layer]
        uniform = min(1.0, self._top_k / len(self._counts[layer]))
        used = self._counts[layer][expert] + prior * uniform
        share = min(1.0, used / (self._rows[layer] + prior))
        return float(1.0 - (1.0 - share) ** rows)
