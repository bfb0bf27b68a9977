"""Tells the forecast and observers what the routers of a pass decide, and what rows they decide
over."""

from collections.abc import Sequence
from typing import Any

from windlass.forecast.interface import ExpertForecast
from windlass.runtime.layer_ops import RoutedRows
from windlass.runtime.routed_groups import RoutedGroups
from windlass.schedule.batch import Batch
from windlass.schedule.observer import RoutedTokens, RoutingObserver


class RoutingReport:
    """Of one pass at a time, and of nothing outside: a layer that drafts runs between two. The
    forecast is told nothing of captured layers: their experts are all in memory, so that it is of
    no use."""

    def __init__(self, forecast: ExpertForecast, observers: Sequence[RoutingObserver] = ()) -> None:
        self.wants_scores = forecast.wants_scores or any(one.wants_scores for one in observers)
        self.wants_states = any(one.wants_states for one in observers)  # of captured layers too
        self._forecast = forecast
        self._observers = tuple(observers)
        self._groups = RoutedGroups(forecast.outlook)
        self._batch: Batch | None = None

    def begin(self, batch: Batch, embedded_TD: Any) -> None:
        """A pass begins."""
        self._batch = batch
        self._groups.begin(batch)
        for one in (self._forecast, *self._observers):
            one.begin(batch, embedded_TD)

    def enter(self, layer: int) -> None:
        """The last group of the pass comes to `layer`, or to the head."""
        self._groups.enter(layer)

    def captured(self, layer: int, routed: RoutedRows) -> None:
        """A captured layer was computed; its residual stream has gone on since."""
        if self._observers and self._batch is not None:
            tokens = self._tokens(self._batch, layer, routed, None)
            for observer in self._observers:
                observer.observe(tokens)

    def tell(self, layer: int, routed: RoutedRows, residual_TD: Any) -> None:
        """`layer` has routed `residual_TD`, the rows of the next group of the pass."""
        if self._batch is None:
            return
        tokens = self._groups.add(self._tokens(self._batch, layer, routed, residual_TD))
        if tokens is None:
            return
        for one in (self._forecast, *self._observers):
            one.observe(tokens)

    def end(self, final_TD: Any) -> None:
        """The last layer is done."""
        for one in (self._forecast, *self._observers):
            one.end(final_TD)
        self._batch = None

    def _tokens(
        self, batch: Batch, layer: int, routed: RoutedRows, residual_TD: Any
    ) -> RoutedTokens:
        routes = routed.routes
        return RoutedTokens(
            layer, batch, routed.groups.counts_E, routes.ids_TA, routes.scores_TE,
            routed.router_TD, residual_TD,
        )  # fmt: skip
