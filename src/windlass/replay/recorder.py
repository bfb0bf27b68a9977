"""Writes what routers decide into a routing trace. Changes nothing that it is told of."""

import logging
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from windlass.models.spec import ModelSpec, Moe
from windlass.replay.trace_file import (
    Floats,
    Router,
    TracedLayer,
    TracedPass,
    TracedRouting,
    TraceHeader,
    TraceWriter,
)
from windlass.schedule.batch import Batch
from windlass.schedule.observer import RoutedTokens

_logger = logging.getLogger(__name__)


def trace_header(spec: ModelSpec, *, model: str, stamp: str, inputs: bool) -> TraceHeader:
    """Of the traces of a model. `stamp`: of its checkpoint."""
    networks = ((layer, block.ffn) for layer, block in enumerate(spec.blocks))
    return TraceHeader(
        model=model,
        stamp=stamp,
        num_layers=len(spec.blocks),
        hidden_size=spec.hidden_size,
        layers=tuple(
            TracedLayer(layer, moe.num_experts, moe.top_k, type(moe.routing).__name__)
            for layer, moe in networks
            if isinstance(moe, Moe)
        ),
        inputs=inputs,
    )


class RoutingRecorder:
    """Implements `RoutingObserver`. Where the disk refuses a record, recording ends with a line of
    the log (level WARNING): the answers are worth more than their trace."""

    wants_scores = True

    def __init__(self, writer: TraceWriter) -> None:
        self._writer = writer
        self._inputs = writer.header.inputs
        self._is_over = False
        self._passes = 0

    @property
    def wants_states(self) -> bool:
        return self._inputs

    def add_routers(self, routers: Sequence[Router]) -> None:
        """What the routers are, in a trace with inputs."""
        self._write(lambda: self._writer.add_routers(routers))

    def begin(self, batch: Batch, embedded_TD: Any) -> None:
        """A pass begins."""
        counts = [segment.num_tokens for segment in batch.segments]
        rows = TracedPass(
            number=self._passes,
            sequences_T=np.array(batch.sequences),
            positions_T=np.array(batch.positions),
            is_prompt_T=np.repeat([segment.is_prompt for segment in batch.segments], counts),
            embedded_TD=self._states(embedded_TD),
        )
        self._passes += 1
        self._write(lambda: self._writer.begin(rows))

    def observe(self, tokens: RoutedTokens) -> None:
        """One layer has routed."""
        ids_TA, scores_TE = np.asarray(tokens.ids_TA), np.asarray(tokens.scores_TE)
        routing = TracedRouting(ids_TA, scores_TE, self._states(tokens.residual_TD))
        self._write(lambda: self._writer.add_layer(routing))

    def end(self, final_TD: Any) -> None:
        """The pass has gone through all layers."""
        self._write(lambda: self._writer.end(self._states(final_TD)))

    def _states(self, rows_TD: Any) -> Floats | None:
        return np.asarray(rows_TD) if self._inputs else None

    def _write(self, write: Callable[[], None]) -> None:
        if self._is_over:
            return
        try:
            write()
        except OSError as error:
            _logger.warning(
                "routing-trace: %s: %s: recording ends in pass %d",
                self._writer.path, error.strerror, self._passes - 1,
            )  # fmt: skip
            self._is_over = True
