"""Bursts: few sequences decode one after the other, each for some passes, where weights that a
sequence has read are worth more to itself than to the others. Counts alone, no tensors.

Fair: who has waited longest has the next turn, whoever comes waits behind those who are there. So
none waits for more than (n - 1) * burst_tokens passes that decode, n being those who could.
"""

from collections.abc import Sequence
from typing import Protocol


class Guard(Protocol):
    """Compares seconds with bursts and without, and says what comes next; `prefetch/guard.py`."""

    @property
    def is_on(self) -> bool: ...
    @property
    def verdict(self) -> str: ...
    def add(self, kind: object, seconds: float) -> None: ...


class Turns:
    """Who decodes in a pass: while at most `max_seqs` could, one of them, for `burst_tokens` passes
    or until it ends or gives way; else all. 0 `burst_tokens`: always all. `guard`: goes back to all
    where that brings more tokens per second; None: bursts whatever they bring."""

    def __init__(
        self, burst_tokens: int = 0, max_seqs: int = 0, guard: Guard | None = None
    ) -> None:
        self.burst_tokens = burst_tokens
        self.max_seqs = max_seqs
        self._guard = guard
        self._measured = _Measured(burst_tokens)
        self.num_passes = 0  # in which one decoded while others waited
        self.left = 0  # passes that the present turn still has
        self._order: list[int] = []  # of those who could decode: whose turn it is, then comes next
        self._num_able = 0

    @property
    def have_lost(self) -> bool:
        """Whether all decode, because that was measured to be faster."""
        return self._guard is not None and self._guard.verdict == "loses"

    def choose(self, able: Sequence[int], first: Sequence[int] = ()) -> Sequence[int]:
        """Of those who could decode, oldest first, who does in this pass. `first`: of them, those
        who do not wait for a turn of the others."""
        self._num_able = len(able)
        if not self.burst_tokens or not 1 < len(able) <= self.max_seqs:
            self._order = []
            return able
        if self._guard is not None and not self._guard.is_on:
            return able
        able = first or able
        order = [one for one in self._order if one in able]
        has_turn = bool(order) and order[0] == self._order[0]
        order += [one for one in able if one not in order]
        if has_turn and not self.left:
            order.append(order.pop(0))
        if not has_turn or not self.left:
            self.left = self.burst_tokens
        self._order = order
        self.skip(1)
        return order[:1]

    def skip(self, passes: int) -> None:
        """So many of the turn's passes are done."""
        self.left -= passes
        self.num_passes += passes

    def took(self, tokens: int, seconds: float) -> None:
        """The last pass had only generated rows, brought so many tokens and took so long."""
        guard, num = self._guard, self._num_able
        if guard is None or not 1 < num <= self.max_seqs:
            return
        each = self._measured.add((num, guard.is_on), tokens, seconds)
        if each is not None:
            guard.add(num, each)


class _Measured:
    """Seconds of a token over stretches of passes: of two bursts, so that the first passes of each
    have their share, which read most; of lockstep over a quarter of a burst, after as many passes
    that do not count, in which its weights come: it is to be tried at little cost."""

    def __init__(self, burst_tokens: int) -> None:
        self._passes = {True: 2 * burst_tokens, False: max(1, burst_tokens // 4)}
        self._kind: tuple[int, bool] | None = None
        self._begin(0)

    def add(self, kind: tuple[int, bool], tokens: int, seconds: float) -> float | None:
        """A pass of so many sequences that could decode, in bursts or not; what a token took where
        it ends a stretch of such passes."""
        is_burst = kind[1]
        if kind != self._kind:
            self._kind = kind
            self._begin(0 if is_burst else -self._passes[False])
        self._done += 1
        if self._done > 0:
            self._tokens += tokens
            self._seconds += seconds
        if self._done < self._passes[is_burst]:
            return None
        each = self._seconds / max(1, self._tokens)
        self._begin(0)
        return each

    def _begin(self, done: int) -> None:
        self._done, self._tokens, self._seconds = done, 0, 0.0
