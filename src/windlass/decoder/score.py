"""The likeliest tokens, and log-probabilities of given ones, from logits that come in ranges of the
vocabulary. Knows no weights; keeps a few numbers per row, so that many rows can be scored at once.

R rows.
"""

import torch

from windlass.device.base import Allocator
from windlass.kernels.interface import LogitScan


def begin_scan(memory: Allocator, rows: int, targets_R: torch.Tensor | None = None) -> LogitScan:
    """Of `rows` rows, nothing of whose logits is known yet. `targets_R`: a token of each whose
    log-probability is wanted, int64, in `memory`."""
    return LogitScan(
        memory.empty(rows).fill_(-torch.inf),
        memory.zeros(rows, dtype=torch.int64),
        memory.zeros(rows, dtype=torch.float64),
        memory.empty(rows).fill_(-torch.inf),
        targets_R,
    )


def logprobs(scan: LogitScan) -> torch.Tensor:
    """Of the targets (R,) fp32, once all ranges are in."""
    if not len(scan.own_R):  # of most passes
        return scan.own_R
    return (scan.own_R.double() - scan.tops_R - scan.totals_R.log()).float()


def best_logprobs(scan: LogitScan) -> torch.Tensor:
    """Of the likeliest token of each row (R,) fp32, once all ranges are in."""
    if not len(scan.own_R):
        return scan.own_R
    return (-scan.totals_R.log()).float()
