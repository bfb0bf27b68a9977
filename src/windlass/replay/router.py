"""What the clock's runtime is told of routing: what a trace says."""

from typing import Any

import numpy as np

from windlass.replay.routing_trace import RoutingTrace, Rows
from windlass.schedule.batch import Batch, RowGroup, Segment, make_batch
from windlass.schedule.observer import RoutedTokens

_MICRO_BATCH = 1 << 20  # rows that attention takes at once: all


class TraceRouter:
    """Implements the clock's `Router`: routes the rows that `enter` was given."""

    def __init__(self, trace: RoutingTrace) -> None:
        self._trace = trace
        self._rows: Any = slice(0, 0)  # of the pass under way

    def enter(self, rows: Rows) -> Batch:
        """The batch of a pass over these rows of the trace."""
        # a slice is read without a copy
        self._rows = slice(rows[0], rows[0] + 1) if len(rows) == 1 else rows
        trace = self._trace
        sequences, positions = trace.sequences_R[rows], trace.positions_R[rows]
        is_prompt = trace.is_prompt_R[rows]
        goes_on = (np.diff(sequences) == 0) & (np.diff(positions) == 1)
        goes_on &= is_prompt[1:] == is_prompt[:-1]
        begins = [0, *(np.flatnonzero(~goes_on) + 1).tolist(), len(rows)]
        segments = [
            Segment(
                sequence=int(sequences[first]), token_ids=(0,) * (end - first),
                first_position=int(positions[first]), pages=(), state_slot=-1,
                is_prompt=bool(is_prompt[first]), long_rope=False, wants_logits=True,
            )
            for first, end in zip(begins, begins[1:], strict=False)
        ]  # fmt: skip
        return make_batch(segments, micro_batch_tokens=_MICRO_BATCH)

    def begin(self, batch: Batch) -> Any:
        embedded_RD = self._trace.embedded_RD
        return None if embedded_RD is None else embedded_RD[self._rows]

    def route(self, layer: int, batch: Batch, group: RowGroup) -> RoutedTokens:
        own, rows = self._trace.layers[layer], self._rows
        assert own is not None, f"layer {layer} has no experts"
        ids_TA = own.ids_RA[rows]
        counts_E = np.bincount(ids_TA.ravel(), minlength=self._trace.num_experts[layer])
        return RoutedTokens(
            layer, batch, counts_E, ids_TA,
            None if own.scores_RE is None else own.scores_RE[rows],
            residual_TD=None if own.residual_RD is None else own.residual_RD[rows],
        )  # fmt: skip

    def end(self) -> Any:
        final_RD = self._trace.final_RD
        return None if final_RD is None else final_RD[self._rows]
