"""A routing trace in memory, for tests of what observers are told."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple
from unittest import mock

import torch

from windlass.runtime import host
from windlass.runtime.routing_report import RoutingReport
from windlass.schedule.batch import Batch
from windlass.schedule.observer import RoutedTokens


class Token(NamedTuple):
    """One token at one router."""

    layer: int
    sequence: int
    position: int


class Seen(NamedTuple):
    h_D: torch.Tensor
    ids_A: torch.Tensor
    scores_E: torch.Tensor | None


@dataclass
class RoutingRecorder:
    """Implements `RoutingObserver`: copies of all arrays, by token."""

    wants_scores: bool = True
    wants_states: bool = False
    seen: dict[Token, Seen] = field(default_factory=dict)
    layers: list[int] = field(default_factory=list)  # one for each call
    passes: int = 0

    def begin(self, batch: Batch, embedded_TD: torch.Tensor) -> None:
        assert len(embedded_TD) == batch.num_tokens

    def end(self, final_TD: torch.Tensor) -> None:
        self.passes += 1

    def observe(self, tokens: RoutedTokens) -> None:
        self.layers.append(tokens.layer)
        h_TD, ids_TA = _copy(tokens.h_TD), _copy(tokens.ids_TA)
        scores_TE = None if tokens.scores_TE is None else _copy(tokens.scores_TE)
        places = zip(tokens.batch.sequences, tokens.batch.positions, strict=True)
        for row, (sequence, position) in enumerate(places):
            scores_E = None if scores_TE is None else scores_TE[row]
            token = Token(tokens.layer, sequence, position)
            assert token not in self.seen, f"{token}: routed twice"
            self.seen[token] = Seen(h_TD[row], ids_TA[row], scores_E)
        assert len(h_TD) == len(ids_TA) == tokens.batch.num_tokens


def _copy(rows: Any) -> torch.Tensor:
    return torch.as_tensor(rows).clone()


@contextmanager
def observed_by(*observers: RoutingRecorder) -> Iterator[None]:
    """Engines that are opened meanwhile tell `observers` of their routing."""
    with mock.patch.object(
        host, "RoutingReport", lambda forecast, _=(): RoutingReport(forecast, observers)
    ):
        yield
