"""Tells the forecast and observers what the routers of a pass decide."""

from collections import Counter
from collections.abc import Mapping, Sequence

from windlass.prefetch.usage import UsageForecast
from windlass.runtime.layer_ops import RoutedRows
from windlass.schedule.batch import Batch
from windlass.schedule.observer import RoutedTokens, RoutingObserver


class RoutingReport:
    """Of one pass at a time. Without observers nothing is told of captured layers: their experts
    are all in memory, so that a forecast is of no use."""

    def __init__(self, forecast: UsageForecast, observers: Sequence[RoutingObserver] = ()) -> None:
        self.wants_scores = any(observer.wants_scores for observer in observers)
        self._forecast = forecast
        self._observers = tuple(observers)
        self._batch: Batch | None = None

    def begin(self, batch: Batch) -> None:
        """A pass begins."""
        self._batch = batch
        self._forecast.begin(batch.num_tokens)

    def captured(self, layer: int, routed: RoutedRows) -> None:
        """A captured layer was computed."""
        if self._observers:
            # of a few tokens sooner counted than read from the table of all experts
            self.tell(layer, routed, Counter(routed.routes.ids_TA.flatten().tolist()))

    def tell(self, layer: int, routed: RoutedRows, counts: Mapping[int, int]) -> None:
        """`layer` has routed; `counts` are those of `routed`."""
        self._forecast.observe(layer, counts)
        if not self._observers:
            return
        assert self._batch is not None, "routing outside a pass"
        routes = routed.routes
        tokens = RoutedTokens(layer, self._batch, routed.router_TD, routes.ids_TA, routes.scores_TE)
        for observer in self._observers:
            observer.observe(tokens)
