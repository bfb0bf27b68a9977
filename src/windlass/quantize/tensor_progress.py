"""How far the work is: a live line on a terminal, else one plain line every 5 s. Knows counts."""

import sys
import time
from collections.abc import Callable
from types import TracebackType
from typing import TextIO

from windlass.units import format_seconds

LINE_EVERY_S = 5.0
_VIEW_EVERY_S = 0.25


class TensorProgress:
    """Of one kind of work after the other. `rate`: how an amount per second reads."""

    def __init__(self, stream: TextIO | None = None, *, every_s: float | None = None) -> None:
        self._stream = stream or sys.stderr
        self._is_live = self._stream.isatty()
        default = _VIEW_EVERY_S if self._is_live else LINE_EVERY_S
        self._every_s = default if every_s is None else every_s
        self._has_line = False
        self._what = ""
        self._rate: Callable[[float], str] = str
        self._first: float | None = None  # amount at the first step
        self._started_at = self._shown_at = time.monotonic()

    def begin(self, what: str, rate: Callable[[float], str]) -> None:
        """A kind of work starts."""
        self._clear()
        self._what, self._rate = what, rate
        self._first = None
        self._started_at = self._shown_at = time.monotonic()

    def step(self, done: float, total: float) -> None:
        """`done` of `total`, counted from wherever the work began."""
        now = time.monotonic()
        if self._first is None:
            self._first = done
        if now - self._shown_at < self._every_s:
            return
        self._shown_at = now
        per_s = (done - self._first) / max(now - self._started_at, 1e-9)
        left = format_seconds((total - done) / per_s) if per_s > 0 else "unknown"
        text = f"{self._what} {100 * done / max(total, 1):.0f} %, {self._rate(per_s)}, ETA {left}"
        if self._is_live:
            self._stream.write(f"\r{text}\x1b[K")
            self._has_line = True
        else:
            self._stream.write(text + "\n")
        self._stream.flush()

    def say(self, text: str) -> None:
        self._clear()
        self._stream.write(text + "\n")
        self._stream.flush()

    def __enter__(self) -> "TensorProgress":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, _: TracebackType | None
    ) -> None:
        self._clear()

    def _clear(self) -> None:
        if self._has_line:
            self._stream.write("\r\x1b[K")
            self._stream.flush()
            self._has_line = False
