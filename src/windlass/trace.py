"""Spans and counters of one run, written as a Chrome trace that Perfetto opens. Knows no layers."""

import json
import os
import threading
import time
from collections import defaultdict
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, TextIO

from windlass.errors import UsageError


class Tracer:
    """Writes spans per lane (one row in Perfetto) to `path` as they come, in the JSON array form,
    which is valid without its end: a killed run leaves a readable trace. Memory stays bounded.
    Writes nothing without a path. Thread-safe, except `span`, which is for one thread. Raises
    UsageError if the file cannot be made.
    """

    def __init__(self, path: Path | None = None) -> None:
        self._file: TextIO | None = None if path is None else _open(path)
        self._lanes: dict[str, int] = {}
        self._lock = threading.Lock()
        self._start = time.perf_counter()
        self.current = ""  # the innermost span under way
        self.seconds: dict[str, float] = defaultdict(
            float
        )  # in spans, by name; with and without a file
        if self._file is not None:
            self._file.write("[")

    def span(self, name: str, lane: str = "compute", **args: Any) -> AbstractContextManager[None]:
        """Times the body on `lane`; `args` are shown with the span."""
        return _Span(self, name, lane, args)

    @property
    def writes(self) -> bool:
        """Whether there is a file."""
        return self._file is not None

    def record(self, name: str, lane: str, begin: float, end: float, **args: Any) -> None:
        """Adds a finished span; `begin` and `end` are `time.perf_counter()` seconds."""
        if self._file is not None:
            event = {"ph": "X", "name": name, "ts": self._us(begin), "args": args}
            self._add(event | {"dur": round((end - begin) * 1e6, 1)}, lane)

    def counter(self, name: str, **values: float) -> None:
        """Adds one sample of a counter track."""
        if self._file is not None:
            now = self._us(time.perf_counter())
            self._add({"ph": "C", "name": name, "ts": now, "args": values}, "counters")

    def close(self) -> None:
        """Ends the file. Idempotent; later spans are dropped."""
        with self._lock:
            file, self._file = self._file, None
            if file is not None:
                file.write("\n]\n")
                file.flush()
                os.fsync(file.fileno())
                file.close()

    def _us(self, seconds: float) -> float:
        return round((seconds - self._start) * 1e6, 1)

    def _add(self, event: dict[str, Any], lane: str) -> None:
        with self._lock:
            if self._file is None:
                return
            if lane not in self._lanes:
                self._lanes[lane] = len(self._lanes) + 1
                name = {"ph": "M", "name": "thread_name", "args": {"name": lane}}
                self._write(name | {"pid": 1, "tid": self._lanes[lane]})
            self._write(event | {"pid": 1, "tid": self._lanes[lane]})

    def _write(self, event: dict[str, Any]) -> None:
        assert self._file is not None, "only called with an open file"
        separator = "\n" if self._file.tell() == 1 else ",\n"
        self._file.write(separator + json.dumps(event))


class _Span:
    """A context manager by hand: there are dozens in a pass of one token."""

    __slots__ = ("_tracer", "_name", "_lane", "_args", "_outer", "_begin")

    def __init__(self, tracer: Tracer, name: str, lane: str, args: dict[str, Any]) -> None:
        self._tracer, self._name, self._lane, self._args = tracer, name, lane, args

    def __enter__(self) -> None:
        self._outer, self._tracer.current = self._tracer.current, self._name
        self._begin = time.perf_counter()

    def __exit__(self, *error: object) -> None:
        end, tracer = time.perf_counter(), self._tracer
        tracer.current = self._outer
        tracer.seconds[self._name] += end - self._begin
        if tracer.writes:
            tracer.record(self._name, self._lane, self._begin, end, **self._args)


def _open(path: Path) -> TextIO:
    try:
        return path.open("w", encoding="utf-8")
    except OSError as error:
        raise UsageError(f"trace: got {str(path)!r}: {error.strerror}") from error
