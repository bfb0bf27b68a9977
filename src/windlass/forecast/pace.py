"""Whether something is worth doing at once, by a clock."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

_SHARE = 0.05  # of a layer's time, that a forecast may take of it where nothing is waited for
_KEPT = 15 / 16  # of an average, when another time comes


class Pace:
    """How long layers take, and forecasts of one. Without a clock (seconds) there is never time."""

    def __init__(self, clock: Callable[[], float] | None) -> None:
        self._clock = clock
        self._at: float | None = None
        self._layer_s = self._forecast_s = 0.0

    @property
    def has_time(self) -> bool:
        """Whether a forecast takes little of a layer's time."""
        return self._clock is not None and self._forecast_s < _SHARE * self._layer_s

    def layer_done(self) -> None:
        """A layer has routed."""
        if self._clock is None:
            return
        now = self._clock()
        if self._at is not None:
            self._layer_s = _KEPT * self._layer_s + (1 - _KEPT) * (now - self._at)
        self._at = now

    def pass_done(self) -> None:
        """What lies between this layer and the next that routes is no layer."""
        self._at = None

    @contextmanager
    def forecast(self) -> Iterator[None]:
        """Measures one."""
        begin = self._clock() if self._clock is not None else 0.0
        yield
        if self._clock is not None:
            took = self._clock() - begin
            self._forecast_s = _KEPT * self._forecast_s + (1 - _KEPT) * took
