"""Moves rows through the engine: keeps a bounded window of them in flight, stores each result as it
ends, retries what failed. Knows no files: rows come from an iterator, results go to a Ledger."""

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from windlass.batch.jobfile import JobRow
from windlass.batch.journal import JournalState
from windlass.batch.ledger import Ledger
from windlass.batch.progress import JobProgress, Snapshot
from windlass.engine.outputs import NOT_FINITE, RequestOutput
from windlass.engine.request import Request
from windlass.engine.service import Service
from windlass.errors import RequestError
from windlass.protocol.openai import ServedModel
from windlass.protocol.responses import error_response
from windlass.protocol.rows import RowRequest, read_row

_LOOK_EVERY_S = 0.25  # at whoever may stop the job, and for progress, however long a pass takes
_LINE_BREAKS = {"\u2028": "\\u2028", "\u2029": "\\u2029", "\x85": "\\u0085"}


class Stopping(Protocol):
    """Whoever may ask a job to stop."""

    def is_stopping(self) -> bool: ...


@dataclass(frozen=True, slots=True)
class RunSettings:
    name: str  # begins the ids of requests, which no others in the service have
    created: int  # seconds since 1970, of every response
    max_retries: int
    window: int  # sequences in flight
    shares_service: bool = False  # others go on with it when this has been stopped


@dataclass(slots=True, eq=False)
class _Flight:
    """A row in the engine: one request per prompt."""

    name: str
    row: JobRow
    request: RowRequest
    attempt: int = 0
    outputs: dict[int, RequestOutput] = field(default_factory=dict)  # prompt index -> result

    def requests(self) -> list[Request]:
        assert self.row.custom_id is not None, "malformed rows never fly"
        return [
            Request(
                request_id=f"{self.name}.{self.row.index}.{i}.{self.attempt}",
                prompt_token_ids=prompt.token_ids,
                params=prompt.params,
                # the prompts of one row must not draw the same numbers
                seed_key=self.row.custom_id if i == 0 else f"{self.row.custom_id}#{i}",
                is_batch=True,
            )
            for i, prompt in enumerate(self.request.api.prompts)
        ]


