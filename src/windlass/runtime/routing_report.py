"""Tells the forecast and observers what the routers of a pass decide, and what rows they decide
over."""

from collections.abc import Sequence
from typing import Any

import torch

from windlass.device.streams import Streams
from windlass.forecast.interface import ExpertForecast
from windlass.runtime.layer_ops import RoutedRows
from windlass.schedule.batch import Batch
from windlass.schedule.observer import RoutedTokens, RoutingObserver


class RoutingReport:
    """Of one pass at a time. The forecast is told nothing of captured layers: their experts are all
    in memory, so that it is of no use. What is told lies on the host: of states, what the
    forecast wants, and all where there are observers."""

    def __init__(
        self,
        forecast: ExpertForecast,
        observers: Sequence[RoutingObserver],
        streams: Streams,
    ) -> None:
        """`streams`: of the device that routes."""
        self._streams = streams
        self.wants_scores = forecast.wants_scores or any(one.wants_scores for one in observers)
        self.wants_states = any(one.wants_states for one in observers)  # of captured layers too
        self._tells_states = bool(observers) or forecast.wants_states
        self._forecast = forecast
        self._observers = tuple(observers)
        self._batch: Batch | None = None

    def begin(self, batch: Batch, embedded_TD: torch.Tensor) -> None:
        """A pass begins."""
        self._batch = batch
        states = self._states(embedded_TD)
        for one in (self._forecast, *self._observers):
            one.begin(batch, states)

    def captured(self, layer: int, routed: RoutedRows) -> None:
        """A captured layer was computed; its residual stream has gone on since."""
        if self._observers:
            tokens = self._tokens(layer, routed, None)
            for observer in self._observers:
                observer.observe(tokens)

    def tell(self, layer: int, routed: RoutedRows, residual_TD: torch.Tensor) -> dict[int, int]:
        """`layer` has routed `residual_TD`: rows of each expert that has any, ascending."""
        tokens = self._tokens(layer, routed, residual_TD)
        for one in (self._forecast, *self._observers):
            one.observe(tokens)
        return {expert: n for expert, n in enumerate(tokens.counts_E.tolist()) if n}

    def end(self, final_TD: torch.Tensor) -> None:
        """The last layer is done."""
        states = self._states(final_TD)
        for one in (self._forecast, *self._observers):
            one.end(states)

    def _states(self, x_TD: torch.Tensor) -> Any:
        return self._streams.on_host(x_TD)[0] if self._tells_states else None

    def _tokens(
        self, layer: int, routed: RoutedRows, residual_TD: torch.Tensor | None
    ) -> RoutedTokens:
        assert self._batch is not None, "routing outside a pass"
        routes = routed.routes
        tensors = {"counts_E": routed.groups.counts_E, "ids_TA": routes.ids_TA}
        if routes.scores_TE is not None:
            tensors["scores_TE"] = routes.scores_TE
        if self._tells_states:
            tensors["h_TD"] = routed.router_TD
            if residual_TD is not None:
                tensors["residual_TD"] = residual_TD
        told = self._streams.on_host(*tensors.values())
        return RoutedTokens(layer, self._batch, **dict(zip(tensors, told, strict=True)))
