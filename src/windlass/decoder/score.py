"""Log-probabilities of given tokens, from logits that come in ranges of the vocabulary. Knows no
weights; keeps four numbers per row, so that many rows can be scored at once.

R rows, C columns of a range.
"""

from collections.abc import Sequence

import torch

from windlass.device.base import Allocator


class RunningLogprobs:
    """Of token `targets[i]` in row i. Sums are fp64: their order, which depends on how many rows
    come at once, does not reach the fp32 results but where rounding is on the edge."""

    def __init__(self, targets: Sequence[int], memory: Allocator) -> None:
        count = len(targets)
        self._targets = memory.tensor(targets, dtype=torch.long)
        self._highest = memory.empty(count).fill_(-torch.inf)
        self._total = memory.zeros(count, dtype=torch.float64)  # of exp(logit - highest)
        self._own = memory.empty(count).fill_(-torch.inf)
        self._best = memory.zeros(count, dtype=torch.long)  # the token with the highest logit

    def add(self, rows: slice, column: int, logits_RC: torch.Tensor) -> None:
        """The logits of `rows` for the tokens from `column` on; they are overwritten."""
        place_R = self._targets[rows] - column
        inside_R = (place_R >= 0) & (place_R < logits_RC.shape[1])
        here_R = logits_RC.gather(1, place_R.clamp(0, logits_RC.shape[1] - 1)[:, None])[:, 0]
        self._own[rows] = torch.where(inside_R, here_R, self._own[rows])
        before_R = self._highest[rows]
        here_R, best_R = logits_RC.max(1)
        self._best[rows] = torch.where(here_R > before_R, best_R + column, self._best[rows])
        highest_R = torch.maximum(before_R, here_R)
        added_R = logits_RC.sub_(highest_R[:, None]).exp_().sum(1, dtype=torch.float64)
        self._total[rows] = self._total[rows] * (before_R - highest_R).double().exp() + added_R
        self._highest[rows] = highest_R

    def logprobs(self) -> torch.Tensor:
        """(R,) fp32, once all ranges are in."""
        if not len(self._own):  # of most passes
            return self._own
        return (self._own.double() - self._highest - self._total.log()).float()

    def best(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The likeliest token of each row (R,), and its log-probability (R,) fp32."""
        if not len(self._own):
            return self._best, self._own
        return self._best, (-self._total.log()).float()
