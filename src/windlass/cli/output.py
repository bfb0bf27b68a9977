"""Standard output as commands write to it: what it refuses becomes one line and an exit code."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TextIO

from windlass.errors import WindlassError


class OutputError(WindlassError):
    """Standard output takes no more: its disk is full."""


@contextmanager
def checked_output() -> Iterator[None]:
    """While entered, a write that fails raises OutputError, or BrokenPipeError where nobody reads:
    the reader left, or there was none. All is written when it is left, or nothing more."""
    for fd in range(3):
        _occupy(fd)
    before = sys.stdout
    sys.stdout = _Checked(before)
    try:
        yield
        sys.stdout.flush()
    finally:
        sys.stdout = before
        try:
            if before is not None:
                before.flush()
        except OSError:
            drop_output()


def drop_output() -> None:
    """What is still to be written goes nowhere: the interpreter would try again at its end."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


def _occupy(fd: int) -> None:
    """A closed standard stream becomes none, lest a file of ours take its number."""
    try:
        os.fstat(fd)
    except OSError:
        os.dup2(os.open(os.devnull, os.O_RDWR), fd)


class _Checked:
    """A text stream; None is one that was closed when the process began."""

    def __init__(self, stream: TextIO | None) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        with _reporting():
            return self._open().write(text)

    def flush(self) -> None:
        if self._stream is not None:
            with _reporting():
                self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._open(), name)

    def _open(self) -> TextIO:
        if self._stream is None:
            raise BrokenPipeError("standard output is closed")
        return self._stream


@contextmanager
def _reporting() -> Iterator[None]:
    try:
        yield
    except BrokenPipeError:
        raise
    except OSError as error:
        raise OutputError(f"standard output: cannot be written: {error.strerror}") from error
