"""The requests that have not ended: their sequences, and their results when the last one ends.
Knows no memory and no model."""

import time
from dataclasses import dataclass, field

from windlass.engine.detokenizer import TextStream
from windlass.engine.outputs import RequestMetrics, RequestOutput
from windlass.engine.request import Request
from windlass.engine.request_rules import RequestRules
from windlass.engine.sequence import QueuedSequence, Sequence
from windlass.engine.tokenizer import Tokenizer
from windlass.errors import RequestError


@dataclass(slots=True)
class OpenRequest:
    """A request with sequences still to end. Moments in `time.monotonic()` seconds."""

    request: Request
    left: int
    arrival: float
    sequences: list[Sequence] = field(default_factory=list)  # that have begun, by their index
    first_token: float | None = None
    failure: RequestError | None = None


class OpenRequests:
    """Owned by an engine; changed by its thread alone."""

    def __init__(self, rules: RequestRules, tokenizer: Tokenizer) -> None:
        self._rules = rules
        self._tokenizer = tokenizer
        self._eos_token_ids = frozenset(tokenizer.eos_token_ids)
        self._open: dict[str, OpenRequest] = {}

    def __len__(self) -> int:
        return len(self._open)

    def __getitem__(self, request_id: str) -> OpenRequest:
        return self._open[request_id]

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._open

    def add(self, request: Request) -> None:
        self._open[request.request_id] = OpenRequest(request, request.params.n, time.monotonic())

    def pop(self, request_id: str) -> Request | None:
        """Forgets a request; None where there is none of that id."""
        entry = self._open.pop(request_id, None)
        return None if entry is None else entry.request

    def start(self, queued: QueuedSequence) -> Sequence:
        """The sequence of what leaves the queue."""
        request = queued.request
        detokenize = request.params.detokenize
        sequence = Sequence(
            queued,
            self._rules.sampler(request, queued.index),
            TextStream(self._tokenizer, request.params) if detokenize else None,
            self._eos_token_ids,
            self._rules.constraint(request),
        )
        self._open[request.request_id].sequences.append(sequence)
        return sequence

    def end(self, sequence: Sequence) -> RequestOutput | None:
        """A sequence has ended; the result of its request, if it was the last."""
        entry = self._open[sequence.request.request_id]
        entry.left -= 1
        if entry.left:
            return None
        request, first = entry.request, entry.sequences[0]
        del self._open[request.request_id]
        return RequestOutput(
            request_id=request.request_id,
            prompt=None,
            prompt_token_ids=request.prompt_token_ids,
            outputs=tuple(each.output(self._tokenizer) for each in entry.sequences),
            prompt_logprobs=first.prompt_output(self._tokenizer),
            num_cached_tokens=first.num_cached,
            metrics=RequestMetrics(
                arrival_time=entry.arrival,
                first_token_time=entry.first_token,
                finished_time=time.monotonic(),
            ),
            error=str(entry.failure) if entry.failure else None,
            error_code=entry.failure.code if entry.failure else None,
        )
