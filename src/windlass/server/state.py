"""What the server has: the model once it is loaded, what is under way, and whether it takes more.
Changed on the event loop only."""

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

from windlass.engine.engine_stats import EngineStats
from windlass.engine.service import Service
from windlass.protocol.kept_responses import KeptResponses
from windlass.protocol.openai import ServedModel
from windlass.protocol.tokenizing import WholeTokenizer
from windlass.server.data_folder import DataFolder
from windlass.server.errors import HttpError
from windlass.server.metrics import Metrics
from windlass.server.watchers import Watchers


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerLimits:
    """Of what clients may ask. `ping_s`: of silence until a comment is sent in a stream, None for
    none. `body_bytes`: of a request. `answers`: under way or waiting at once, bodies beyond are
    told to come again. `answer_s`: that one may take, None for ever. `drain_s`: for answers to end
    once the server is told to."""

    ping_s: float | None = 15.0
    body_bytes: int = 64 << 20
    answers: int = 256
    answer_s: float | None = None
    drain_s: float = 30.0


class ServedTokenizer(WholeTokenizer, Protocol):
    """The tokenizer as the server shows it."""

    def facts(self) -> dict[str, Any]: ...


@dataclass(frozen=True, slots=True)
class Loaded:
    """A model that answers. `facts`: where it runs and in what memory, for `/health`."""

    service: Service
    model: ServedModel
    tokenizer: ServedTokenizer
    facts: Mapping[str, Any]


@dataclass(slots=True)
class ServerState:
    """`names`: of the model, the first is written into answers. `data`: where files and batches
    are, or why there are none."""

    names: tuple[str, ...]
    limits: ServerLimits
    metrics: Metrics
    created: int = field(default_factory=lambda: int(time.time()))
    loaded: Loaded | None = None
    loading: str = "starting"  # what is being done, while there is no model
    failure: str | None = None  # why there will be none
    is_draining: bool = False
    num_open: int = 0  # answers
    watchers: Watchers = field(default_factory=Watchers)
    limits_over: bool = False  # what is under way is not waited for
    responses: KeptResponses = field(default_factory=KeptResponses)
    data: DataFolder | str = "this server has no data folder (--data-dir)"

    def stats(self) -> EngineStats | None:
        """Counters; None while loading."""
        return self.loaded.service.stats() if self.loaded is not None else None

    def require(self) -> Loaded:
        """The model. Raises HttpError 503 where there is none, or no more is taken."""
        if self.is_draining:
            raise HttpError(503, "the server is shutting down", headers={"retry-after": "30"})
        if self.failure is not None:
            raise HttpError(503, f"the model could not be loaded: {self.failure}")
        if self.loaded is None:
            raise HttpError(
                503, f"the model is loading: {self.loading}", headers={"retry-after": "5"}
            )
        if self.loaded.service.failure is not None:
            raise HttpError(503, f"the engine has ended: {self.loaded.service.failure}")
        return self.loaded

    def data_folder(self) -> DataFolder:
        """Raises HttpError 503 where there is none."""
        if isinstance(self.data, str):
            raise HttpError(503, f"there are no files and no batches: {self.data}")
        return self.data

    def batch_stats(self) -> dict[str, Any] | None:
        """Counts of batches; None where there are none."""
        return None if isinstance(self.data, str) else self.data.book.stats()

    @contextmanager
    def answering(self) -> Iterator[None]:
        """While an answer is under way. Raises HttpError 429 where there are too many."""
        if self.num_open >= self.limits.answers:
            raise HttpError(
                429, f"too many requests under way: got one beside {self.num_open}, allowed"
                f" {self.limits.answers} (--max-requests)", code="rate_limit_exceeded",
                headers={"retry-after": "5"},
            )  # fmt: skip
        self.num_open += 1
        try:
            yield
        finally:
            self.num_open -= 1


def make_state(names: tuple[str, ...], limits: ServerLimits) -> ServerState:
    """Of a server whose model is yet to be loaded."""
    metrics = Metrics(names[0], lambda: state.stats(), lambda: state.batch_stats())
    state = ServerState(names, limits, metrics)
    return state
