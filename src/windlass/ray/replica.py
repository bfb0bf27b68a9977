"""One engine on its own node, fed with rows, and what it says of itself. Knows no ray: an actor
holds it, and a test may."""

import os
import socket
from collections import deque
from collections.abc import Sequence
from dataclasses import replace

from windlass.batch.flights import Flights, RunSettings
from windlass.batch.job_engine import JobEngine, served_model
from windlass.batch.jobfile import JobRow
from windlass.batch.journal import JournalState
from windlass.build.host_budget import default_budget
from windlass.build.open import open_engine
from windlass.device.processors import default_threads
from windlass.doctor.kept import kept_profile, with_kept_usage
from windlass.engine.engine_stats import EngineStats
from windlass.engine.request import WINDOW
from windlass.engine.service import Service
from windlass.hub.locate import identity_of, locate
from windlass.options import resolve_model
from windlass.ray.arithmetic import arithmetic_words
from windlass.ray.messages import EndedRow, Place, ReplicaFacts, ReplicaSpec, Report
from windlass.version import VERSION


def look() -> Place:
    """Where this process is."""
    return Place(
        host=socket.gethostname(),
        pid=os.getpid(),
        version=VERSION,
        budget_bytes=default_budget(),
        threads=default_threads(),
    )


def open_replica(spec: ReplicaSpec) -> "Replica":
    """With the engine of `spec`, planned here. Raises what opening an engine does."""
    options = locate(spec.options).with_weights()
    profile = kept_profile(options)
    engine = open_engine(with_kept_usage(options), source=spec.work, profile=profile)
    return Replica(replace(spec, options=options), engine)


class Replica:
    """Computes rows on `engine`, which it owns. `spec.options`: of the engine, its model a folder.
    For one thread. A context manager."""

    def __init__(self, spec: ReplicaSpec, engine: JobEngine) -> None:
        self._engine = engine
        self._options = spec.options
        self._window = WINDOW * engine.capacity
        self._waiting: deque[JobRow] = deque()
        self._ended: list[EndedRow] = []
        self._service = Service(engine)
        parsers = spec.tool_call_parser, spec.reasoning_parser
        model = served_model(engine, spec.served_names, now=spec.created, parsers=parsers)
        settings = RunSettings(spec.name, spec.created, spec.max_retries, self._window)
        self._flights = Flights(self._service, model, settings, self._store)

    def __enter__(self) -> "Replica":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def facts(self) -> ReplicaFacts:
        """What it is and how it was planned."""
        own, engine = self._options, self._engine
        return ReplicaFacts(
            host=socket.gethostname(),
            pid=os.getpid(),
            checkpoint=identity_of(resolve_model(own.model)),
            tokenizer=identity_of(resolve_model(own.tokenizer)) if own.tokenizer else None,
            fingerprint=dict(engine.fingerprint),
            arithmetic=arithmetic_words(
                str(engine.fingerprint.get("host_kernels", engine.fingerprint["kernels"])),
                has_device=engine.plan.above is not None,
            ),
            max_model_len=engine.max_model_len,
            capacity=engine.capacity,
            window=self._window,
            plan_line=engine.plan.lines()[0],
        )

    def stats(self) -> EngineStats:
        """Its counters since it was opened."""
        return self._service.stats()

    def exchange(self, rows: Sequence[JobRow], timeout_s: float) -> Report:
        """Takes `rows`, and hands back those that have ended since the last call, waiting for one
        at most so long. Raises what the engine does."""
        self._waiting.extend(rows)
        self._fill()
        if not self._ended:
            self._flights.take(timeout_s)
        self._fill()  # places that came free do not wait for the next call
        ended, self._ended = tuple(self._ended), []
        return Report(ended, self.stats())

    def close(self) -> None:
        """Gives up what has not ended, and closes the engine."""
        self._flights.close()
        self._service.close()

    def _fill(self) -> None:
        while self._waiting and self._flights.has_room:
            self._flights.start(self._waiting.popleft())
        self._flights.submit()

    def _store(self, row: JobRow, state: JournalState, line: bytes) -> None:
        self._ended.append(EndedRow(row.index, state, line))
