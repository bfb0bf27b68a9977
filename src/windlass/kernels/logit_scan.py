"""What is kept of logits that come in ranges of the vocabulary. R rows, C columns of a range, K
likeliest tokens."""

import torch

from windlass.kernels.interface import LogitScan

NONE = torch.iinfo(torch.int64).min  # below the number of any token
_LOW = (1 << 32) - 1
_TILE = 1 << 18  # logits that are looked at together: each step of it takes 2 MiB of fp64 or int64


def scan_logits(scan: LogitScan, logits_RC: torch.Tensor, first: int) -> None:
    """See `Kernels.scan_logits`. Sums and what they add up are fp64: neither ranges nor how many
    rows come at once reach fp32 results, but where rounding is on the edge."""
    step = max(1, _TILE // logits_RC.shape[1])
    for row in range(0, len(logits_RC), step):
        some = slice(row, row + step)
        _scan(scan.rows(some), logits_RC[some], first)


def _scan(scan: LogitScan, logits_RC: torch.Tensor, first: int) -> None:
    tops_R, ids_R, totals_R, own_R, targets_R, best_RK = scan
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
    added_R = logits_RC.double().sub_(tops_R[:, None]).exp_().sum(1)
    totals_R.mul_((before_R - tops_R).double().exp_()).add_(added_R)
    if best_RK is not None:
        count = best_RK.shape[1]
        found_RK = torch.cat((best_RK, _numbers(logits_RC, first)), 1)
        best_RK.copy_(found_RK.topk(count)[0])


def _numbers(logits_RC: torch.Tensor, first: int) -> torch.Tensor:
    """Of each logit and its token one int64: larger for a larger logit, of equal ones for the lower
    token, so that no two are equal and the order does not depend on ranges."""
    bits_RC = (logits_RC + 0.0).view(torch.int32)  # no -0.0
    bits_RC = bits_RC ^ ((bits_RC >> 31) & 0x7FFFFFFF)  # in the order of the numbers
    ids_C = torch.arange(first, first + logits_RC.shape[1], device=logits_RC.device)
    return (bits_RC.long() << 32) | (_LOW - ids_C)


def read_numbers(best_RK: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens (R, K) int64 and logits (R, K) fp32 of `LogitScan.best_RK`."""
    bits_RK = (best_RK >> 32).int()
    bits_RK = bits_RK ^ ((bits_RK >> 31) & 0x7FFFFFFF)
    return _LOW - (best_RK & _LOW), bits_RK.view(torch.float32)
