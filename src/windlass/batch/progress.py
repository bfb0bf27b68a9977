"""Telling a person how a job goes: a live line on a terminal, else one plain line every 5 s. Knows
counters, no rows and no engine."""

import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import Protocol, TextIO

from windlass.engine.engine_stats import EngineStats
from windlass.units import format_bytes, format_seconds

LINE_EVERY_S = 5.0
_VIEW_EVERY_S = 0.25
_WINDOW_S = 30.0  # rates are means over this


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    """Where a job stands. Rows count the whole job, `rows_before` those of earlier runs."""

    rows: int
    rows_done: int
    rows_before: int
    rows_failed: int  # refused or failed, of those done
    stats: EngineStats


class JobProgress(Protocol):
    """What the job tells, on the job's own thread."""

    @property
    def is_due(self) -> bool:
        """Whether a snapshot would be shown; else it need not be taken."""
        ...

    def say(self, text: str) -> None: ...

    def note(self, text: str) -> None:
        """What goes on before rows run; shown where rates would be."""
        ...

    def update(self, snapshot: Snapshot) -> None: ...

    def __enter__(self) -> "JobProgress": ...

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, _: TracebackType | None
    ) -> None: ...


def open_progress(stream: TextIO | None = None) -> JobProgress:
    """The kind that fits `stream` (standard error)."""
    stream = stream or sys.stderr
    return TerminalProgress(stream) if stream.isatty() else LineProgress(stream)


class Meter:
    """Rates over the last `_WINDOW_S` and the time that is left."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.note = "starting"  # the text until there is a snapshot
        self._clock = clock
        self._start = 0.0
        self._seen: deque[tuple[float, Snapshot]] = deque()

    def add(self, snapshot: Snapshot) -> None:
        now = self._clock()
        if not self._seen:
            self._start = now
        self._seen.append((now, snapshot))
        while len(self._seen) > 2 and now - self._seen[1][0] > _WINDOW_S:
            self._seen.popleft()

    def text(self) -> str:
        """`rows 12/100, 34.5 tokens/s, disk 1.20 GiB/s, hits 87 %, ETA 3 min 05 s`."""
        if not self._seen:
            return self.note
        (first_s, first), (_, last) = self._seen[0], self._seen[-1]
        elapsed = max(self._clock() - first_s, 1e-9)
        done = last.stats
        tokens = _tokens(done) - _tokens(first.stats)
        asked = done.expert_requests - first.stats.expert_requests
        hits = done.expert_hits - first.stats.expert_hits
        failed = f" ({last.rows_failed} with errors)" if last.rows_failed else ""
        parts = [
            f"rows {last.rows_done}/{last.rows}{failed}",
            f"{tokens / elapsed:.1f} tokens/s",
            f"disk {format_bytes((done.bytes_read - first.stats.bytes_read) / elapsed)}/s",
            f"hits {100 * hits / asked:.0f} %" if asked else "hits -",
            f"ETA {self._eta(last)}",
        ]
        return ", ".join(parts)

    def _eta(self, last: Snapshot) -> str:
        mine = last.rows_done - last.rows_before
        if mine <= 0:
            return "unknown"
        return format_seconds((self._clock() - self._start) / mine * (last.rows - last.rows_done))


def _tokens(stats: EngineStats) -> int:
    return stats.input_tokens + stats.generated_tokens


class LineProgress:
    """One plain line every `LINE_EVERY_S`, also while a long pass keeps the job's thread busy."""

    def __init__(self, stream: TextIO, *, every_s: float = LINE_EVERY_S) -> None:
        self._stream = stream
        self._every_s = every_s
        self._meter = Meter()
        self._lock = threading.Lock()
        self._closed = threading.Event()
        self._updated_at = 0.0
        self._thread = threading.Thread(target=self._run, name="windlass-progress", daemon=True)

    def __enter__(self) -> "LineProgress":
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, _: TracebackType | None
    ) -> None:
        self._closed.set()
        self._thread.join()

    def say(self, text: str) -> None:
        with self._lock:
            self._stream.write(text + "\n")
            self._stream.flush()

    def note(self, text: str) -> None:
        with self._lock:
            self._meter.note = text

    @property
    def is_due(self) -> bool:
        return time.monotonic() - self._updated_at >= min(_VIEW_EVERY_S, self._every_s)

    def update(self, snapshot: Snapshot) -> None:
        self._updated_at = time.monotonic()
        with self._lock:
            self._meter.add(snapshot)

    def _run(self) -> None:
        while not self._closed.wait(self._every_s):
            with self._lock:
                text = self._meter.text()
            self.say(text)


class TerminalProgress:
    """A bar and the meter on one live line."""

    def __init__(self, stream: TextIO) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, TextColumn, TimeElapsedColumn
        from rich.progress import Progress as RichProgress

        self._meter = Meter()
        self._bar = RichProgress(
            BarColumn(bar_width=24),
            TextColumn("{task.description}", markup=False),
            TimeElapsedColumn(),
            console=Console(file=stream),
        )
        self._task = self._bar.add_task("starting", total=None)
        self._updated_at = 0.0

    def __enter__(self) -> "TerminalProgress":
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, _: TracebackType | None
    ) -> None:
        self._bar.stop()

    def say(self, text: str) -> None:
        self._bar.console.print(text, markup=False, highlight=False)

    def note(self, text: str) -> None:
        self._meter.note = text
        self._bar.update(self._task, description=text)

    @property
    def is_due(self) -> bool:
        return time.monotonic() - self._updated_at >= _VIEW_EVERY_S

    def update(self, snapshot: Snapshot) -> None:
        self._updated_at = time.monotonic()
        self._meter.add(snapshot)
        self._bar.update(
            self._task,
            total=snapshot.rows,
            completed=snapshot.rows_done,
            description=self._meter.text(),
        )
