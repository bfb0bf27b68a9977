"""From the last hidden states of a pass to logits, scores and the likeliest tokens, by ranges of
the vocabulary. Knows no leases.

R rows, V tokens of the vocabulary, C of a range.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from windlass.decoder import block as math
from windlass.decoder.score import begin_scan, count_before, scores
from windlass.device.base import Allocator
from windlass.kernels.interface import Kernels, LogitScan
from windlass.models.spec import ModelSpec
from windlass.runtime.attention_metadata import PassRows
from windlass.schedule.batch import CHUNK_TOKENS, Scoring
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
    ranks_R: torch.Tensor | None  # of these, tokens before the target so far; None: not wanted
    states_TD: torch.Tensor | None = None  # of all rows, where a layer drafts from them
    drafts: bool = False  # these are that layer's
    column: int = 0

    @property
    def results(self) -> tuple[torch.Tensor, ...]:
        """What an `Outcome` has of them, in its order; ranks last, where they are wanted."""
        likeliest = self.likeliest[1]
        ranks = () if self.ranks_R is None else (self.ranks_R + 1,)
        found = scores(self.scored[1])
        return self.logits_RV, *found, likeliest.ids_R, likeliest.tops_R, *ranks


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
        scoring: Scoring,
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
            (scored_RD, self._scan(len(scored_RD), rows.targets_R, scoring.top)),
            torch.zeros_like(rows.targets_R) if scoring.ranks else None,
        )

    def _scan(self, rows: int, targets_R: torch.Tensor | None = None, top: int = 1) -> LogitScan:
        if rows or top > 1:
            top = min(top, self._spec.vocab_size)
            return begin_scan(self._memory, rows, targets_R, top=top)
        if self._of_no_row is None:
            self._of_no_row = begin_scan(self._memory, 0)
        return self._of_no_row

    def add(self, chunk: int, w_CD: Weight, final: Final) -> None:
        """The next range of the vocabulary; behind the last the first again, for ranks."""
        columns = w_CD.shape[0]
        is_again = final.column >= self._spec.vocab_size
        first = final.column % self._spec.vocab_size
        part = slice(first, first + columns)
        bias = None if final.bias_V is None else final.bias_V[part]
        with self._tracer.span("head", rows=final.h_RD.shape[0], chunk=chunk):
            if final.h_RD.shape[0] and not is_again:
                out_RC = final.logits_RV[:, part]
                math.logits(self._kernels, self._spec, w_CD, bias, final.h_RD, out_RC)
            # a few rows at a time: logits of all of them would be larger than the pass itself
            step = max(CHUNK_TOKENS, _SCAN_BYTES // (4 * columns))
            for h_RD, scan in (final.scored,) if is_again else (final.likeliest, final.scored):
                for row in range(0, h_RD.shape[0], step):
                    some = slice(row, row + step)
                    logits_RC = h_RD.new_empty(len(h_RD[some]), columns)
                    math.logits(self._kernels, self._spec, w_CD, bias, h_RD[some], logits_RC)
                    if final.ranks_R is not None and is_again:
                        count_before(scan.rows(some), final.ranks_R[some], logits_RC, first)
                    else:
                        self._kernels.scan_logits(scan.rows(some), logits_RC, first)
        final.column += columns
