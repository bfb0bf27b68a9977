"""Rows of a job in an engine: read, submitted, tried again where they fail, and made into result
lines as they end. Knows no files and no job: each line goes to whoever stores it."""

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

from windlass.batch.jobfile import JobRow
from windlass.batch.journal import JournalState
from windlass.engine.outputs import NOT_FINITE, RequestOutput
from windlass.engine.request import Request
from windlass.engine.service import Service
from windlass.errors import RequestError
from windlass.protocol.openai import ServedModel
from windlass.protocol.responses import error_response
from windlass.protocol.rows import RowRequest, read_row

_LINE_BREAKS = {"\u2028": "\\u2028", "\u2029": "\\u2029", "\x85": "\\u0085"}


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


class Flights:
    """Rows that `service` computes for `model`. `store`: gets each row that has ended, with its
    result line. A context manager: at its end, what has not ended is given up."""

    def __init__(
        self,
        service: Service,
        model: ServedModel,
        settings: RunSettings,
        store: Callable[[JobRow, JournalState, bytes], None],
    ) -> None:
        self._service = service
        self._stream = service.open()
        self._model = model
        self._settings = settings
        self._keep = store
        self._flying: dict[str, tuple[_Flight, int]] = {}  # request id -> flight, prompt index
        self._launched: list[Request] = []  # of these, those that the service does not have yet
        self._num_sequences = 0

    def __enter__(self) -> "Flights":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, _: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Gives up what has not ended."""
        self._stream.close()

    @property
    def num_open(self) -> int:
        """Requests that have not ended."""
        return len(self._flying)

    @property
    def has_room(self) -> bool:
        """Whether the window takes another row."""
        return self._num_sequences < self._settings.window

    def submit(self) -> None:
        """What was started, all of it for the next pass: none begins with the first row alone."""
        self._stream.submit(self._launched)
        self._launched.clear()

    def take(self, timeout_s: float) -> None:
        """Stores what has ended, waiting for it at most so long. What the engine raises passes
        through."""
        for output in self._stream.take(timeout_s).finished:
            if output.request_id in self._flying:  # else of a row that was given up meanwhile
                self._take(output)

    def start(self, row: JobRow) -> None:
        """Takes it into the window, or stores why it cannot run. `submit` hands it on."""
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
        self._keep(row, state, row_line(row, response, error))


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
