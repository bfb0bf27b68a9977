"""How long answers turn out to be, learned while running. Knows numbers alone.

Lengths count relative to what a request may have (`max_tokens`), of the last `_WINDOW` answers that
ended. The first to end are the short ones, so early numbers are low; where nothing is known, an
answer takes all that it may.
"""

from bisect import bisect_left, bisect_right, insort
from collections import deque

_WINDOW = 512


class OutputLengths:
    """Of finished answers, as shares from 0 to 1."""

    def __init__(self) -> None:
        self._sorted: list[float] = []
        self._recent: deque[float] = deque()

    def observe(self, num_output: int, max_output: int) -> None:
        """An answer of `num_output` tokens has ended that might have had `max_output`."""
        share = num_output / max_output
        self._recent.append(share)
        insort(self._sorted, share)
        if len(self._recent) > _WINDOW:
            oldest = self._recent.popleft()
            del self._sorted[bisect_left(self._sorted, oldest)]

    def chance(self, more_than: int, *, after: int, max_output: int) -> float:
        """Probability that an answer with `after` tokens comes to have more than `more_than`: by
        those that did, of those that came as far, counted as if one more had (Laplace)."""
        came = len(self._sorted) - bisect_left(self._sorted, after / max_output)
        went = len(self._sorted) - bisect_right(self._sorted, more_than / max_output)
        return (went + 1) / (came + 1)