class BatchRunner:
    """Runs `rows` to their ends, or until `stopping` says so: the pass under way is finished then,
    and the service is closed; one that is shared goes on without the rows that have not ended."""

    def __init__(
        self, service: Service, model: ServedModel, ledger: Ledger, settings: RunSettings
    ) -> None:
        self._service = service
        self._stream = service.open()
        self._model = model
        self._ledger = ledger
        self._settings = settings
        self._flying: dict[str, tuple[_Flight, int]] = {}  # request id -> flight, prompt index
        self._launched: list[Request] = []  # of these, those that the service does not have yet
        self._num_sequences = 0

    def run(self, rows: Iterator[JobRow], *, stopping: Stopping, progress: JobProgress) -> None:
        """Raises JobError if a result cannot be stored; what the engine raises passes through."""
        more = True
        with self._stream:  # nothing of this stays in the service, however it ends
            while not stopping.is_stopping():
                more = more and self._admit(rows, stopping, progress)
                if not self._flying:
                    return
                # whole windows at a time: a pass does not begin with the first row alone
                self._stream.submit(self._launched)
                self._launched.clear()
                self._take_all(_LOOK_EVERY_S)
                self._tick(progress)
            if not self._settings.shares_service:
                self._service.close()
            self._take_all(0)

    def _admit(self, rows: Iterator[JobRow], stopping: Stopping, progress: JobProgress) -> bool:
        """Fills the window. False when there are no more rows."""
        while self._num_sequences < self._settings.window and not stopping.is_stopping():
            if not self._start_next(rows):
                return False
            self._tick(progress)
        return True

    def _start_next(self, rows: Iterator[JobRow]) -> bool:
        """False when there is none. Holds no row while the next is read: it may be large."""
        row = next(rows, None)
        if row is not None:
            self._start(row)
        return row is not None

    def _tick(self, progress: JobProgress) -> None:
        self._ledger.sync_if_due()
        if not progress.is_due:
            return
        ledger = self._ledger
        progress.update(
            Snapshot(
                rows=len(ledger),
                rows_done=ledger.num_done,
                rows_before=ledger.num_before,
                rows_failed=ledger.count(JournalState.REFUSED) + ledger.count(JournalState.FAILED),
                stats=self._service.stats(),
            )
        )

    def _take_all(self, timeout_s: float) -> None:
        """Stores what has ended, waiting for it at most so long."""
        for output in self._stream.take(timeout_s).finished:
            if output.request_id in self._flying:  # else of a row that was given up meanwhile
                self._take(output)

    def _start(self, row: JobRow) -> None:
        if row.malformed is not None:
            self._store_error(row, JournalState.REFUSED, row.malformed.code, row.malformed.message)
            return
        assert row.endpoint is not None and row.body is not None, "a row is a request or malformed"
        try:
            key, created = _key(row), self._settings.created
            request = read_row(row.endpoint, row.body, self._model, key=key, created=created)
            # the body may be large and is no longer needed
            row = JobRow(row.index, row.line, row.digest, row.custom_id)
            self._launch(_Flight(self._settings.name, row, request))
        except RequestError as error:
            status, body = error_response(error)
            self._store_response(row, JournalState.REFUSED, status, body)
        except Exception as error:  # noqa: BLE001  # one strange row must not end the job
            self._store_error(
                row, JournalState.FAILED, "internal_error", f"{type(error).__name__}: {error}"
            )

    def _launch(self, flight: _Flight) -> None:
        """Takes a row into the window, whole or (RequestError) not at all."""
        requests = flight.requests()
        for request in requests:
            self._service.validate(request)
        self._launched += requests
        for number, request in enumerate(requests):
            self._flying[request.request_id] = (flight, number)
            self._num_sequences += request.params.n

    def _take(self, output: RequestOutput) -> None:
        flight, number = self._land(output.request_id)
        flight.outputs[number] = output
        if output.error is not None and output.error_code is not None:
            self._give_up(flight, output.error, output.error_code)
        elif output.error is not None or any(
            choice.finish_reason not in ("stop", "length") for choice in output.outputs
        ):
            self._retry(flight, output.error or "the engine gave it up")
        elif len(flight.outputs) == len(flight.request.api.prompts):
            outputs = [flight.outputs[i] for i in range(len(flight.outputs))]
            self._store_response(flight.row, JournalState.OK, 200, flight.request.answer(outputs))

    def _land(self, request_id: str) -> tuple[_Flight, int]:
        flight, number = self._flying.pop(request_id)
        self._num_sequences -= flight.request.api.prompts[number].params.n
        return flight, number

    def _give_up(self, flight: _Flight, reason: str, code: str) -> None:
        """For what would come out the same again: the request's fault, or else the model's."""
        self._ground(flight)
        if code == NOT_FINITE:
            self._store_error(flight.row, JournalState.FAILED, code, reason)
            return
        status, body = error_response(RequestError(reason, code=code))
        self._store_response(flight.row, JournalState.REFUSED, status, body)

    def _ground(self, flight: _Flight) -> None:
        """Takes back what the row still has in the engine."""
        for request in flight.requests():
            if request.request_id in self._flying:
                self._service.abort(request.request_id)
                self._land(request.request_id)

    def _retry(self, flight: _Flight, reason: str) -> None:
        self._ground(flight)
        flight.attempt += 1
        flight.outputs.clear()
        if flight.attempt <= self._settings.max_retries:
            self._launch(flight)
            return
        message = f"no result after {flight.attempt} attempts: {reason}"
        self._store_error(flight.row, JournalState.FAILED, "request_failed", message)

    def _store_response(
        self, row: JobRow, state: JournalState, status: int, body: dict[str, Any]
    ) -> None:
        response = {"status_code": status, "request_id": f"req_{_key(row)}", "body": body}
        self._store(row, state, response, None)

    def _store_error(self, row: JobRow, state: JournalState, code: str, message: str) -> None:
        self._store(row, state, None, {"code": code, "message": message})

    def _store(
        self,
        row: JobRow,
        state: JournalState,
        response: dict[str, Any] | None,
        error: dict[str, Any] | None,
    ) -> None:
        self._ledger.add(row.index, row.digest, state, row_line(row, response, error))


def row_line(row: JobRow, response: dict[str, Any] | None, error: dict[str, Any] | None) -> bytes:
    """The result line of a row."""
    return result_line(
        {
            "id": f"batch_req_{_key(row)}",
            "custom_id": row.custom_id,
            "response": response,
            "error": error,
        }
    )


def result_line(result: Mapping[str, Any]) -> bytes:
    """One line of UTF-8 that no reader splits: the line breaks of Unicode are escaped too."""
    text = json.dumps(result, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    for char, escape in _LINE_BREAKS.items():
        text = text.replace(char, escape)
    return text.encode() + b"\n"


def _key(row: JobRow) -> str:
    """Ends the ids of a row's result: the same in every run."""
    name = row.digest if row.custom_id is None else row.custom_id.encode()
    return hashlib.blake2b(name, digest_size=12).hexdigest()
