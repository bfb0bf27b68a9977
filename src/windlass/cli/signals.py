"""Ctrl-C and SIGTERM: the first asks a running job to stop, the second ends the process."""

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType, TracebackType
from typing import NoReturn

from windlass.cli.output import OutputError

EXIT_INTERRUPTED = 130


def leave_at_once() -> NoReturn:
    """Ends the process, whatever its threads do."""
    with suppress(OutputError, OSError):
        sys.stdout.flush()
    os._exit(EXIT_INTERRUPTED)


@contextmanager
def terminable() -> Iterator[None]:
    """While entered, SIGTERM raises KeyboardInterrupt, as Ctrl-C does."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


class StopSignals:
    """While entered, handles both signals. Until `defer` a signal raises KeyboardInterrupt at once:
    there is nothing yet that could be lost. `farewell`: what to say when the second one ends the
    process."""

    def __init__(self, farewell: str) -> None:
        self._farewell = os.fsencode(f"\n{farewell}\n")
        self._is_deferred = False
        self._is_stopping = False
        self._before: dict[int, object] = {}

    def defer(self) -> None:
        """From now on the first signal only makes `is_stopping` true."""
        self._is_deferred = True

    def is_stopping(self) -> bool:
        return self._is_stopping

    def __enter__(self) -> "StopSignals":
        for number in (signal.SIGINT, signal.SIGTERM):
            self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, _: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]  # what signal() gave

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if not self._is_deferred:
            raise KeyboardInterrupt
        if self._is_stopping:
            # results are written as they finish: leaving at once loses none
            _say(self._farewell)
            os._exit(EXIT_INTERRUPTED)
        self._is_stopping = True
        _say(b"\nfinishing the pass under way, then stopping; once more stops at once\n")


def _say(text: bytes) -> None:
    # print() is not safe inside a handler
    os.write(sys.stderr.fileno(), text)
