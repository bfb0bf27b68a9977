"""Eviction as in FineMoE (arXiv 2502.05370, section 4.5) and MoE-Infinity (2401.14361, Algorithm
1): one pool over all layers. What a hint brings always takes a place, as in both."""

import numpy as np

from windlass.forecast.interface import Floats, Outlook
from windlass.prefetch.expert_pool import ExpertPool

_LEAST = 1e-6  # MoE-Infinity's epsilon


class _SharesPool(ExpertPool):
    """Ranks by `Outlook`: of layers ahead in the pass by `now`, of the others by `next`."""

    def __init__(self, outlook: Outlook, *, floor: int = 0) -> None:
        super().__init__(outlook.table, floor=floor, groups=outlook)
        self._outlook = outlook
        self._num_uses = 0
        self._known: tuple[int, int, int] | None = None

    def used(self, place: int) -> None:
        self._num_uses += 1

    def changed(self) -> bool:
        before, self._known = self._known, (self.now, self._outlook.version, self._num_uses)
        return self._known != before

    def _shares(self) -> Floats:
        is_ahead = self._table.layer_of > self.now % self._num_layers
        return np.where(is_ahead, self._outlook.now, self._outlook.next)


class FineMoePool(_SharesPool):
    """Gives up the largest `1 / (p * freq)`, freq being the passes that used the expert since the
    start, resident or not. Where `p * freq` is 0, for what was read ahead and never used, or never
    likely, the smaller p goes, then the smaller freq. An expert that no map speaks of has the p of
    the outlook, the same as all of its layer."""

    def __init__(self, outlook: Outlook, *, floor: int = 0) -> None:
        super().__init__(outlook, floor=floor)
        self._freq = np.zeros(len(outlook.table))

    def used(self, place: int) -> None:
        super().used(place)
        self._freq[place] += 1.0

    def losses(self) -> Floats:
        shares = self._shares()
        # order alone matters; the small terms decide where the product is 0
        return -(shares * self._freq + 1e-100 * shares + 1e-200 * self._freq)


class MoeInfinityPool(_SharesPool):
    """Gives up the smallest `keep(i, j) = (p(i, j) + eps) / sum over j of p(i, j) * (1 - i / L)`,
    i counted from 0 among layers with experts, so that the last one has a rank too."""

    def __init__(self, outlook: Outlook, *, floor: int = 0) -> None:
        super().__init__(outlook, floor=floor)
        layers = np.array(self._table.layers)
        self._first = np.array([self._table.first[layer] for layer in layers])
        self._sizes = [self._table.num_experts[layer] for layer in layers]
        self._factor = np.repeat(1.0 - np.arange(len(layers)) / len(layers), self._sizes)

    def losses(self) -> Floats:
        shares = self._shares()
        sums = np.maximum(np.add.reduceat(shares, self._first), _LEAST)
        keep: Floats = (shares + _LEAST) / np.repeat(sums, self._sizes) * self._factor
        return -keep
