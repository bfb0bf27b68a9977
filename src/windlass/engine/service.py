"""An engine on a thread of its own: requests are submitted from any thread, what comes of them is
read from streams. Knows no HTTP, no files and no torch.

The thread that a service starts is the only one that steps its engine. Everything else leaves
orders, which it carries out between two passes. Results do not depend on when requests arrive.
"""

import atexit
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from types import TracebackType
from typing import Protocol

from windlass.engine.engine_stats import EngineStats
from windlass.engine.expectation import Rates
from windlass.engine.live_view import LiveView
from windlass.engine.outputs import RequestOutput
from windlass.engine.request import Delta, Request, StepResult
from windlass.errors import RequestError, UsageError
from windlass.units import counted

_STATS_EVERY_S = 0.1  # of a busy engine: they cost a look at the process


class SteppedEngine(Protocol):
    """The engine as its service sees it."""

    @property
    def has_work(self) -> bool: ...

    def validate(self, request: Request) -> None:
        """Raises RequestError; may be asked on any thread, also while a step runs."""
        ...

    def add(self, request: Request) -> None: ...
    def abort(self, request_id: str) -> None: ...
    def step(self) -> StepResult: ...
    def stats(self) -> EngineStats: ...
    def look(self) -> LiveView: ...
    def rates(self, sequences: int) -> Rates | None: ...
    def close(self) -> None: ...


class Service:
    """Owns `engine` and closes it. A context manager.

    What an engine raises in a step ends the service: every open stream raises it once, and so does
    each later `submit`. A service that is dropped, or is left open when the interpreter ends,
    closes itself after the pass under way.
    """

    def __init__(self, engine: SteppedEngine) -> None:
        self._engine = engine
        self._loop = _Loop(engine)
        self._dropped = weakref.finalize(self, self._loop.stop)
        self._dropped.atexit = False  # the loop ends itself then, and is waited for
        self._loop.start()

    def __enter__(self) -> "Service":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, _: TracebackType | None
    ) -> None:
        self.close()

    def validate(self, request: Request) -> None:
        """Raises RequestError if the request can never run here."""
        self._engine.validate(request)

    def open(
        self, *, deltas: bool = False, on_change: Callable[[], None] | None = None
    ) -> "Stream":
        """A stream without requests. `deltas`: whether it brings new text as it comes. `on_change`:
        called, on the engine's thread and under its lock, when there is something to take, for
        those who must not wait in `take`; it must return at once."""
        return Stream(self, self._loop, deltas=deltas, on_change=on_change)

    def submit(self, request: Request) -> "Stream":
        """A stream of this request alone, with deltas. Raises RequestError if it cannot run here,
        UsageError once the service takes no more, and what ended the service."""
        stream = self.open(deltas=True)
        stream.submit([request])
        return stream

    def abort(self, request_id: str) -> None:
        """Nothing more comes of a request; unknown ids are ignored, it may just have ended."""
        self._loop.abort([request_id])

    @property
    def failure(self) -> BaseException | None:
        """What a step raised, which ended the service."""
        return self._loop.failure

    def stats(self) -> EngineStats:
        """The engine's counters: of now, or of a moment before the pass under way."""
        return self._loop.stats()

    def look(self) -> LiveView:
        """Who is under way, and where weights are."""
        return self._engine.look()

    def rates(self, sequences: int) -> Rates | None:
        """What is to be expected while as many decode; None where nothing is."""
        return self._engine.rates(sequences)

    def drain(self) -> None:
        """Takes no more requests, and returns when none is left."""
        self._loop.drain()

    def close(self) -> None:
        """Ends after the pass under way, and closes the engine. What has come stays in its stream.
        Calling it again does nothing."""
        self._dropped.detach()
        self._loop.end()


class Stream:
    """What comes of the requests that were submitted to it. For one thread at a time. Its memory
    grows with what nobody takes."""

    def __init__(
        self,
        service: Service,
        loop: "_Loop",
        *,
        deltas: bool,
        on_change: Callable[[], None] | None = None,
    ) -> None:
        self._service = service  # which must not be dropped while this is read
        self._loop = loop
        self.wants_deltas = deltas
        self.on_change = on_change or _nothing_to_call
        self.open_ids: set[str] = set()  # of requests that have not ended
        self.deltas: list[Delta] = []  # that nobody has taken
        self.finished: list[RequestOutput] = []
        self.failure: BaseException | None = None

    def __enter__(self) -> "Stream":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, _: TracebackType | None
    ) -> None:
        self.close()

    def submit(self, requests: Sequence[Request]) -> None:
        """All of them take part in the next pass, as far as there is room, or (RequestError) none.
        Raises UsageError once the service takes no more, and what ended the service."""
        for request in requests:
            self._service.validate(request)
        self._loop.submit(requests, self)

    def take(self, timeout_s: float | None = None) -> StepResult:
        """What has come since the last call. Waits for it, at most `timeout_s`; empty when that is
        over, when no request is open, and when the service was closed. Raises what ended the
        service, once and after all results."""
        return self._loop.take(self, timeout_s)

    def __iter__(self) -> Iterator[Delta | RequestOutput]:
        """Deltas and results as they come, until no request is open. Raises as `take` does, and
        UsageError if the service was closed before."""
        while (came := self.take()) != _NOTHING:
            yield from came.deltas
            yield from came.finished
        if self.open_ids:
            raise UsageError(f"service: closed while {counted(len(self.open_ids), 'request')} ran")

    @property
    def is_over(self) -> bool:
        """Whether the service has ended: nothing more comes."""
        return self._loop.is_over

    def close(self) -> None:
        """Aborts what has not ended. Calling it again does nothing."""
        self._loop.abort(list(self.open_ids))


