"""What is kept of logits that come in ranges of the vocabulary. R rows, C columns of a range."""

import torch

from windlass.kernels.interface import LogitScan


def scan_logits(scan: LogitScan, logits_RC: torch.Tensor, first: int) -> None:
    """See `Kernels.scan_logits`. Sums are fp64: their order, which depends on how many rows come at
    once, does not reach fp32 results but where rounding is on the edge."""
    tops_R, ids_R, totals_R, own_R, targets_R = scan
    before_R = tops_R.clone()
    here_R, best_R = logits_RC.max(1)
    ids_R.copy_(torch.where(here_R > before_R, best_R + first, ids_R))
    torch.maximum(before_R, here_R, out=tops_R)
    if targets_R is None:
        return
    place_R = targets_R - first
    inside_R = (place_R >= 0) & (place_R < logits_RC.shape[1])
    here_R = logits_RC.gather(1, place_R.clamp(0, logits_RC.shape[1] - 1)[:, None])[:, 0]
    own_R.copy_(torch.where(inside_R, here_R, own_R))
    added_R = logits_RC.sub_(tops_R[:, None]).exp_().sum(1, dtype=torch.float64)
    totals_R.mul_((before_R - tops_R).double().exp_()).add_(added_R)
