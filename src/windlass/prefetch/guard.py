"""Whether something that may be left out pays: windows of passes with it are compared with windows
without. Knows seconds, not what it guards."""

from collections import deque
from math import exp, log, sqrt
from typing import Literal

_WINDOW = 8  # passes
_PAIRS = 12  # of windows that count, the last ones
_PLAIN = 0.15  # of the logarithm of a ratio: one pair of windows is enough
_LONGEST_WAIT = 64  # windows between two probes
_NOISE = 0.005  # of the logarithm of a ratio: less is no difference

Verdict = Literal["open", "pays", "loses"]


class WindowGuard:
    """Begins with windows in turn, with and without. What wins stays; the other is tried again ever
    more rarely, each time for one window, so that a wrong verdict and a change of the work are
    noticed. It stays on where nothing can be told apart: what it guards is there because it pays.

    Only passes of the same kind are compared: a window ends where the kind of passes changes, and
    does not count.
    """

    def __init__(self, *, window: int = _WINDOW) -> None:
        self.is_on = True
        self.verdict: Verdict = "open"
        self.gain = 0.0  # share of time that it saves, as far as is known
        self._window = window
        self._kind: object = None
        self._seconds: list[float] = []
        self._last: dict[bool, float] = {}  # mean seconds of the last whole windows, by `is_on`
        self._ratios: deque[float] = deque(maxlen=_PAIRS)  # log(without / with) of neighbours
        self._wait = 1  # windows until the loser is tried again
        self._waited = 0

    def words(self) -> str:
        """What was found, for people; empty where nothing was."""
        share = f" {100 * abs(1 - exp(-self.gain)):.0f} %" if len(self._ratios) > 2 else ""
        if self.verdict == "pays":
            return f"passes take{share} less time with it"
        if self.verdict == "loses":
            return f"off, as passes took{share} more time with it"
        return ""

    def add(self, kind: object, seconds: float) -> None:
        """A pass of this kind took so long, with the thing on or off as `is_on` said."""
        if kind != self._kind:
            self._kind = kind
            self._seconds.clear()
            self._last.clear()
            return  # the first of a kind pays for the change
        self._seconds.append(seconds)
        if len(self._seconds) == self._window:
            self._end_window()

    def _end_window(self) -> None:
        ordered = sorted(self._seconds)
        self._seconds.clear()
        # means without the extremes: one pass that another program held up decides nothing
        cut = len(ordered) // 8
        kept = ordered[cut : len(ordered) - cut]
        self._last[self.is_on] = max(1e-9, sum(kept) / len(kept))
        if len(self._last) == 2 and self._waited == 0:
            self._ratios.append(log(self._last[False] / self._last[True]))
            self._judge()
        self._turn()

    def _judge(self) -> None:
        count = len(self._ratios)
        mean = sum(self._ratios) / count
        self.gain = mean
        squares = sum((one - mean) ** 2 for one in self._ratios)
        spread = sqrt(squares / (count - 1) / count) if count > 1 else _PLAIN
        before = self.verdict
        if mean < -max(_NOISE, spread):
            self.verdict = "loses"
        elif mean > max(_NOISE, spread):
            self.verdict = "pays"
        else:
            self.verdict = "open"
        self._wait = min(_LONGEST_WAIT, 2 * self._wait) if self.verdict == before else 1

    def _turn(self) -> None:
        """What the next window runs with."""
        if self.verdict == "open":
            self.is_on, self._waited = not self.is_on, 0
            return
        winner = self.verdict == "pays"
        if self.is_on != winner:  # the probe is over, or the verdict is new
            self.is_on, self._waited = winner, 1
        elif self._waited < self._wait:
            self._waited += 1
        else:
            self.is_on, self._waited = not winner, 0
