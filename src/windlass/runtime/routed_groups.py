"""Puts together what the groups of a pass route. Whoever learns from routing is told of a layer
once, of all rows in the order of the batch, however many groups there were."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from windlass.forecast.interface import ExpertTable, Outlook
from windlass.schedule.batch import Batch
from windlass.schedule.observer import RoutedTokens

MANY_ROWS = 3  # of an expert, on average: of 20 experts that are used evenly, 19 have some

_BY_ROW = ("ids_TA", "scores_TE", "h_TD", "residual_TD")


def layers_of_many_rows(table: ExpertTable, batch: Batch) -> frozenset[int]:
    """Those of which each group of `batch` is to have all experts, unseen, where looking means
    waiting for the device that routes."""
    choices = table.top_k * min(group.num_tokens for group in batch.groups)
    return frozenset(
        layer for layer in table.layers if choices >= MANY_ROWS * table.num_experts[layer]
    )


class RoutedGroups:
    """Of one pass at a time, whose groups come in order, layer by layer. What they have routed may
    be added later than they have, in the same order."""

    def __init__(self, outlook: Outlook) -> None:
        """`outlook` is told where the groups of a pass are."""
        self._outlook = outlook
        self._batch: Batch | None = None  # of the pass under way, if that has several
        self._num_routed = 0  # groups, of the layer that is open
        self._num_added = 0  # the same of what has been added
        self._rows: dict[str, NDArray[np.generic]] = {}  # of all groups, kept for all layers
        self._counts_E = np.zeros(0, np.int64)

    def begin(self, batch: Batch) -> None:
        """A pass begins."""
        self._batch = batch if len(batch.groups) > 1 else None
        self._num_routed = self._num_added = 0
        self._rows = {}
        self._outlook.layer, self._outlook.is_open = None, False

    def enter(self, layer: int) -> None:
        """The last group comes to `layer`; the head counts as one more."""
        if self._batch is not None:
            self._outlook.layer = layer if layer < len(self._outlook.table.num_experts) else None
            self._outlook.version += 1

    def route(self) -> None:
        """The next group has routed."""
        if self._batch is not None:
            self._num_routed = (self._num_routed + 1) % len(self._batch.groups)
            self._outlook.is_open = self._num_routed > 0
            self._outlook.version += 1

    def add(self, tokens: RoutedTokens) -> RoutedTokens | None:
        """The next group has routed `tokens`: those of all groups, after the last one. Arrays of
        one group alone are handed on as they are."""
        batch = self._batch
        if batch is None:
            return tokens
        group = batch.groups[self._num_added]
        counts_E = np.asarray(tokens.counts_E)
        self._counts_E = self._counts_E + counts_E if self._num_added else counts_E.copy()
        given: dict[str, Any] = {}
        for name in _BY_ROW:
            if getattr(tokens, name) is None:
                continue
            rows = np.asarray(getattr(tokens, name))
            given[name] = whole = self._whole(name, (batch.num_tokens, *rows.shape[1:]), rows.dtype)
            whole[group.first_token : group.first_token + group.num_tokens] = rows
        self._num_added = (self._num_added + 1) % len(batch.groups)
        if self._num_added:
            return None
        return tokens._replace(counts_E=self._counts_E, **given)

    def _whole(
        self, name: str, shape: tuple[int, ...], dtype: np.dtype[np.generic]
    ) -> NDArray[np.generic]:
        found = self._rows.get(name)
        if found is None or found.shape != shape:
            found = self._rows[name] = np.empty(shape, dtype)
        return found
