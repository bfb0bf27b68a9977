"""What sampling needs of logits that come in ranges of the vocabulary, so that a greedy row sends
three numbers to the host. `decoder/score.py` keeps the same on the host.

Shapes: R rows, C columns of a range.
"""

from typing import NamedTuple, Self

import torch
import triton
import triton.language as tl

_LOWEST = tl.constexpr(-1e30)  # instead of -inf: differences of two maxima stay finite
_COLUMNS = 2048  # logits that a program takes at once


class HeadState(NamedTuple):
    """What is known of each row's logits after some ranges of the vocabulary."""

    tops_R: torch.Tensor  # fp32: the largest
    ids_R: torch.Tensor  # int32: its token, the first of equals
    totals_R: torch.Tensor  # fp32: sum of exp(logit - top)
    own_R: torch.Tensor  # fp32: the logit of the row's target

    @classmethod
    def begin(cls, rows: int, device: torch.device) -> Self:
        tops = torch.full((rows,), -torch.inf, device=device)
        ids = torch.zeros(rows, dtype=torch.int32, device=device)
        return cls(tops, ids, torch.zeros_like(tops), tops.clone())

    def logprobs(self) -> torch.Tensor:
        """Of the targets (R,), once all ranges are in."""
        return self.own_R - self.tops_R - self.totals_R.log()


@triton.jit
def scan_row(
    logits, targets, tops, ids, totals, owns, first, C, stride, cap, BC: tl.constexpr
):  # fmt: skip
    """Each lane keeps its own maximum, place and sum; lanes are joined once, in the end."""
    r = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, BC)
    top = tl.full((BC,), _LOWEST, tl.float32)
    at = tl.zeros((BC,), tl.int32)
    total = tl.zeros((BC,), tl.float32)
    target = -1
    if targets is not None:
        target = tl.load(targets + r).to(tl.int32) - first
    own = tl.full((BC,), float("-inf"), tl.float32)
    for start in range(0, C, BC):
        column = start + lane
        x = tl.load(logits + r * stride + column, mask=column < C, other=float("-inf"))
        x = x.to(tl.float32)
        if cap is not None:
            x = cap * (2.0 * tl.sigmoid(2.0 * x / cap) - 1.0)
        own = tl.where(column == target, x, own)
        x = tl.where(column < C, x, float("-inf"))
        at = tl.where(x > top, column, at)
        new = tl.maximum(top, x)
        total = total * tl.exp(top - new) + tl.exp(x - new)
        top = new
    largest, lowest = tl.max(top, 0), tl.full((BC,), 1 << 30, tl.int32)
    place = tl.min(tl.where(top == largest, at, lowest), 0)
    total = tl.sum(total * tl.exp(top - largest), 0)
    before = tl.load(tops + r)
    new = tl.maximum(before, largest)
    total = total * tl.exp(largest - new) + tl.load(totals + r) * tl.exp(before - new)
    tl.store(ids + r, tl.where(largest > before, place + first, tl.load(ids + r)))
    tl.store(tops + r, new)
    tl.store(totals + r, total)
    if targets is not None:
        tl.store(owns + r, tl.maximum(tl.load(owns + r), tl.max(own, 0)))


def scan(
    state: HeadState,
    logits_RC: torch.Tensor,
    first: int,
    *,
    targets_R: torch.Tensor | None = None,
    cap: float | None = None,
) -> None:
    """Takes the logits of the tokens from `first` on into `state`; `cap` is the model's
    `logit_cap`. Ranges come in the order of tokens."""
    rows, columns = logits_RC.shape
    scan_row[(rows,)](
        logits_RC, targets_R, *state, first, columns, logits_RC.stride(0), cap,
        BC=_COLUMNS, num_warps=8,
    )  # fmt: skip
