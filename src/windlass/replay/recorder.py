"""Writes what routers decide into a routing trace. Changes nothing that it is told of."""

import logging
from typing import Any

import numpy as np

from windlass.models.spec import ModelSpec, Moe
from windlass.replay.trace_file import (
    Floats,
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
    """Implements `RoutingObserver`. A pass is written when it has ended; one that fails is not.
    Where the disk refuses a pass, recording ends with a line of the log (level WARNING): the
    answers are worth more than their trace."""

    wants_scores = True

    def __init__(self, writer: TraceWriter, header: TraceHeader) -> None:
        self._writer: TraceWriter | None = writer
        self._header = header
        self._passes = 0
        self._batch: Batch | None = None
        self._embedded_TD: Floats | None = None
        self._layers: list[TracedRouting] = []

    def begin(self, batch: Batch, embedded_TD: Any) -> None:
        """A pass begins."""
        self._batch = batch
        self._layers = []
        self._embedded_TD = self._copy(embedded_TD)

    def observe(self, tokens: RoutedTokens) -> None:
        """One layer has routed."""
        assert tokens.layer == self._header.layers[len(self._layers)].layer, "layers in order"
        ids_TA = np.asarray(tokens.ids_TA).astype(np.uint16)
        scores_TE = np.array(tokens.scores_TE, np.float32)
        self._layers.append(TracedRouting(ids_TA, scores_TE, self._copy(tokens.residual_TD)))

    def end(self, final_TD: Any) -> None:
        """The pass has gone through all layers."""
        batch, number = self._batch, self._passes
        assert batch is not None, "the end of a pass that has begun"
        self._passes += 1
        if self._writer is None:
            return
        try:
            self._writer.append(
                TracedPass(
                    number=number,
                    sequences_T=np.array(batch.sequences),
                    positions_T=np.array(batch.positions),
                    is_prompt_T=np.repeat(
                        [segment.is_prompt for segment in batch.segments],
                        [segment.num_tokens for segment in batch.segments],
                    ),
                    layers=tuple(self._layers),
                    embedded_TD=self._embedded_TD,
                    final_TD=self._copy(final_TD),
                )
            )
        except OSError as error:
            _logger.warning(
                "routing-trace: %s: %s; it ends before pass %d, the rest is not recorded",
                self._writer.path, error.strerror, number,
            )  # fmt: skip
            self._writer.close()
            self._writer = None

    def _copy(self, rows_TD: Any) -> Floats | None:
        """Rows outlive the layer only as a copy; none are kept without inputs."""
        return np.array(rows_TD, np.float32) if self._header.inputs else None
