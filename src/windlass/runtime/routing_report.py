"""Tells the forecast and observers what the routers of a pass decide, and what rows they decide
over."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from windlass.device.streams import Streams, ToHost
from windlass.forecast.interface import ExpertForecast
from windlass.runtime.layer_ops import RoutedRows
from windlass.runtime.routed_groups import RoutedGroups, layers_of_many_rows
from windlass.schedule.batch import Batch
from windlass.schedule.observer import RoutedTokens, RoutingObserver


class _Late(NamedTuple):
    """What is to be told once it is on the host."""

    arriving: ToHost
    tell: Callable[[Sequence[torch.Tensor]], None]


class RoutingReport:
    """Of one pass at a time, and of nothing outside: a layer that drafts runs between two. The
    forecast is told nothing of captured layers: their experts are all in memory, so that it is of
    no use. What is told lies on the host: of states, what the forecast wants, and all where there
    are observers and it costs nothing.

    A device that runs ahead is waited for only where its routing decides which experts are leased:
    where rows are many all are, and what was routed is told in the end, in its order and without
    states, which nobody learns from then.
    """

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
        self._observers_want_scores = any(one.wants_scores for one in observers)
        self._tells_states = self.wants_states or forecast.wants_states
        if observers and not streams.runs_ahead:
            self._tells_states = True
        self._forecast = forecast
        self._observers = tuple(observers)
        self._groups = RoutedGroups(forecast.outlook)
        self._batch: Batch | None = None
        self._unread: frozenset[int] = frozenset()  # layers of the pass with many rows
        self._sees_states = False  # whether the pass has others
        self._late: list[_Late] = []

    def begin(self, batch: Batch, embedded_TD: torch.Tensor) -> None:
        """A pass begins."""
        self._batch = batch
        self._late = []  # of a pass that failed
        self._groups.begin(batch)
        outlook = self._forecast.outlook
        self._unread = self._layers_unread(batch)
        self._sees_states = self._tells_states and len(self._unread) < len(outlook.table.layers)
        states = self._streams.on_host(embedded_TD)[0] if self._sees_states else None
        for one in (self._forecast, *self._observers):
            one.begin(batch, states)
        for layer in self._unread:
            outlook.now[outlook.table.slice(layer)] = 1.0
        outlook.version += bool(self._unread)

    def enter(self, layer: int) -> None:
        """The last group of the pass comes to `layer`, or to the head."""
        self._groups.enter(layer)

    def captured(self, layer: int, routed: RoutedRows) -> None:
        """A captured layer was computed; its residual stream has gone on since."""
        if self._observers and self._batch is not None:
            self._observe(layer, routed, None, self._tell_observers)
            self._tell_late()

    def tell(
        self, layer: int, routed: RoutedRows, residual_TD: torch.Tensor
    ) -> dict[int, int] | None:
        """`layer` has routed `residual_TD`, the rows of the next group of the pass: rows of each
        expert that has any, ascending; None where rows are many and nobody looks."""
        if self._batch is None:
            return _used(*self._streams.on_host(routed.groups.counts_E))
        self._groups.route()
        counts_E = self._observe(layer, routed, residual_TD, self._tell_all)
        if layer in self._unread:
            return None
        self._tell_late()
        return _used(counts_E)

    def end(self, final_TD: torch.Tensor) -> None:
        """The last layer is done. Where the device runs ahead, `finish` tells it."""

        def tell(copies: Sequence[torch.Tensor]) -> None:
            for one in (self._forecast, *self._observers):
                one.end(copies[0] if copies else None)

        arriving = self._streams.to_host(*((final_TD,) if self._sees_states else ()))
        self._late.append(_Late(arriving, tell))
        self._batch = None
        if not self._streams.runs_ahead:
            self._tell_late()

    def finish(self) -> None:
        """The host has the results of the pass."""
        self._tell_late()

    def _layers_unread(self, batch: Batch) -> frozenset[int]:
        if not self._streams.runs_ahead or self.wants_states:
            return frozenset()
        return layers_of_many_rows(self._forecast.outlook.table, batch)

    def _observe(
        self,
        layer: int,
        routed: RoutedRows,
        residual_TD: torch.Tensor | None,
        tell: Callable[[RoutedTokens], None],
    ) -> torch.Tensor:
        """What is to be told of a layer is told, or where the device runs ahead on its way: counts
        of its experts, which are there when it has been told."""
        batch, routes = self._batch, routed.routes
        assert batch is not None, "a layer outside a pass"
        is_read = layer not in self._unread
        tensors = {"counts_E": routed.groups.counts_E, "ids_TA": routes.ids_TA}
        if routes.scores_TE is not None and (is_read or self._observers_want_scores):
            tensors["scores_TE"] = routes.scores_TE
        if self._tells_states and is_read:
            if self.wants_states or not self._streams.runs_ahead:
                tensors["h_TD"] = routed.router_TD
            if residual_TD is not None:
                tensors["residual_TD"] = residual_TD
        if not self._streams.runs_ahead:
            tell(RoutedTokens(layer, batch, **tensors))
            return tensors["counts_E"]
        arriving = self._streams.to_host(*tensors.values())

        def tell_copies(copies: Sequence[torch.Tensor]) -> None:
            tell(RoutedTokens(layer, batch, **dict(zip(tensors, copies, strict=True))))

        self._late.append(_Late(arriving, tell_copies))
        return arriving.copies[0]

    def _tell_all(self, tokens: RoutedTokens) -> None:
        if (of_all := self._groups.add(tokens)) is not None:
            self._forecast.observe(of_all)
            self._tell_observers(of_all)

    def _tell_observers(self, tokens: RoutedTokens) -> None:
        for one in self._observers:
            one.observe(tokens)

    def _tell_late(self) -> None:
        """All that is on its way, once the last of it is there."""
        late, self._late = self._late, []
        if late:
            late[-1].arriving.wait()  # and so are those before it
        for one in late:
            one.tell(one.arriving.copies)


def _used(counts_E: torch.Tensor) -> dict[int, int]:
    return {expert: n for expert, n in enumerate(counts_E.tolist()) if n}
