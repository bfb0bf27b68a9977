"""Puts together what the groups of a pass route. Whoever learns from routing is told of a layer
once, of all rows in the order of the batch, however many groups there were."""

import numpy as np
from numpy.typing import NDArray

from windlass.forecast.interface import Outlook
from windlass.schedule.batch import Batch
from windlass.schedule.observer import RoutedTokens

_BY_ROW = ("ids_TA", "scores_TE", "h_TD", "residual_TD")


class RoutedGroups:
    """Of one pass at a time, whose groups come in order, layer by layer."""

    def __init__(self, outlook: Outlook) -> None:
        """`outlook` knows which layer other groups are still to route."""
        self._outlook = outlook
        self._num_routed = 0  # groups
        self._rows: dict[str, NDArray[np.generic]] = {}  # of the pass so far, kept for all layers
        self._counts_E = np.zeros(0, np.int64)

    @property
    def are_complete(self) -> bool:
        """Whether no layer is between two groups."""
        return not self._num_routed

    def begin(self) -> None:
        """A pass begins."""
        self._num_routed = 0
        self._rows = {}
        self._open(None)

    def add(self, batch: Batch, tokens: RoutedTokens) -> RoutedTokens | None:
        """The next group of `batch` has routed `tokens`: those of all groups, after the last one.
        Arrays of one group alone are handed on as they are."""
        if len(batch.groups) == 1:
            return tokens
        group = batch.groups[self._num_routed]
        counts_E = np.asarray(tokens.counts_E)
        self._counts_E = self._counts_E + counts_E if self._num_routed else counts_E.copy()
        for name in _BY_ROW:
            if getattr(tokens, name) is not None:
                rows = np.asarray(getattr(tokens, name))
                whole = self._whole(name, (batch.num_tokens, *rows.shape[1:]), rows.dtype)
                whole[group.first_token : group.first_token + group.num_tokens] = rows
        self._num_routed = (self._num_routed + 1) % len(batch.groups)
        self._open(None if self.are_complete else tokens.layer)
        if not self.are_complete:
            return None
        given = {name: self._rows[name] for name in _BY_ROW if getattr(tokens, name) is not None}
        return tokens._replace(batch=batch, counts_E=self._counts_E, **given)

    def _open(self, layer: int | None) -> None:
        if self._outlook.open_layer != layer:
            self._outlook.open_layer = layer
            self._outlook.version += 1

    def _whole(
        self, name: str, shape: tuple[int, ...], dtype: np.dtype[np.generic]
    ) -> NDArray[np.generic]:
        found = self._rows.get(name)
        if found is None or found.shape != shape:
            found = self._rows[name] = np.empty(shape, dtype)
        return found
