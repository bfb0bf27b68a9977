"""From the last hidden states of a pass to logits, scores and the likeliest tokens, by ranges of
the vocabulary. Knows no leases.

R rows, V tokens of the vocabulary, C of a range.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from windlass.decoder import block as math
from windlass.decoder.score import begin_scan, best_logprobs, logprobs
from windlass.device.base import Allocator
from windlass.kernels.interface import Kernels, LogitScan
from windlass.models.spec import ModelSpec
from windlass.runtime.attention_metadata import PassRows
from windlass.schedule.batch import CHUNK_TOKENS
from windlass.tensors import Weight
from windlass.trace import Tracer

_SCAN_BYTES = 8 << 20  # of logits that are not kept


@dataclass(slots=True)
class Final:
    """Rows on their way through the head."""

    h_RD: torch.Tensor
    logits_RV: torch.Tensor
    bias_V: torch.Tensor | None
    likeliest: tuple[torch.Tensor, LogitScan]  # rows whose likeliest token is wanted
    scored: tuple[torch.Tensor, LogitScan]  # rows whose targets are scored
    states_TD: torch.Tensor | None = None  # of all rows, where a layer drafts from them
    drafts: bool = False  # these are that layer's
    column: int = 0

    @property
    def results(self) -> tuple[torch.Tensor, ...]:
        """What an `Outcome` has of them, in its order."""
        (_, likeliest), (_, scan) = self.likeliest, self.scored
        scores = logprobs(scan), scan.ids_R, best_logprobs(scan)
        return self.logits_RV, *scores, likeliest.ids_R, likeliest.tops_R


class Head:
    """The output projection."""

    def __init__(
        self, spec: ModelSpec, kernels: Kernels, memory: Allocator, tracer: Tracer
    ) -> None:
        """`memory`: of the device whose kernels are given."""
        self._spec = spec
        self._kernels = kernels
        self._memory = memory
        self._tracer = tracer
        self._of_no_row: LogitScan | None = None

    def begin(
        self,
        rows: PassRows,
        normed: Callable[[torch.Tensor], torch.Tensor],
        bias_V: torch.Tensor | None = None,
    ) -> Final:
        """The rows that are wanted; `normed` gives some of the pass after its last norm (R, D)."""
        whole_RD, likeliest_RD, scored_RD = map(
            normed, (rows.whole_R, rows.likeliest_R, rows.scored_R)
        )
        return Final(
            whole_RD,
            whole_RD.new_empty(len(whole_RD), self._spec.vocab_size),
            bias_V,
            (likeliest_RD, self._scan(len(likeliest_RD))),
            (scored_RD, self._scan(len(scored_RD), rows.targets_R)),
        )

    def _scan(self, rows: int, targets_R: torch.Tensor | None = None) -> LogitScan:
        if rows:
            return begin_scan(self._memory, rows, targets_R)
        if self._of_no_row is None:
            self._of_no_row = begin_scan(self._memory, 0)
        return self._of_no_row

    def add(self, chunk: int, w_CD: Weight, final: Final) -> None:
        """The next range of the vocabulary."""
        columns = w_CD.shape[0]
        part = slice(final.column, final.column + columns)
        bias = None if final.bias_V is None else final.bias_V[part]
        with self._tracer.span("head", rows=final.h_RD.shape[0], chunk=chunk):
            if final.h_RD.shape[0]:
                out_RC = final.logits_RV[:, part]
                math.logits(self._kernels, self._spec, w_CD, bias, final.h_RD, out_RC)
            # a few rows at a time: logits of all of them would be larger than the pass itself
            step = max(CHUNK_TOKENS, _SCAN_BYTES // (4 * columns))
            for h_RD, scan in (final.likeliest, final.scored):
                for first in range(0, h_RD.shape[0], step):
                    some = slice(first, first + step)
                    logits_RC = h_RD.new_empty(len(h_RD[some]), columns)
                    math.logits(self._kernels, self._spec, w_CD, bias, h_RD[some], logits_RC)
                    self._kernels.scan_logits(scan.rows(some), logits_RC, final.column)
        final.column = part.stop
