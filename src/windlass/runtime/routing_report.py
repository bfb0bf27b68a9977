"""Tells the forecast and observers what the routers of a pass decide, and what rows they decide
over."""

from collections.abc import Sequence
from typing import Any

import torch

from windlass.device.streams import Streams
from windlass.forecast.interface import ExpertForecast
from windlass.runtime.layer_ops import RoutedRows
from windlass.runtime.routed_groups import RoutedGroups
from windlass.schedule.batch import Batch
from windlass.schedule.observer import RoutedTokens, RoutingObserver


class RoutingReport:
    """Of one pass at a time, and of nothing outside: a layer that drafts runs between two. The
    forecast is told nothing of captured layers: their experts are all in memory, so that it is of
    no use. What is told lies on the host: of states, what the forecast wants, and all where there
    are observers."""

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
        self._groups = RoutedGroups(forecast.outlook)
        self._batch: Batch | None = None

    def begin(self, batch: Batch, embedded_TD: torch.Tensor) -> None:
        """A pass begins."""
        self._batch = batch
        self._groups.begin(batch)
        states = self._states(embedded_TD)
        for one in (self._forecast, *self._observers):
            one.begin(batch, states)

    def enter(self, layer: int) -> None:
        """The last group of the pass comes to `layer`, or to the head."""
        self._groups.enter(layer)

    def captured(self, layer: int, routed: RoutedRows) -> None:
        """A captured layer was computed; its residual stream has gone on since."""
        if self._observers and self._batch is not None:
            tokens = self._tokens(self._batch, layer, routed, None)
            for observer in self._observers:
                observer.observe(tokens)

    def tell(self, layer: int, routed: RoutedRows, residual_TD: torch.Tensor) -> dict[int, int]:
        """`layer` has routed `residual_TD`, the rows of the next group of the pass: rows of each
        expert that has any, ascending."""
        if self._batch is None:
            (counts_E,) = self._streams.on_host(routed.groups.counts_E)
        else:
            own = self._tokens(self._batch, layer, routed, residual_TD)
            counts_E = own.counts_E
            if (tokens := self._groups.add(own)) is not None:
                for one in (self._forecast, *self._observers):
                    one.observe(tokens)
        return {expert: n for expert, n in enumerate(counts_E.tolist()) if n}

    def end(self, final_TD: torch.Tensor) -> None:
        """The last layer is done."""
        states = self._states(final_TD)
        for one in (self._forecast, *self._observers):
            one.end(states)
        self._batch = None

    def _states(self, x_TD: torch.Tensor) -> Any:
        return self._streams.on_host(x_TD)[0] if self._tells_states else None

    def _tokens(
        self, batch: Batch, layer: int, routed: RoutedRows, residual_TD: torch.Tensor | None
    ) -> RoutedTokens:
        routes = routed.routes
        tensors = {"counts_E": routed.groups.counts_E, "ids_TA": routes.ids_TA}
        if routes.scores_TE is not None:
            tensors["scores_TE"] = routes.scores_TE
        if self._tells_states:
            tensors["h_TD"] = routed.router_TD
            if residual_TD is not None:
                tensors["residual_TD"] = residual_TD
        told = self._streams.on_host(*tensors.values())
        return RoutedTokens(layer, batch, **dict(zip(tensors, told, strict=True)))
