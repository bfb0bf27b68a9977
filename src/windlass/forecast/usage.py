"""How likely each expert is to be used, from how often all text used it: the same for every
sequence. The simplest forecast, and the one that needs nothing but counts."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from windlass.forecast.interface import CERTAIN, Candidates, ExpertTable, Floats, Outlook, likely
from windlass.ids import Part, WeightKey
from windlass.schedule.batch import Batch
from windlass.schedule.observer import RoutedTokens

# Weight of the uniform prior, in tokens: after as many observed tokens, both count the same.
_PRIOR_TOKENS = 64.0
# Tokens after which an observation counts half: usage drifts with the topic of the text.
_HALF_LIFE_TOKENS = 4096.0
_MOST_SEEDED = 1024.0  # tokens of earlier runs: other text, perhaps of another topic
_RESCALE_AT = 1e12
_LIKELY = 0.5  # a read for an expert less likely than this would more often be wasted than used


class SharedUsage:
    """Share of all tokens that each expert of each layer gets, recent tokens counting more."""

    def __init__(self, table: ExpertTable) -> None:
        self._table = table
        self.shares: Floats = table.uniform.copy()
        self._counts = np.zeros(len(table))
        self._first = np.array([table.first[layer] for layer in table.layers])
        self._spread = np.array([table.num_experts[layer] for layer in table.layers])
        self._index = {layer: i for i, layer in enumerate(table.layers)}
        self._tokens = np.zeros(len(table.layers))
        # Instead of shrinking all old counts, new ones weigh more and more.
        self._weight = np.ones(len(table.layers))

    def seed(self, counts: Floats, num_tokens: float) -> None:
        """What earlier runs saw: tokens by expert, and how many there were. They count for less
        than as many new ones would."""
        layers = slice(0, len(self._first))
        scale = min(1.0, _MOST_SEEDED / max(1.0, num_tokens))
        self.add_range(layers, slice(0, len(self._table)), counts * scale)

    def add(self, layer: int, counts_E: NDArray[np.int64]) -> None:
        """Tokens that `layer` has routed, by expert."""
        index = self._index[layer]
        self.add_range(slice(index, index + 1), self._table.slice(layer), counts_E)

    def add_range(self, layers: slice, part: slice, counts: NDArray[Any]) -> None:
        """The same of some of the layers with experts, whose experts have the places `part`."""
        first, spread = self._first[layers], self._spread[layers]
        added = np.add.reduceat(counts, first - first[0]) / self._table.top_k
        self._weight[layers] *= 2.0 ** (added / _HALF_LIFE_TOKENS)
        weight = self._weight[layers]
        self._counts[part] += counts * weight.repeat(spread)
        self._tokens[layers] += added * weight
        if weight.max() > _RESCALE_AT:
            self._counts[part] /= weight.repeat(spread)
            self._tokens[layers] /= weight
            self._weight[layers] = weight = np.ones(len(weight))
        prior = _PRIOR_TOKENS * weight
        shares = self._counts[part] + prior.repeat(spread) * self._table.uniform[part]
        shares /= (self._tokens[layers] + prior).repeat(spread)
        np.minimum(shares, 1.0, out=self.shares[part])


def of_tokens(chances: Floats, num_tokens: int) -> Floats:
    """That any of so many tokens, taken as independent, uses an expert that each uses with these
    probabilities."""
    merged = chances.copy() if num_tokens == 1 else 1.0 - (1.0 - chances) ** num_tokens
    merged[merged > CERTAIN] = 1.0
    return merged


class UsageForecast:
    """The probability that a pass of as many tokens as the current one uses an expert, by its share
    of all tokens. Implements `ExpertForecast`."""

    wants_scores = False
    wants_states = False
    threshold: float | None = None
    speculates: bool = True

    def __init__(self, table: ExpertTable) -> None:
        self._table = table
        self.outlook = Outlook(table)
        self._shared = SharedUsage(table)
        self._num_tokens = 1
        self.outlook.next = self.outlook.usage = self.outlook.now  # one for all passes

    def probability(self, key: WeightKey) -> float:
        """That such a pass uses `key`: for an expert one of the outlook's, else 1."""
        if key.part is not Part.EXPERT:
            return 1.0
        return self.outlook.now.item(self._table.place(key))

    def begin(self, batch: Batch, embedded_TD: Any = None) -> None:
        """A pass starts; its tokens are taken as independent."""
        if batch.num_tokens != self._num_tokens:
            self._num_tokens = batch.num_tokens
            self._refresh(slice(None))

    def observe(self, tokens: RoutedTokens) -> None:
        self._shared.add(tokens.layer, np.asarray(tokens.counts_E))
        self._refresh(self._table.slice(tokens.layer))

    def end(self, final_TD: Any = None) -> None:
        pass

    def work(self) -> bool:
        return False

    def candidates(self, layer: int) -> Candidates:
        return likely(self.outlook, layer, at_least=_LIKELY)

    def _refresh(self, part: slice) -> None:
        self.outlook.now[part] = of_tokens(self._shared.shares[part], self._num_tokens)
        self.outlook.version += 1
