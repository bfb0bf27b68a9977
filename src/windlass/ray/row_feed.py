"""Rows of many callers in one replica: each waits for its own. Knows no ray."""

import threading
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import replace
from typing import Protocol

from windlass.batch.jobfile import JobRow
from windlass.errors import UsageError
from windlass.ray.messages import EndedRow, Report

_WAIT_S = 0.05  # for a row that ends; others may have come meanwhile


class Exchanging(Protocol):
    """A replica as its feed sees it; for one thread."""

    def exchange(self, rows: Sequence[JobRow], timeout_s: float) -> Report: ...
    def close(self) -> None: ...


class RowFeed:
    """Owns `replica`, and the only thread that talks to it. What the replica raises comes to all
    that wait and to all who come later. A context manager."""

    def __init__(self, replica: Exchanging) -> None:
        self._replica = replica
        self._changed = threading.Condition()
        self._new: list[JobRow] = []
        self._waiting: dict[int, Future[EndedRow]] = {}
        self._count = 0
        self._ended: BaseException | None = None  # why no more rows are taken
        self._thread = threading.Thread(target=self._run, name="windlass-rows", daemon=True)
        self._thread.start()

    def __enter__(self) -> "RowFeed":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def submit(self, row: JobRow) -> "Future[EndedRow]":
        """Its result to come; `row.index` is nobody's business here."""
        future: Future[EndedRow] = Future()
        future.set_running_or_notify_cancel()  # who no longer waits cannot take it back
        with self._changed:
            if self._ended is not None:
                future.set_exception(self._ended)
                return future
            self._new.append(replace(row, index=self._count))
            self._waiting[self._count] = future
            self._count += 1
            self._changed.notify_all()
        return future

    def close(self) -> None:
        """Rows without a result get UsageError. Calling it again does nothing."""
        self._end(UsageError("rows: closed before all had ended"))
        self._thread.join()

    def _run(self) -> None:
        try:
            while (rows := self._take()) is not None:
                for one in self._replica.exchange(rows, _WAIT_S).ended:
                    self._waiting.pop(one.index).set_result(one)
        except BaseException as error:  # noqa: BLE001  thread boundary: whoever waits gets it
            self._end(error)
        finally:
            assert self._ended is not None, "it has ended"
            for future in self._waiting.values():
                future.set_exception(self._ended)
            self._replica.close()

    def _take(self) -> list[JobRow] | None:
        """Those that came, as soon as there is anything to do; None at the end."""
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._ended is not None)
            if self._ended is not None:
                return None
            rows, self._new = self._new, []
            return rows

    def _end(self, why: BaseException) -> None:
        with self._changed:
            self._ended = self._ended or why
            self._changed.notify_all()
