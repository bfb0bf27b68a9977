"""Prompts in bounded numbers: as many are in the engine as keep it busy, however many there are.
Knows no files."""

from collections.abc import Generator, Iterator
from dataclasses import replace
from itertools import islice
from typing import NamedTuple

from windlass.engine.outputs import RequestOutput
from windlass.engine.request import WINDOW, Request
from windlass.engine.service import Service, Stream


class FeedEntry(NamedTuple):
    """One prompt, checked: a request, or why there is none."""

    request_id: str
    text: str | None
    request: Request | None = None
    failure: RequestOutput | None = None


class RequestFeed:
    """Runs entries through `service`, whose engine computes `capacity` sequences at once."""

    def __init__(self, service: Service, capacity: int) -> None:
        self._service = service
        self._window = max(1, WINDOW * capacity)
        self._streams: set[Stream] = set()

    @property
    def is_idle(self) -> bool:
        """Whether no results are being iterated."""
        return not self._streams

    def results(self, entries: Iterator[FeedEntry]) -> Generator[RequestOutput, None, None]:
        """Results as they end. What has not ended when the caller stops is aborted. Raises what
        ends the service, UsageError once it is closed."""
        texts: dict[str, str | None] = {}  # of prompts in the engine
        with self._service.open() as stream:
            self._streams.add(stream)
            try:
                while True:
                    new = list(islice(entries, self._window - len(texts)))
                    texts |= {entry.request_id: entry.text for entry in new if entry.request}
                    stream.submit([entry.request for entry in new if entry.request])
                    yield from (entry.failure for entry in new if entry.failure)
                    if not new and not texts:
                        return
                    for output in stream.take().finished:
                        yield replace(output, prompt=texts.pop(output.request_id))
            finally:
                self._streams.discard(stream)