_NOTHING = StepResult((), ())


def _nothing_to_call() -> None:
    pass


class _Loop:
    """What the thread and the objects of the callers share. Must not hold the service, which would
    never be dropped. `_changed` guards everything but the engine, `_stepping` the engine."""

    def __init__(self, engine: SteppedEngine) -> None:
        self._engine = engine
        self._changed = threading.Condition()
        self._stepping = threading.Lock()
        self._orders: list[Request | str] = []  # requests to add, ids to abort, in their order
        self._streams: dict[str, Stream] = {}  # of each open request
        self._refusal: str | None = None  # why no more are taken
        self._is_stopping = self._is_over = False
        self._failure: BaseException | None = None
        self._close_error: Exception | None = None
        self._stats = engine.stats()
        self._stats_at = time.monotonic()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    # --- for callers ------------------------------------------------------------------------------

    def start(self) -> None:
        # a thread that torch keeps busy must not be killed by the interpreter's end
        atexit.register(self.end)
        self._thread.start()

    def submit(self, requests: Sequence[Request], stream: Stream) -> None:
        with self._changed:
            if self._failure is not None:
                raise self._failure
            if self._refusal is not None:
                raise UsageError(self._refusal)
            ids: set[str] = set()
            for request_id in (request.request_id for request in requests):
                # one that was aborted is in use until the engine has heard of it
                if request_id in ids or request_id in self._streams or request_id in self._orders:
                    raise RequestError(f"request id {request_id!r} is already running")
                ids.add(request_id)
            self._orders += requests
            self._streams |= dict.fromkeys(ids, stream)
            stream.open_ids.update(ids)
            self._changed.notify_all()

    def abort(self, request_ids: Sequence[str]) -> None:
        with self._changed:
            for request_id in request_ids:
                stream = self._streams.pop(request_id, None)
                if stream is not None:
                    stream.open_ids.discard(request_id)
                    self._orders.append(request_id)
            self._changed.notify_all()

    def take(self, stream: Stream, timeout_s: float | None) -> StepResult:
        def is_ready() -> bool:
            has_come = stream.deltas or stream.finished or stream.failure
            return bool(has_come) or not stream.open_ids or self._is_over

        with self._changed:
            self._changed.wait_for(is_ready, timeout_s)
            came = StepResult(tuple(stream.finished), tuple(stream.deltas))
            stream.finished.clear()
            stream.deltas.clear()
            if came == _NOTHING and stream.failure is not None:
                failure, stream.failure = stream.failure, None
                raise failure
            return came

    @property
    def is_over(self) -> bool:
        return self._is_over

    @property
    def failure(self) -> BaseException | None:
        return self._failure

    def stats(self) -> EngineStats:
        if not self._stepping.acquire(blocking=False):
            return self._stats
        try:
            return self._engine.stats()
        finally:
            self._stepping.release()

    def drain(self) -> None:
        with self._changed:
            self._refusal = self._refusal or "service: got a request after drain()"
            self._changed.wait_for(lambda: not self._streams or self._is_over)

    def stop(self) -> None:
        """The thread ends after the pass under way."""
        with self._changed:
            self._refusal = "service: got a request after close()"
            self._is_stopping = True
            self._changed.notify_all()

    def end(self) -> None:
        """Stops, and waits for it. Raises what closing the engine did."""
        self.stop()
        if self._thread.is_alive():  # a signal may have come before it began
            self._thread.join()
        error, self._close_error = self._close_error, None
        if error is not None:
            raise error

    # --- the thread -------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            while self._has_pass():
                with self._stepping:
                    result = self._engine.step()
                    self._keep_stats()
                self._deliver(result)
        except BaseException as error:  # noqa: BLE001  thread boundary: streams hand it on
            self._fail(error)
        finally:
            self._close()

    def _close(self) -> None:
        atexit.unregister(self.end)
        try:
            with self._stepping:
                self._engine.close()
        except Exception as error:  # noqa: BLE001  thread boundary: whoever closes gets it
            self._close_error = error
        with self._changed:
            self._is_over = True
            for stream in set(self._streams.values()):
                stream.on_change()
            self._changed.notify_all()

    def _has_pass(self) -> bool:
        """Carries out orders, and waits while there is nothing to do. False: the end."""
        while True:
            with self._changed:
                while not (self._orders or self._is_stopping):
                    if self._engine.has_work:
                        return True
                    self._changed.wait()
                if self._is_stopping:
                    return False
                orders, self._orders = self._orders, []
            with self._stepping:
                for order in orders:
                    if isinstance(order, Request):
                        self._engine.add(order)
                    else:
                        self._engine.abort(order)

    def _keep_stats(self) -> None:
        now = time.monotonic()
        if now - self._stats_at >= _STATS_EVERY_S or not self._engine.has_work:
            self._stats, self._stats_at = self._engine.stats(), now

    def _deliver(self, result: StepResult) -> None:
        with self._changed:
            told: set[Stream] = set()
            for delta in result.deltas:
                stream = self._streams.get(delta.request_id)
                if stream is not None and stream.wants_deltas:
                    stream.deltas.append(delta)
                    told.add(stream)
            for output in result.finished:
                stream = self._streams.pop(output.request_id, None)
                if stream is not None:  # else aborted in this very step
                    stream.finished.append(output)
                    stream.open_ids.discard(output.request_id)
                    told.add(stream)
            for stream in told:
                stream.on_change()
            if told:
                self._changed.notify_all()

    def _fail(self, error: BaseException) -> None:
        with self._changed:
            self._failure = error
            for stream in set(self._streams.values()):
                stream.failure = error
                stream.open_ids.clear()
                stream.on_change()
            self._streams.clear()
            self._changed.notify_all()
