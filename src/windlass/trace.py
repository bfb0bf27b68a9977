"""Spans and counters of one run, written as a Chrome trace that Perfetto opens. Knows no layers."""

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


class Tracer:
    """Collects spans per lane (one row in Perfetto). Thread-safe; does nothing when not `enabled`.

    Events beyond `max_events` are counted and dropped, so that a long job's trace stays bounded;
    the file says how many.
    """

    def __init__(self, *, enabled: bool = False, max_events: int = 500_000) -> None:
        self.enabled = enabled
        self._max_events = max_events
        self._events: list[dict[str, Any]] = []
        self._dropped = 0
        self._lanes: dict[str, int] = {}
        self._lock = threading.Lock()
        self._start = time.perf_counter()

    @contextmanager
    def span(self, name: str, lane: str = "compute", **args: Any) -> Iterator[None]:
        """Times the body on `lane`; `args` are shown with the span."""
        if not self.enabled:
            yield
            return
        begin = time.perf_counter()
        try:
            yield
        finally:
            self.record(name, lane, begin, time.perf_counter(), **args)

    def record(self, name: str, lane: str, begin: float, end: float, **args: Any) -> None:
        """Adds a finished span; `begin` and `end` are `time.perf_counter()` seconds."""
        if self.enabled:
            self._add(
                {"ph": "X", "name": name, "ts": self._us(begin), "dur": (end - begin) * 1e6,
                 "args": args},
                lane,
            )  # fmt: skip

    def counter(self, name: str, **values: float) -> None:
        """Adds one sample of a counter track."""
        if self.enabled:
            now = self._us(time.perf_counter())
            self._add({"ph": "C", "name": name, "ts": now, "args": values}, "counters")

    def write(self, path: Path) -> None:
        """Writes all events; the file appears whole or not at all."""
        with self._lock:
            names: list[dict[str, Any]] = [
                {"ph": "M", "name": "thread_name", "pid": 1, "tid": tid, "args": {"name": lane}}
                for lane, tid in self._lanes.items()
            ]
            document = {
                "traceEvents": names + self._events,
                "displayTimeUnit": "ms",
                "otherData": {"dropped_events": self._dropped},
            }
        temporary = path.with_name(path.name + ".tmp")
        temporary.write_text(json.dumps(document), encoding="utf-8")
        temporary.replace(path)

    def _us(self, seconds: float) -> float:
        return (seconds - self._start) * 1e6

    def _add(self, event: dict[str, Any], lane: str) -> None:
        with self._lock:
            if len(self._events) >= self._max_events:
                self._dropped += 1
                return
            event["pid"] = 1
            event["tid"] = self._lanes.setdefault(lane, len(self._lanes) + 1)
            self._events.append(event)
