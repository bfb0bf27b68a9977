"""A forecast, with others who are told of the same passes."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from windlass.forecast.interface import Candidates, ExpertForecast, Outlook
from windlass.schedule.batch import Batch
from windlass.schedule.observer import RoutedTokens, RoutingObserver


class ToldForecast:
    """Implements `ExpertForecast` by another."""

    def __init__(
        self,
        forecast: ExpertForecast,
        observers: Sequence[RoutingObserver] = (),
        *,
        proposes: bool = True,
    ) -> None:
        """`observers` are told of routing, too. Unless it `proposes`, nothing is read ahead for it
        but what is certain."""
        self._forecast = forecast
        self._all = (forecast, *observers)
        self._proposes = proposes
        self.threshold: float | None = None
        self.speculates = proposes
        self.wants_scores = any(one.wants_scores for one in self._all)
        self.wants_states = forecast.wants_states

    @property
    def outlook(self) -> Outlook:
        return self._forecast.outlook

    def begin(self, batch: Batch, embedded_TD: Any) -> None:
        for one in self._all:
            one.begin(batch, embedded_TD)

    def observe(self, tokens: RoutedTokens) -> None:
        for one in self._all:
            one.observe(tokens)

    def end(self, final_TD: Any) -> None:
        for one in self._all:
            one.end(final_TD)

    def work(self) -> bool:
        return self._forecast.work()

    def candidates(self, layer: int) -> Candidates:
        if self._proposes:
            return self._forecast.candidates(layer)
        return Candidates(np.zeros(0, np.int64), np.zeros(0))
