"""Whether what a source says is nearer to what comes than what stood in its place. Counts passes
and compares probabilities; knows no states and no clock.

E experts of a layer, P passes of a window.
"""

from collections import deque
from collections.abc import Collection, Sequence
from math import sqrt

import numpy as np
from numpy.typing import NDArray

from windlass.forecast.gate import Source
from windlass.forecast.interface import Floats

WINDOW = 64  # passes
_LONGEST_WAIT = 32  # windows between two trials
_WINDOWS = 4  # that what is on is judged by
_LEAST_GAIN = 0.01  # of the log loss of what stood: less is not worth any arithmetic
_NOISE = 2.0  # standard errors
_LEAST = 1e-3  # of a probability: bounds what one expert can cost whoever was sure


class SourceGuard:
    """Of one source, which begins on. Each pass in which it spoke is compared by itself: the log
    loss of what was expected of the same layers before it spoke, and of what it said. It goes off
    where it surely saved less than `_LEAST_GAIN` of that in the last windows, four at most: one of
    another domain decides nothing. It comes back after a window in which it surely saved more;
    where noise leaves that open, it stays as it is. The first window after silence decides nothing.

    Off, it is neither asked nor taught, but for trials of two windows, after 1 window, 2, 4, at
    last every 32, in which it is not believed; they go on as long as each window is surely better
    than the one before: it is still learning. So whoever becomes good, with a window of learning,
    is back within 36 windows (2,304 passes), and sooner where it went off lately.
    """

    def __init__(self, *, window: int = WINDOW) -> None:
        """`window`: passes, at least 2."""
        self.is_on = True  # what it says is believed
        self.speaks = True  # it is asked and taught: on, or on trial
        self._window = window
        self._last: float | None = None  # gain in the last window; None after silence
        self._windows: deque[Floats] = deque(maxlen=_WINDOWS)  # since it came on
        self._stood = self._said = 0.0  # nats of the pass under way
        self._passes: list[tuple[float, float]] = []
        self._wait = 1  # windows until the next trial
        self._left = 0  # passes of these

    def add(self, stood_E: Floats, said_E: Floats, used_E: NDArray[np.bool_]) -> None:
        """What stood of a layer and what was said, and what came."""
        self._stood += _log_loss(stood_E, used_E)
        self._said += _log_loss(said_E, used_E)

    def turn(self) -> None:
        """Another pass begins that it may speak in."""
        if not self.speaks:
            self._left -= 1
            self.speaks = self._left == 0
        elif self._stood:
            self._passes.append((self._stood, self._said))
            if len(self._passes) == self._window:
                self._end_window()
        self._stood = self._said = 0.0

    def _end_window(self) -> None:
        passes_P2 = np.array(self._passes)
        self._passes.clear()
        gain, noise = _gain(passes_P2)
        last, self._last = self._last, gain
        if last is None:
            return
        if not self.is_on:
            self._windows.clear()
        self._windows.append(passes_P2)
        of_all, doubt = _gain(np.concatenate(self._windows))
        self.is_on = of_all + (doubt if self.is_on else -doubt) > _LEAST_GAIN
        if self.is_on:
            self._wait = 1
        elif gain - noise <= last:
            self.speaks, self._last = False, None
            self._left = self._wait * self._window
            self._wait = min(_LONGEST_WAIT, 2 * self._wait)


class SourceGuards:
    """Of all sources of a forecast."""

    def __init__(self, sources: Sequence[Source], *, window: int = WINDOW) -> None:
        self._guards = {source: SourceGuard(window=window) for source in sources}

    def of(self, source: Source) -> SourceGuard:
        return self._guards[source]

    def turn(self, sources: Collection[Source]) -> bool:
        """A pass begins in which these may speak; whether others speak or are believed now."""
        before = self._states()
        for source in sources:
            if source in self._guards:
                self._guards[source].turn()
        return self._states() != before

    def words(self) -> str:
        """Which sources are on and off, for people; empty where all are on."""
        if all(guard.is_on for guard in self._guards.values()):
            return ""
        named: dict[bool, list[str]] = {True: [], False: []}
        for source, guard in self._guards.items():
            named[guard.is_on].append(_name(source))
        on, off = ", ".join(named[True]) or "none", ", ".join(named[False])
        return f"forecasts on: {on}; off, no better than without them: {off}"

    def _states(self) -> list[tuple[bool, bool]]:
        return [(guard.is_on, guard.speaks) for guard in self._guards.values()]


def _name(source: Source) -> str:
    if source is Source.START:
        return "as a token begins"
    if source is Source.TOKEN_BEFORE:
        return "of the next token"
    return f"{source.layers_before} layer{'s' if source.layers_before > 1 else ''} ahead"


def _gain(passes_P2: Floats) -> tuple[float, float]:
    """Share of the log loss of what stood that was saved, and how far that is noise."""
    saved_P = (passes_P2[:, 0] - passes_P2[:, 1]) / passes_P2[:, 0].mean()
    return float(saved_P.mean()), _NOISE * float(saved_P.std(ddof=1)) / sqrt(len(saved_P))


def _log_loss(chances_E: Floats, used_E: NDArray[np.bool_]) -> float:
    """Nats."""
    came_E = np.abs(chances_E - ~used_E)
    return -float(np.log(np.minimum(np.maximum(came_E, _LEAST), 1.0 - _LEAST)).sum())
