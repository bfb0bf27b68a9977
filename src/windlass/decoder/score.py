"""The likeliest tokens, and log-probabilities and ranks of given ones, from logits that come in
ranges of the vocabulary. Knows no weights; keeps a few numbers per row, so that many rows can be
scored at once.

R rows, C columns of a range, K likeliest tokens.
"""

from typing import NamedTuple

import torch

from windlass.device.base import Allocator
from windlass.kernels.interface import LogitScan
from windlass.kernels.logit_scan import NONE, read_numbers


class Scores(NamedTuple):
    """Of targets: their log-probabilities (R,) fp32, and the likeliest tokens (R, K) int64, best
    first, of equal ones the lowest, with theirs (R, K) fp32."""

    logprobs_R: torch.Tensor
    best_RK: torch.Tensor
    best_logprobs_RK: torch.Tensor


def begin_scan(
    memory: Allocator, rows: int, targets_R: torch.Tensor | None = None, *, top: int = 1
) -> LogitScan:
    """Of `rows` rows, nothing of whose logits is known yet. `targets_R`: a token of each whose
    log-probability is wanted, int64, in `memory`, and `top` of the likeliest tokens beside it."""
    best = None if top == 1 else memory.empty(rows, top, dtype=torch.int64).fill_(NONE)
    return LogitScan(
        memory.empty(rows).fill_(-torch.inf),
        memory.zeros(rows, dtype=torch.int64),
        memory.zeros(rows, dtype=torch.float64),
        memory.empty(rows).fill_(-torch.inf),
        targets_R,
        best,
    )


def scores(scan: LogitScan) -> Scores:
    """Of the targets, once all ranges are in."""
    best_RK, logits_RK = scan.ids_R[:, None], scan.tops_R[:, None]
    if scan.best_RK is not None:
        best_RK, logits_RK = read_numbers(scan.best_RK)
    if not len(scan.own_R):  # of most passes
        return Scores(scan.own_R, best_RK, logits_RK)
    tops_R, logs_R = scan.tops_R.double(), scan.totals_R.log()
    own_R = (scan.own_R.double() - tops_R - logs_R).float()
    best_logprobs_RK = (logits_RK.double() - tops_R[:, None] - logs_R[:, None]).float()
    return Scores(own_R, best_RK, best_logprobs_RK)


def count_before(
    scan: LogitScan, ranks_R: torch.Tensor, logits_RC: torch.Tensor, first: int
) -> None:
    """Adds to `ranks_R` the tokens from `first` on that are likelier than the target, or as likely
    and lower. All of `scan` is known."""
    assert scan.targets_R is not None, "ranks are those of targets"
    own_R, place_R = scan.own_R[:, None], scan.targets_R[:, None] - first
    number_C = scan.targets_R.new_ones(logits_RC.shape[1]).cumsum(0)  # from 1
    is_lower_RC = number_C <= place_R
    ranks_R += ((logits_RC > own_R) | (is_lower_RC & (logits_RC == own_R))).sum(1)
