"""Moves the rows of a job through its engine: keeps a bounded window of them in flight, and stores
each result as it ends. Knows no files: rows come from an iterator, results go to a Ledger."""

from collections.abc import Iterator
from typing import Protocol

from windlass.batch.flights import Flights, RunSettings
from windlass.batch.jobfile import JobRow
from windlass.batch.journal import JournalState
from windlass.batch.ledger import Ledger
from windlass.batch.progress import JobProgress, Snapshot
from windlass.engine.engine_stats import EngineStats
from windlass.engine.service import Service
from windlass.protocol.openai import ServedModel

_LOOK_EVERY_S = 0.25  # at whoever may stop the job, and for progress, however long a pass takes


class Stopping(Protocol):
    """Whoever may ask a job to stop."""

    def is_stopping(self) -> bool: ...


class BatchRunner:
    """Runs `rows` to their ends, or until `stopping` says so: the pass under way is finished then,
    and the service is closed; one that is shared goes on without the rows that have not ended."""

    def __init__(
        self, service: Service, model: ServedModel, ledger: Ledger, settings: RunSettings
    ) -> None:
        self._service = service
        self._flights = Flights(service, model, settings, self._store)
        self._ledger = ledger
        self._settings = settings

    def run(self, rows: Iterator[JobRow], *, stopping: Stopping, progress: JobProgress) -> None:
        """Raises JobError if a result cannot be stored; what the engine raises passes through."""
        more = True
        with self._flights as flights:  # nothing of this stays in the service, however it ends
            while not stopping.is_stopping():
                more = more and self._admit(rows, stopping, progress)
                if not flights.num_open:
                    return
                flights.submit()
                flights.take(_LOOK_EVERY_S)
                self._tick(progress)
            if not self._settings.shares_service:
                self._service.close()
            flights.take(0)

    def _admit(self, rows: Iterator[JobRow], stopping: Stopping, progress: JobProgress) -> bool:
        """Fills the window. False when there are no more rows."""
        while self._flights.has_room and not stopping.is_stopping():
            if not self._start_next(rows):
                return False
            self._tick(progress)
        return True

    def _start_next(self, rows: Iterator[JobRow]) -> bool:
        """False when there is none. Holds no row while the next is read: it may be large."""
        row = next(rows, None)
        if row is not None:
            self._flights.start(row)
        return row is not None

    def _tick(self, progress: JobProgress) -> None:
        self._ledger.sync_if_due()
        if progress.is_due:
            progress.update(snapshot(self._ledger, self._service.stats()))

    def _store(self, row: JobRow, state: JournalState, line: bytes) -> None:
        self._ledger.add(row.index, row.digest, state, line)


def snapshot(ledger: Ledger, stats: EngineStats) -> Snapshot:
    """Where the job stands."""
    return Snapshot(
        rows=len(ledger),
        rows_done=ledger.num_done,
        rows_before=ledger.num_before,
        rows_failed=ledger.count(JournalState.REFUSED) + ledger.count(JournalState.FAILED),
        stats=stats,
    )
